"""SF-V's experiments: one step against many, its heads, its noise, and the methods beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..conditioning import Prompt
from ..distill.recipes import Recipe
from ..distill.specs import SfvSpec
from ..distill.student import student_grid
from ..evaluate import image_world, world
from ..evaluate.classifier import load_image_classifier
from ..evaluate.image_clips import clips, write_videos
from ..evaluate.judge import ImageJudge
from ..flow import Times
from ..guidance import Guided, guided
from ..models.loading import Teacher
from ..models.tiny_svd import embedded_image_teacher_path
from ..models.video_model import Family, VideoModel
from ..monitor import Monitor
from ..trajectories.footage import IngestSpec
from ..trajectories.ingest import ingest
from ..trajectories.record import RecordSpec, record
from ..trajectories.store import TrajectoryDataset
from .arms import FULL_TEACHER, Arm, Question, in_steps
from .sf_v_remarks import (
    P_MEANS,
    USUAL,
    USUAL_MEAN,
    heads_remarks,
    one_step_remarks,
    sweep_remarks,
    sweep_row,
)
from .sf_v_setting import PRESETS, SfvSetting
from .study import NOISE_SEED, PER_PROMPT

if TYPE_CHECKING:
    from .lab import Lab
    from .page import Results

KEY = ("ablation", "sf-v")
"""Of the clips that are drawn."""
REAL, SYNTHETIC = "dataset", "dataset_teacher"
OTHERS = {"ladd": "LADD", "ufogen": "UFOGen", "consistency": "latent consistency"}


@dataclass(frozen=True)
class SfvStudy:
    """On the embedded image-to-video teacher and its procedural world."""

    setting: SfvSetting = PRESETS["full"]

    name = "sf-v"
    title = "One step from image to video"
    quick = ("one_step",)

    @staticmethod
    def preset(name: str) -> SfvStudy:
        return SfvStudy(PRESETS[name])

    @staticmethod
    def teacher_folder() -> Path:
        return embedded_image_teacher_path()

    def arms(self, teacher: VideoModel) -> dict[str, Arm]:
        steps, setting = teacher.family.steps, self.setting
        arms = [
            Arm(FULL_TEACHER, f"teacher, {in_steps(steps)}", steps),
            *(Arm(f"teacher_{n}", f"teacher, {in_steps(n)}", n) for n in setting.teacher_steps),
            _sf_v(USUAL, "SF-V, 1 step"),
            _sf_v("spatial", "spatial heads alone", head_kind="spatial"),
            _sf_v("temporal", "temporal heads alone", head_kind="temporal"),
            *(_sf_v(sweep_row(mean), f"P_mean = {mean:g}", sf_v=SfvSpec(p_mean=mean))
              for mean in P_MEANS if mean != USUAL_MEAN),
            *self._methods(),
        ]  # fmt: skip
        return {arm.name: arm for arm in arms}

    def _methods(self) -> list[Arm]:
        """Every method at every number of steps; each student is trained once."""
        arms = []
        counts = self.setting.student_steps
        for name, title in ((USUAL, "SF-V"), *OTHERS.items()):
            trained = 1 if name == USUAL else max(n for n in counts if n <= 4)
            if name != USUAL:
                data = SYNTHETIC if name == "ladd" else REAL
                recipe = f"tiny-{name}"
                told = f"{title}, {in_steps(trained)}"
                arms.append(Arm(name, told, trained, recipe, dataset=data))
            arms += [
                Arm(f"{name}_{n}", f"{title}, {in_steps(n)}", n, student=name)
                for n in counts
                if n != trained
            ]
        return arms

    def questions(self) -> dict[str, Question]:
        return {one.name: one for one in (self._one_step(), _heads(), _noise(), self._others())}

    def _one_step(self) -> Question:
        teachers = tuple(f"teacher_{n}" for n in self.setting.teacher_steps)
        return Question(
            "one_step",
            "One step against the teacher's many",
            "The paper has an FVD of 180.9 for one step, 153.4 for 25 steps of its teacher, 194.4 "
            "for 16, 488.6 for 8 and 1687.0 for 4.",
            (FULL_TEACHER, *teachers, USUAL),
            ((USUAL, teachers[-1]), (USUAL, FULL_TEACHER)),
        )

    def _others(self) -> Question:
        counts = self.setting.student_steps
        rows = tuple(self._row(name, n) for name in (USUAL, *OTHERS) for n in counts)
        pairs = tuple((USUAL, self._row(name, min(counts))) for name in OTHERS)
        return Question(
            "methods",
            "Beside other methods",
            "LADD and UFOGen have SF-V's heads, as in the paper, whose FVD of them is 1893.8 and "
            "1917.2 at one step, where SF-V has 180.9; LADD learns from the teacher's own clips. "
            "Latent consistency is AnimateLCM's setting (281.0 at 8 steps, 1158.4 at 2). Each is "
            "trained once, with as many updates on batches of the same size, and sampled in "
            "different numbers of steps with new noise between them.",
            (FULL_TEACHER, *rows),
            pairs,
            claim=True,
        )

    def _row(self, name: str, steps: int) -> str:
        """The arm that samples a method's student in so many steps."""
        own = next(arm.steps for arm in (_sf_v(USUAL, ""), *self._methods()) if arm.name == name)
        return name if steps == own else f"{name}_{steps}"

    def asked(self, teacher: Teacher) -> VideoModel | Guided:
        """Under the guidance of its release."""
        return guided(teacher.model, teacher.encode_negative(), teacher.model.family.cfg)

    def times(self, arm: Arm, family: Family) -> Times:
        learnt = arm.recipe or arm.student
        return student_grid(family, arm.steps) if learnt else family.time_grid(arm.steps)

    def recipe(self, arm: Arm, seed: int, times: Times) -> Recipe:
        """Arms of one seed read the same batches in the same order."""
        setting = self.setting
        return arm.trained_by(
            times, train_steps=setting.updates, batch_size=setting.batch, seed=seed
        )

    def dataset(
        self, name: str, teacher: Teacher, folder: Path, monitor: Monitor
    ) -> TrajectoryDataset:
        """Real clips as video files that are ingested; or the teacher's own results."""
        if name == SYNTHETIC:
            return self._synthetic(teacher, folder, monitor)
        videos = folder.with_name("videos")
        write_videos(videos, self.setting.clips, *KEY, "train")
        spec = IngestSpec(
            frames=image_world.FRAMES,
            height=image_world.SIZE,
            width=image_world.SIZE,
            clips=1,
            dtype="float32",
        )
        return ingest(teacher, videos, spec, folder, monitor).dataset

    def _synthetic(self, teacher: Teacher, folder: Path, monitor: Monitor) -> TrajectoryDataset:
        spec = RecordSpec(
            frames=image_world.FRAMES,
            height=image_world.SIZE,
            width=image_world.SIZE,
            samples_per_prompt=1,
            seed=0,
            kept=(teacher.model.family.steps,),
            batch_size=min(32, self.setting.synthetic),
            dtype="float32",
        )
        _, frames = clips(range(self.setting.synthetic), *KEY, "synthetic")
        prompts = _image_prompts(teacher, frames[:, 0])
        negative = teacher.encode_negative()
        return record(teacher.model, prompts, spec, folder, monitor, negative)

    def texts(self) -> list[str]:
        return [world.prompt(spec) for spec in self._measured[0]]

    def prompts(self, teacher: Teacher) -> list[Prompt]:
        return _image_prompts(teacher, self._measured[1][:, 0])

    def judge(self) -> ImageJudge:
        specs, frames = self._measured
        each = [spec for spec in specs for _ in range(PER_PROMPT)]
        images = frames[:, 0].repeat_interleave(PER_PROMPT, 0)
        return ImageJudge(each, load_image_classifier(), NOISE_SEED, images)

    @cached_property
    def _measured(self) -> tuple[list[world.ClipSpec], Tensor]:
        """What students are measured on: descriptions, and clips that begin with their images."""
        return clips(range(self.setting.prompts), *KEY, "compare")

    def sections(self, lab: Lab, page: Path, monitor: Monitor) -> list[str]:
        return []

    def remarks(self, question: Question, results: Results, page: Path) -> list[str]:
        """Against the paper's numbers, and the sweep as a curve."""
        if question.name == "p_mean":
            return sweep_remarks(results, page)
        told = {"one_step": one_step_remarks, "heads": heads_remarks}.get(question.name)
        return [] if told is None else told(results)

    def introduction(self, fingerprint: str) -> str:
        setting = self.setting
        return f"""\
SF-V's one-step student, what it is made of, and the methods beside it, measured where every figure
is exact: on the embedded tiny Stable Video Diffusion (fingerprint `{fingerprint}`)
and its procedural world, where the first frame tells what moves and how. What holds here need not
hold at 1.5 billion parameters. The paper's own numbers are named as such; they are FVD on UCF-101
and have another scale.

Students learn from {setting.clips} real clips, ingested from video files, with {setting.updates}
updates of {setting.batch}; LADD from {setting.synthetic} of the teacher's own."""


def _sf_v(name: str, title: str, **changes: Any) -> Arm:
    return Arm(name, title, 1, "tiny-sf-v", changes)


def _heads() -> Question:
    return Question(
        "heads",
        "Which heads",
        "The paper has an FVD of 180.9 with both, 514.7 with the spatial ones alone, whose "
        "students tend to copy the first frame, and 539.2 with the temporal ones alone.",
        (FULL_TEACHER, USUAL, "spatial", "temporal"),
        ((USUAL, "spatial"), (USUAL, "temporal")),
        claim=True,
        titles={USUAL: "spatial and temporal heads"},
    )


def _noise() -> Question:
    rows = tuple(sweep_row(mean) for mean in P_MEANS)
    told = ", ".join(f"{fvd} at {mean:g}" for mean, fvd in P_MEANS.items())
    return Question(
        "p_mean",
        "The noise at which the heads judge",
        f"P_mean is the mean of log sigma'. The paper has an FVD of {told}.",
        rows,
        tuple((USUAL, row) for row in rows if row != USUAL),
        claim=True,
        titles={USUAL: f"P_mean = {USUAL_MEAN:g}"},
    )


def _image_prompts(teacher: Teacher, images: Tensor) -> list[Prompt]:
    """Prompts that begin with images [N, H, W, 3]."""
    return teacher.encode_images([("", image) for image in images], image_world.FRAMES)

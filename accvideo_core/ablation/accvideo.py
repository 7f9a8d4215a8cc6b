"""AccVideo's experiments: its ablation (Figure 7), and what the paper leaves open.

Students learn by trajectory guidance; from there those of the adversarial questions are tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conditioning import Prompt
from ..distill.recipes import Recipe
from ..distill.student import LoraSpec
from ..evaluate import world
from ..evaluate.judge import Judge
from ..flow import Times
from ..latents import key_generator
from ..models.loading import Teacher
from ..models.tiny import embedded_teacher_path
from ..models.video_model import Family, VideoModel
from ..monitor import Monitor
from ..trajectories.record import RecordSpec, record
from ..trajectories.store import TrajectoryDataset
from .accvideo_setting import PRESETS, Setting, key_steps
from .arms import FULL_TEACHER, Arm, Question, in_steps
from .study import NOISE_SEED, PER_PROMPT

if TYPE_CHECKING:
    from .lab import Lab
    from .page import Results

BASE = "base"
"""The trajectory student from which the adversarial arms of its seed start."""
Changes = Mapping[str, Any]
NOTHING: Changes = {}


@dataclass(frozen=True, slots=True)
class AccVideoStudy:
    """On the embedded text-to-video teacher and its procedural world."""

    setting: Setting = PRESETS["full"]

    name = "accvideo"
    title = "Experiments on the embedded teacher"
    quick = ("figure7",)
    """Questions that the preset quick answers."""

    @staticmethod
    def preset(name: str) -> AccVideoStudy:
        return AccVideoStudy(PRESETS[name])

    @staticmethod
    def teacher_folder() -> Path:
        return embedded_teacher_path()

    def arms(self, teacher: VideoModel) -> dict[str, Arm]:
        """Every arm by name, those that others need first."""
        return all_arms(self.setting, teacher.num_blocks, len(_grid(teacher.family)) - 1)

    def questions(self) -> dict[str, Question]:
        """Every question by name, Figure 7 first."""
        return {
            one.name: one
            for one in (*_parts(self.setting), *_game(), *_amounts(self.setting))
        }

    def asked(self, teacher: Teacher) -> VideoModel:
        """The teacher as it is sampled."""
        return teacher.model

    def times(self, arm: Arm, family: Family) -> Times:
        """The falling times that an arm is sampled at: of the teacher's own grid."""
        grid = _grid(family)
        return tuple(grid[i] for i in key_steps(len(grid) - 1, arm.steps))

    def recipe(self, arm: Arm, seed: int, times: Times) -> Recipe:
        """How an arm is trained. Arms of one seed read the same batches in the same order."""
        setting, tuned = self.setting, arm.start is not None
        return arm.trained_by(
            times,
            trajectories=setting.trajectories,
            train_steps=setting.tune_updates if tuned else setting.updates,
            batch_size=setting.batch,
            seed=seed + 1000 if tuned else seed,  # another order of batches than before
        )

    def dataset(
        self, _name: str, teacher: Teacher, folder: Path, monitor: Monitor
    ) -> TrajectoryDataset:
        """The teacher's trajectories, recorded once and gone on with."""
        setting = self.setting
        spec = RecordSpec(
            frames=world.FRAMES,
            height=world.SIZE,
            width=world.SIZE,
            samples_per_prompt=setting.samples,
            seed=0,
            kept=setting.kept(len(_grid(teacher.model.family)) - 1),
            batch_size=min(32, setting.recorded // setting.samples),
            dtype="float32",
        )
        count = setting.recorded // setting.samples
        texts = world.sample_prompts(count, key_generator("ablation", "train", "prompts"))
        return record(teacher.model, teacher.encode_prompts(texts), spec, folder, monitor)

    def texts(self) -> list[str]:
        """The prompts that all arms are measured on."""
        return world.sample_prompts(self.setting.prompts, key_generator("ablation", "compare"))

    def prompts(self, teacher: Teacher) -> list[Prompt]:
        """The same, encoded."""
        return teacher.encode_prompts(self.texts())

    def judge(self) -> Judge:
        """Who knows what clips of these prompts should show."""
        judge = Judge.of_world(self.texts(), PER_PROMPT, NOISE_SEED)
        assert judge is not None, "the texts are the world's own"
        return judge

    def sections(self, lab: Lab, page: Path, monitor: Monitor) -> list[str]:
        """What the page shows before the questions: Figure 5."""
        from .features import features_section, make_features

        make_features(lab, self, monitor)
        return [features_section(lab, page)]

    def remarks(self, _question: Question, _results: Results, _page: Path) -> list[str]:
        """Nothing more."""
        return []

    def introduction(self, fingerprint: str) -> str:
        """What the page says of the teacher and of how much was done."""
        setting = self.setting
        return f"""\
What each part of AccVideo's method gives, and what the paper leaves open, measured where every
figure is exact: on the embedded tiny HunyuanVideo (fingerprint `{fingerprint}`)
and its procedural world. What holds here need not hold at 13 billion parameters.

{setting.recorded} trajectories were recorded, of which students learn from {setting.trajectories}
where their number is not the question: {setting.updates} updates of {setting.batch} samples by
trajectory guidance, then {setting.tune_updates} with the adversarial term or without."""


def _grid(family: Family) -> Times:
    return family.time_grid(size=(world.SIZE, world.SIZE))


def all_arms(setting: Setting, depth: int, teacher_steps: int) -> dict[str, Arm]:
    """Every arm by name, those that others start from first.

    Args:
        depth: blocks of the teacher's network.
        teacher_steps: of its official grid.
    """
    m = setting.student_steps
    last = {"feature_blocks": (depth - 1,)}

    def guided(name: str, title: str, steps: int, changes: Changes = NOTHING) -> Arm:
        return Arm(name, title, steps, "tiny-trajectory", dict(changes))

    def tuned(name: str, title: str, changes: Changes = NOTHING) -> Arm:
        return Arm(name, title, m, "tiny-adversarial", dict(changes), start=BASE)

    arms = [
        Arm(FULL_TEACHER, f"teacher, {teacher_steps} steps", teacher_steps),
        *(
            Arm(f"teacher_{n}", f"teacher, {in_steps(n)}", n)
            for n in sorted({m, *setting.other_steps})
        ),
        guided(BASE, f"trajectory guidance, {setting.updates} updates", m),
        tuned("trajectory", "+ trajectory guidance", {"adversarial": False}),
        tuned("shared", "+ adversarial, one shared head", {"heads": "shared", **last}),
        tuned("timestep", "+ adversarial, a head per key time"),
        tuned("last_block", "heads at the last block alone", last),
        tuned("hinge", "hinge loss", {"gan_loss": "hinge"}),
        tuned("queued", "queued rollout", {"rollout": "queued"}),
        tuned("no_r1", "no R1", {"r1_weight": 0.0}),
        *(tuned(f"lambda_{x:g}", f"lambda = {x:g}", {"adv_weight": x})
          for x in (0.01, 1.0)),
        *(guided(f"trajectories_{n}", f"{n} trajectories", m, {"trajectories": n})
          for n in setting.counts),
        *(guided(f"steps_{n}", f"m = {n}", n) for n in setting.other_steps),
        *(guided(f"rank_{r}", f"LoRA of rank {r}", m, {"lora": LoraSpec(rank=r)})
          for r in (4, 16)),
        *(guided(f"full_{lr:g}", f"all weights, learning rate {lr:g}", m, {"lora": None, "lr": lr})
          for lr in (1e-4, 1e-3)),
    ]  # fmt: skip
    return {arm.name: arm for arm in arms}


def _parts(setting: Setting) -> list[Question]:
    """What the method consists of."""
    m, usual = setting.student_steps, "timestep"
    return [
        Question(
            "figure7",
            "Figure 7: what each part of the method gives",
            "The paper shows this ablation as pictures. Students learn by trajectory guidance; "
            "from there all rows take the same number of further updates on the same batches.",
            (FULL_TEACHER, f"teacher_{m}", "trajectory", "shared", usual),
            (("trajectory", f"teacher_{m}"), ("shared", "trajectory"), (usual, "shared")),
            claim=True,
        ),
        Question(
            "heads",
            "Where the heads look",
            "The paper takes the last block for t > 0 and another at two thirds of the depth for "
            "t = 0. One shared head can look at one block alone, the last; so there is a row with "
            "its features and separate heads.",
            ("shared", "last_block", usual),
            (("last_block", "shared"), (usual, "last_block")),
            titles={
                "shared": "one head, the last block",
                "last_block": "a head per key time, the last block",
                usual: "a head per key time, another block at t = 0",
            },
        ),
    ]


def _game() -> list[Question]:
    """How the adversarial term is computed; arms of a seed start from one trajectory student."""
    usual, lambdas = "timestep", ("trajectory", "lambda_0.01", "timestep", "lambda_1")
    return [
        Question(
            "loss",
            "Logistic or hinge loss",
            "The paper gives the game's value and not the loss of each side.",
            (usual, "hinge"),
            (("hinge", usual),),
            titles={usual: "logistic loss"},
        ),
        Question(
            "rollout",
            "Direct or queued rollout",
            "The paper's queues spread a rollout over m updates, so that fakes are a little old; "
            "direct rollout makes all steps in each update and costs more.",
            (usual, "queued"),
            (("queued", usual),),
            titles={usual: "direct rollout"},
        ),
        Question(
            "regulariser",
            "With and without R1",
            "The paper says that trajectory guidance makes a regulariser of the heads unnecessary; "
            "the recipe for the embedded teacher has one.",
            (usual, "no_r1"),
            (("no_r1", usual),),
            titles={usual: "approximate R1 of weight 10"},
        ),
        Question(
            "lambda",
            "The weight of the adversarial term",
            "The paper takes 0.1; 0 is as many updates of trajectory guidance alone.",
            lambdas,
            tuple((name, usual) for name in lambdas if name != usual),
            titles={"trajectory": "lambda = 0", usual: "lambda = 0.1"},
        ),
    ]


def _amounts(setting: Setting) -> list[Question]:
    """About trajectory guidance alone, at equal updates."""
    m = setting.student_steps
    counts = sorted({*setting.counts, setting.trajectories})
    by_count = [BASE if n == setting.trajectories else f"trajectories_{n}" for n in counts]
    pairs = [(f"teacher_{n}", BASE if n == m else f"steps_{n}")
             for n in sorted({*setting.other_steps, m})]  # fmt: skip
    ranks = ("rank_4", "rank_16", BASE, "full_0.0001", "full_0.001")
    return [
        Question(
            "trajectories",
            "How many trajectories",
            "Trajectory guidance alone, at equal updates.",
            tuple(by_count),
            tuple((name, BASE) for name in by_count if name != BASE),
            titles={BASE: f"{setting.trajectories} trajectories"},
        ),
        Question(
            "steps",
            "How many key steps",
            "Trajectory guidance alone, at equal updates, beside the teacher at as many steps. "
            "Where m does not divide its steps, key times are the nearest of them.",
            tuple(name for pair in pairs for name in pair),
            tuple((student, teacher) for teacher, student in pairs),
            titles={BASE: f"m = {m}"},
        ),
        Question(
            "rank",
            "LoRA rank, or all weights",
            "Trajectory guidance alone, at equal updates. All weights want a lower learning rate "
            "than adapters, so there are two of them.",
            ranks,
            tuple((name, BASE) for name in ranks if name != BASE),
            titles={BASE: "LoRA of rank 64"},
        ),
    ]

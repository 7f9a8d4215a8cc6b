"""Teacher against students: the same prompts, the same noise, every figure.

Contenders are measured one after another, in batches; what is kept of a clip is a few figures, its
features and patches, its latents, and, of the reference, the frames at 8 bit. The reference is the
teacher on its family's own grid ("teacher@50").

Shapes: N clips, C, T, H, W latents; frames [N, T, H, W, 3] in [0, 1].
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..conditioning import Condition, Prompt
from ..distill.student import Student
from ..errors import AccVideoError
from ..flow import Times, validate_times
from ..guidance import Guided
from ..latents import key_generator, seeded_noise
from ..models.loading import Teacher
from ..models.video_model import Family, VideoModel
from ..monitor import Monitor, Progress, silent
from ..sampling import SamplePlan, sample
from ..speed import Speed, sped_up
from . import metrics
from .judge import Judge
from .report import Measured, Report

__all__ = ["Bench", "Contender", "Report", "compare"]

REAL, REAL_VAE = "real clips", "real via VAE"


@dataclass(frozen=True, slots=True)
class Contender:
    """A model and the falling times that it is sampled at."""

    name: str
    model: VideoModel | Guided | Student
    times: Times

    def __post_init__(self) -> None:
        validate_times(self.times)

    @property
    def steps(self) -> int:
        return len(self.times) - 1


def compare(
    teacher: Teacher,
    contenders: Sequence[Contender],
    *,
    prompts: Sequence[Prompt],
    seed: int,
    batch_size: int,
    monitor: Monitor = silent,
    real_clips: int = 1024,
    samples_per_prompt: int = 2,
    plan: SamplePlan | None = None,
    shown: int = 8,
    asked: Guided | None = None,
    speed: Speed | None = None,
) -> Report:
    """Measure contenders on the same prompts and noise.

    The reference (the teacher on its family's grid) is measured first, whether it is among the
    contenders or not. Figures that need the procedural world are there when all prompts are in its
    grammar and clips have its size; the report's notes say so when they are not.

    Args:
        prompts: what to show, each `samples_per_prompt` times; one that is given twice counts once.
        seed: the noise is `seeded_noise(shape, seed, prompt.id, sample)`.
        batch_size: clips that are sampled and decoded at once.
        monitor: called every sampling step, stage "compare <name>"; may raise.
        real_clips: real clips that the Frechet distance is taken to.
        plan: size of the clips; None takes a student's own, or the procedural world's.
        shown: prompts whose first clip is kept for pictures.
        asked: the teacher under its guidance, where it is asked with any.
        speed: how all of them compute; None as they do by themselves.
    """
    prompts = list({prompt.id: prompt for prompt in prompts}.values())
    _check(contenders, prompts, samples_per_prompt, batch_size)
    judge = Judge.of_world([prompt.text for prompt in prompts], samples_per_prompt, seed)
    plan = plan or _default_plan(contenders, judge)
    notes = []
    if judge is None or not judge.fits(plan):
        judge = None
        notes.append(
            "the prompts or the size are not of the embedded teacher's procedural world, "
            "so there is no prompt accuracy and no Frechet distance"
        )
    bench = Bench(teacher, prompts, samples_per_prompt, seed, batch_size, plan, judge, shown)
    line_up = _with_reference(asked or teacher.model, teacher.model.family, contenders, plan)
    measured = []
    for contender in line_up:
        with sped_up(_network(contender.model), speed, teacher.compute_device):
            measured.append(bench.measure(contender, monitor))
    real = bench.measure_real(monitor) if judge else []
    return Report(
        {one.name: one for one in (*real, *measured)},
        line_up[0].name,
        [prompt.text for prompt in prompts],
        samples_per_prompt,
        seed,
        plan,
        judge.real_features(real_clips, batch_size) if judge else None,
        notes,
    )


def _network(model: VideoModel | Guided | Student) -> VideoModel:
    return model if isinstance(model, VideoModel) else model.model


@dataclass(eq=False)
class Bench:
    """What all contenders of one comparison have in common. The reference is measured first."""

    teacher: Teacher
    prompts: list[Prompt]
    per_prompt: int
    seed: int
    batch_size: int
    plan: SamplePlan
    judge: Judge | None
    shown: int
    reference: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(frames uint8, latents) of the reference, batch by batch."""

    def measure(
        self, contender: Contender, monitor: Monitor, known: Tensor | None = None
    ) -> Measured:
        """Sample, decode and measure all clips of one contender.

        Where its latents [N, C, T, H, W] are `known` from an earlier time, they are not sampled.
        """
        is_reference = not self.reference
        batches, seconds, parts = self._batches(), [], []
        stage, total = f"compare {contender.name}", len(self._batches()) * contender.steps
        for index, clips in enumerate(batches):

            def relay(progress: Progress, done: int = index * contender.steps) -> None:
                monitor(Progress(stage, done + progress.step, total, preview=progress.preview))

            if known is None:
                latents, took = self._sample(contender, clips, relay)
                seconds.append(took / len(clips))
            else:
                latents = known[clips]
            frames = self.teacher.vae.decode(latents)
            if is_reference:
                self.reference.append(((frames * 255).round().to(torch.uint8), latents))
            target = None if is_reference else self.reference[index]
            parts.append(self._figures(latents, frames, clips, target))
        took_each = statistics.median(seconds) if seconds else None
        return self._join(contender.name, contender.steps, parts, took_each)

    def measure_real(self, monitor: Monitor) -> list[Measured]:
        """Real clips of the same prompts, as they are and through the VAE: what is possible."""
        assert self.judge is not None
        plain, coded = [], []
        batches = self._batches()
        for index, clips in enumerate(batches):
            frames = self.judge.real_frames(clips)
            latents = self.teacher.vae.encode(frames)
            plain.append(self._figures(latents, frames, clips))
            coded.append(self._figures(latents, self.teacher.vae.decode(latents), clips))
            monitor(Progress(f"compare {REAL}", index + 1, len(batches)))
        return [self._join(REAL, None, plain), self._join(REAL_VAE, None, coded)]

    def _batches(self) -> list[list[int]]:
        clips = list(range(len(self.prompts) * self.per_prompt))
        return [clips[i : i + self.batch_size] for i in range(0, len(clips), self.batch_size)]

    def _sample(
        self, contender: Contender, clips: list[int], monitor: Monitor
    ) -> tuple[Tensor, float]:
        """Latents of some clips on the CPU, and the seconds that sampling took."""
        model = contender.model
        info = model.info if isinstance(model, Student) else None
        guidance, solver = (info.guidance, info.solver) if info else (None, "euler")
        device = self.teacher.model.device
        spec = self.teacher.model.latent_spec
        shape = spec.shape(self.plan.frames, self.plan.height, self.plan.width)
        chosen = [(self.prompts[i // self.per_prompt], i % self.per_prompt) for i in clips]
        noise = torch.stack([seeded_noise(shape, self.seed, p.id, s) for p, s in chosen])
        condition = Condition.cat([p.condition for p, _ in chosen]).with_guidance(guidance)
        start = _now(device)
        latents = sample(
            model, condition, noise.to(device), contender.times, monitor, solver=solver,
            seed=self.seed,
        )  # fmt: skip
        seconds = _now(device) - start
        return spec.crop(latents, self.plan.frames).cpu(), seconds

    def _figures(
        self,
        latents: Tensor,
        frames: Tensor,
        clips: list[int],
        reference: tuple[Tensor, Tensor] | None = None,
    ) -> Measured:
        """The figures of one batch."""
        values = {
            "sharpness": metrics.edge_sharpness(frames),
            "detail": metrics.detail_contrast(frames),
            "motion_energy": metrics.motion_energy(frames),
        }
        if reference is not None:
            eight_bit = (frames * 255).round()
            values["psnr"] = metrics.psnr(eight_bit / 255, reference[0].float() / 255)
            values["latent_mse"] = metrics.latent_mse(latents, reference[1])
        features = None
        if self.judge is not None:
            hits, features = self.judge.judge(frames, clips)
            values.update(hits)
        # One generator a clip, so that no figure depends on the batch size.
        generators = [key_generator(self.seed, "patches", clip) for clip in clips]
        patches = [metrics.patches(x[None], g) for x, g in zip(frames, generators, strict=True)]
        first = [i for i, clip in enumerate(clips) if clip % self.per_prompt == 0]
        keep = [i for i in first if clips[i] // self.per_prompt < self.shown]
        return Measured("", None, values, latents, torch.stack(patches), features, frames[keep])

    def _join(
        self, name: str, steps: int | None, parts: list[Measured], seconds: float | None = None
    ) -> Measured:
        def cat(values: Sequence[Tensor | None]) -> Tensor | None:
            present = [value for value in values if value is not None]
            return torch.cat(present) if present else None

        clips = {key: torch.cat([part.clips[key] for part in parts]) for key in parts[0].clips}
        return Measured(
            name,
            steps,
            clips,
            torch.cat([part.latents for part in parts]),
            torch.cat([part.patches for part in parts]),
            cat([part.features for part in parts]),
            cat([part.shown for part in parts]),
            seconds,
        )


def _with_reference(
    teacher: VideoModel | Guided, family: Family, contenders: Sequence[Contender], plan: SamplePlan
) -> list[Contender]:
    """The contenders with the teacher on its own grid in front."""
    grid = family.time_grid(size=(plan.height, plan.width))
    for i, one in enumerate(contenders):
        if one.model is teacher and one.times == grid:
            return [one, *contenders[:i], *contenders[i + 1 :]]
    return [Contender(f"teacher@{len(grid) - 1}", teacher, grid), *contenders]


def _default_plan(contenders: Sequence[Contender], judge: Judge | None) -> SamplePlan:
    for contender in contenders:
        if isinstance(contender.model, Student):
            info = contender.model.info
            return SamplePlan(info.frames, info.height, info.width)
    if judge is None:
        raise AccVideoError(
            "the size of the clips is not known without a student; give frames, height and width"
        )
    return judge.plan


def _check(
    contenders: Sequence[Contender], prompts: Sequence[Prompt], per_prompt: int, batch_size: int
) -> None:
    if not prompts:
        raise AccVideoError("the list of prompts is empty; give at least one to compare on")
    names = [REAL, REAL_VAE, *(contender.name for contender in contenders)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise AccVideoError(f"the name {twice[0]!r} is taken; give every contender its own")
    for name, value in (("samples_per_prompt", per_prompt), ("batch_size", batch_size)):
        if value < 1:
            raise AccVideoError(f"{name} is {value}; it must be at least 1")


def _now(device: torch.device) -> float:
    """Seconds, after the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

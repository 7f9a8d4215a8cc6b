"""One clip from the prompt to the file, with a mark wherever something else begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..conditioning import Prompt
from ..flow import Times
from ..models.experts import networks_of
from ..models.footprint import free_memory, tensor_bytes
from ..models.loading import Teacher
from ..models.video_model import Family, VideoModel
from ..monitor import Monitor, Progress
from ..sampling import HasVelocity, SamplePlan, sample
from ..video import write_video
from .timeline import Mark, Span, Timeline, Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A clip to sample, and how."""

    model: HasVelocity
    """The teacher's network, under guidance or not, or a student."""
    times: Times
    encode: Callable[[Teacher], Prompt]
    """Makes the prompt. What else it has the text encoders do is on their clock too."""
    plan: SamplePlan
    guidance: float | None = None
    solver: str = "euler"
    seed: int = 0
    fps: float = 8


def video_model(model: Any) -> VideoModel:
    """That of a student or of a model under guidance."""
    return model if isinstance(model, VideoModel) else model.model


class Run:
    """Samples one clip, stage by stage; `spans` and the watch's calls say what happened when.

    What lies between the stages is no part of the run.
    """

    def __init__(self, teacher: Teacher, job: Job, out: Path | None, monitor: Monitor) -> None:
        self.job, self.out, self.monitor = job, out, monitor
        self.teacher, self.spec = teacher, teacher.model.latent_spec
        self.device = teacher.compute_device
        self.timeline = Timeline(self.device)
        self.watch = Watch(self.timeline)
        self.stages: list[Span] = []
        self.spans: dict[str, list[Span]] = {}
        self.steps: list[Mark] = []
        """Beginnings of the steps, and the last one's end."""
        self.uploaded = 0
        """Bytes of noise and condition."""

    def encode(self) -> None:
        """The first stage: the prompt."""
        model = self.teacher.model
        own = replace(self.teacher, model=replace(model, family=self._watched(model.family)))
        with self._stage("prompt"):
            self.prompt = self.job.encode(own)
        # Text encoders that were loaded for it stay.
        self.teacher = replace(own, model=model)

    @contextmanager
    def fast(self, speed: AbstractContextManager[Any]) -> Iterator[HasVelocity]:
        """Enter `speed`, which may give the model to ask; entering it is a stage."""
        with ExitStack() as stack:
            with self._stage("preparation"):
                given = stack.enter_context(speed)
            yield self.job.model if given is None else given

    def sample(self, model: HasVelocity) -> None:
        """The stage of the steps."""
        job, networks = self.job, networks_of(video_model(model).module)
        with self._stage("sampling"), self.watch.on(networks):
            mark = self.timeline.mark()
            noise = job.plan.noise(self.spec, [self.prompt], job.seed)
            mark = self._span("noise", mark)
            condition = self.prompt.condition.with_guidance(job.guidance)
            condition = condition.to(self.device, self.teacher.model.dtype)
            noise = noise.to(self.device)
            self.uploaded = tensor_bytes([noise, *condition.tensors().values()])
            self.steps = [self._span("upload", mark)]
            given = {"solver": job.solver, "seed": job.seed}
            self.latents = sample(model, condition, noise, job.times, self._stepped, **given)
            self._span("steps", self.steps[0])

    def decode(self) -> None:
        """The stages of frames and file, where there is a VAE."""
        if self.teacher.vae_path is None:
            return
        vae = self.teacher.vae  # loaded when it is first asked for
        with self._stage("decoding"), self.watch.on(_inner(vae)):
            latents = self.spec.crop(self.latents, self.job.plan.frames)
            frames = vae.decode_bytes(latents, free_memory(self.device))
        if self.out is not None:
            with self._stage("writing"):
                write_video(self.out, frames[0], self.job.fps)

    def at(self, mark: Mark) -> float:
        """Seconds from the beginning of the first stage, what lies between stages left out."""
        before = 0.0
        for stage in self.stages:
            if mark <= stage.end:
                return before + max(0.0, self.timeline.seconds(stage.start, mark))
            before += self.timeline.seconds(stage.start, stage.end)
        return before

    def _stepped(self, progress: Progress) -> None:
        self.steps.append(self.timeline.mark())
        self.monitor(progress)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = self.timeline.mark()
        yield
        self._span(name, start)
        self.stages += self.spans[name][-1:]

    def _watched(self, family: Family) -> Family:
        """`family`, whose encoders' calls are noted."""
        changed = {
            name: self._around(encode)
            for name in ("encode", "encode_image")
            if (encode := getattr(family, name)) is not None
        }
        return replace(family, **changed)

    def _around(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        def watched(pipeline: Any, *args: Any) -> Any:
            modules = {n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module)}
            for each in args:
                modules |= _inner(each)
            mark = self.timeline.mark()
            with self.watch.on(modules):
                result = encode(pipeline, *args)
            self._span("encoding", mark)
            return result

        return watched

    def _span(self, name: str, start: Mark) -> Mark:
        span = Span(name, start, self.timeline.mark())
        self.spans.setdefault(name, []).append(span)
        return span.end


def _inner(vae: Any) -> Mapping[str, nn.Module]:
    """Parts of a VAE, which is itself not called but asked to encode or decode."""
    module = getattr(vae, "module", None)
    return dict(module.named_children()) if isinstance(module, nn.Module) else {}

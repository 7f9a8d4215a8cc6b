"""One clip from the prompt to the file, with a mark wherever something else begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..conditioning import Prompt
from ..flow import Times
from ..models.experts import networks_of
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
    """Samples one clip; `spans` and `calls` say what happened when."""

    def __init__(
        self, teacher: Teacher, family: Family, job: Job, out: Path | None, monitor: Monitor
    ) -> None:
        """
        Args:
            teacher: the caller's own; the family of its model is replaced by one that is watched.
            family: what is watched.
        """
        self.job, self.out, self.monitor = job, out, monitor
        self.teacher, self.spec = teacher, teacher.model.latent_spec
        teacher.model = replace(teacher.model, family=self._watched(family))
        self.timeline = Timeline(teacher.model.device)
        self.watch = Watch(self.timeline)
        self.spans: dict[str, list[Span]] = {}
        self.steps: list[Mark] = []
        """Beginnings of the steps, and the last one's end."""
        self.uploaded = 0
        """Bytes of noise and conditions."""

    def go(self) -> None:
        """Do everything, and wait for the device at the end alone."""
        job, model = self.job, video_model(self.job.model)
        begin = self.timeline.mark()
        prompt = job.encode(self.teacher)
        mark = self._span("prompt", begin)
        noise = job.plan.noise(self.spec, [prompt], job.seed)
        mark = self._span("noise", mark)
        condition = prompt.condition.with_guidance(job.guidance).to(model.device, model.dtype)
        noise = noise.to(model.device)
        self.uploaded = _size(noise, *condition.tensors().values())
        self.steps = [self._span("upload", mark)]
        with self.watch.on(networks_of(model.module)):
            latents = sample(
                job.model,
                condition,
                noise,
                job.times,
                self._stepped,
                solver=job.solver,
                seed=job.seed,
            )
        self._span("sampling", self.steps[0])
        if self.teacher.vae_path is not None:
            self._finish(latents)
        self.end = self.timeline.mark()
        self.timeline.wait()

    def _stepped(self, progress: Progress) -> None:
        self.steps.append(self.timeline.mark())
        self.monitor(progress)

    def _finish(self, latents: Tensor) -> None:
        """Decode and write."""
        vae = self.teacher.vae
        mark = self.timeline.mark()  # a VAE is loaded when it is first asked for
        with self.watch.on(_inner(vae)):
            frames = vae.decode(self.spec.crop(latents, self.job.plan.frames))
        mark = self._span("decoding", mark)
        if self.out is not None:
            write_video(self.out, frames[0], self.job.fps)
            self._span("writing", mark)

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


def _size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)

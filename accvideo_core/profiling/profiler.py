"""Sampling one clip with a clock in hand.

Every stage is done twice: once for what is paid once, such as loading text encoders, compiling and
choosing kernels, with one step of each network in place of all; and once on the clock. Nothing in
the models changes but for hooks that are gone at the end, and nothing waits for the device
meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..flow import Times
from ..models.loading import Teacher
from ..monitor import Monitor, silent
from .counting import Call, Cost, Counter, total
from .peaks import measure_peaks
from .report import Part, Profile
from .run import Job, Run, video_model
from .timeline import Mark, Span


def profile(
    teacher: Teacher,
    job: Job,
    speed: AbstractContextManager[Any] | None = None,
    out: Path | None = None,
    monitor: Monitor = silent,
) -> Profile:
    """Sample a clip and say where the time went.

    Args:
        teacher: with text encoders where `job.encode` needs them; without VAE nothing is decoded.
        speed: what makes sampling faster, entered around it; it may give the model that is then
            asked in the job's place.
        out: video file to write; None leaves that out.
        monitor: called after every step on the clock; may raise.
    """
    trial = Run(teacher, replace(job, times=_few(job)), out, silent)
    device, dtype = trial.device, teacher.model.dtype
    peaks = measure_peaks(device, dtype)
    trial.encode()
    run = Run(trial.teacher, job, out, monitor)
    _forget_memory(device)
    run.encode()
    with run.fast(nullcontext() if speed is None else speed) as asked:
        memory = _most_memory(device)
        trial.sample(asked)
        _forget_memory(device)
        run.sample(asked)
        memory = max(memory, _most_memory(device))
    trial.decode()
    run.teacher = trial.teacher
    _forget_memory(device)
    run.decode()
    run.timeline.wait()
    counter = Counter()
    parts = list(_Parts(run, counter).all())
    plan, steps = job.plan, len(job.times) - 1
    undecoded = "there is no VAE, so nothing was decoded or written"
    return Profile(
        what=f"{teacher.model.source}, {plan.frames} x {plan.height} x {plan.width}, "
        f"{steps} step{'s' * (steps > 1)}",
        parts=tuple(sorted(parts, key=lambda part: part.start)),
        seconds=_length(run),
        warm_up=_length(trial),
        memory=max(memory, _most_memory(device)),
        peaks=peaks,
        notes=(*([] if teacher.vae_path else [undecoded]), *counter.faults),
    )


def _length(run: Run) -> float:
    return sum(run.timeline.seconds(stage.start, stage.end) for stage in run.stages)


def _forget_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _most_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _few(job: Job) -> Times:
    """Times of one step by each of the networks that `job.times` asks."""
    boundary = video_model(job.model).family.boundary
    first, last = job.times[0], job.times[-1]
    low = [t for t in job.times[1:-1] if t < boundary <= first]
    return (first, *low[:1], last)


class _Parts:
    """What the marks of a run mean."""

    def __init__(self, run: Run, counter: Counter) -> None:
        self.run, self.counter = run, counter
        self.on_host = run.device.type == "cpu"

    def all(self) -> Iterator[Part]:
        yield from self._text()
        yield self._part("transfers", "preparation", self._spans("preparation"))
        yield self._part("solver", "noise", self._spans("noise"))
        if not self.on_host:
            moved = Cost(bytes=self.run.uploaded)
            upload = self._spans("upload")
            yield self._part("transfers", "noise and prompt to the device", upload, moved)
        yield from self._steps()
        yield from self._with_calls("VAE", "decoding", "VAE ", "tiles, and frames to main memory")
        if writing := self._spans("writing"):
            yield self._part("writing", "video file", writing)

    def _text(self) -> Iterator[Part]:
        """The encoders' calls; the tokenizers; and what lies between the encodings."""
        yield from self._with_calls("text", "encoding", "", "tokens")
        prompt, encodings = self._spans("prompt"), self._spans("encoding")
        group = "text" if self.on_host else "transfers"
        name = "prompts" if self.on_host else "text encoders to the device and back"
        rest = self._seconds(prompt) - self._seconds(encodings)
        yield Part(group, name, self.run.at(prompt[0].start), rest)

    def _steps(self) -> Iterator[Part]:
        run = self.run
        for step, (start, end) in enumerate(pairwise(run.steps), start=1):
            place = {"step": step, "time": run.job.times[step - 1]}
            calls = self._calls(start, end)
            for number, span in enumerate(calls):
                name = _asked(span, number, len(calls))
                yield self._part("network", name, [span], self._cost([span]), **place)
            rest = run.timeline.seconds(start, end) - self._seconds(calls)
            begun = run.at(calls[-1].end if calls else start)
            yield Part("solver", "solver", begun, rest, **place)
        (steps,) = self._spans("steps")
        yield self._part("solver", "check", [Span("", run.steps[-1], steps.end)])

    def _with_calls(self, group: str, name: str, prefix: str, rest: str) -> Iterator[Part]:
        """The calls of modules within the spans called `name`, by module, and the rest of these."""
        spans = self._spans(name)
        inside = [call for span in spans for call in self._calls(span.start, span.end)]
        for module in dict.fromkeys(call.name for call in inside):
            own = [call for call in inside if call.name == module]
            yield self._part(group, prefix + module, own, self._cost(own))
        if spans:
            seconds = self._seconds(spans) - self._seconds(inside)
            yield Part(group, rest, self.run.at((inside or spans)[-1].end), seconds)

    def _spans(self, name: str) -> list[Span]:
        return self.run.spans.get(name, [])

    def _calls(self, start: Mark, end: Mark) -> list[Span]:
        return [span for span in self.run.watch.spans if start <= span.start < end]

    def _cost(self, spans: Iterable[Span]) -> Cost | None:
        return total([self.counter.cost(span.call) for span in spans if span.call is not None])

    def _seconds(self, spans: Iterable[Span]) -> float:
        return sum(self.run.timeline.seconds(span.start, span.end) for span in spans)

    def _part(
        self, group: str, name: str, spans: list[Span], cost: Cost | None = None, **place: Any
    ) -> Part:
        amounts = {} if cost is None else {"flops": float(cost.flops), "bytes": float(cost.bytes)}
        return Part(
            group, name, self.run.at(spans[0].start), self._seconds(spans), **amounts, **place
        )


def _asked(span: Span, number: int, calls: int) -> str:
    """Which network a call asked, and about what."""
    batch = 1 if span.call is None else _batch(span.call)
    about = "both halves" if batch > 1 else ("prompt", "negative")[number] if calls == 2 else ""
    expert = f"{span.name} noise" if span.name else ""
    return " ".join(word for word in (expert, about) if word) or "network"


def _batch(call: Call) -> int:
    """Samples that a network is called with: of its first argument of five axes, the latents."""
    shapes = [x.shape for x in call.leaves if hasattr(x, "shape")]
    return next((shape[0] for shape in shapes if len(shape) == 5), 1)

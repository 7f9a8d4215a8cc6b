"""Marks on a device's own clock, and calls of modules between them.

On CUDA a mark is an event on the current stream, so that marking makes nobody wait; the clock is
read after one synchronisation at the end. Time in which the device waits for the host lies between
the same marks as the host's work. Elsewhere computation is over when a call returns, and a mark is
the host's clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .counting import Call

Mark = int


class Timeline:
    """Marks in the order in which they were made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> Mark:
        """Here and now, as the device sees it."""
        self._marks.append(self._now())
        return len(self._marks) - 1

    def _now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        if self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def wait(self) -> None:
        """Until everything that was marked has happened."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, start: Mark, end: Mark) -> float:
        """Between two marks; after `wait`."""
        a, b = self._marks[start], self._marks[end]
        return a.elapsed_time(b) / 1000 if self.device.type == "cuda" else b - a


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time; of a module's call where `call` says which."""

    name: str
    start: Mark
    end: Mark
    call: Call | None = None


class Watch:
    """Notes calls of modules; of one that is called by another only the outer call."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.spans: list[Span] = []
        self._open: list[tuple[Mark, Call]] = []
        """The outer call, and an entry for each within it."""

    @contextmanager
    def on(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, calls of `modules` are noted under their names."""
        with ExitStack() as stack:
            for name, module in modules.items():
                enter, leave = self._hooks(name, module)
                before = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
                after = module.register_forward_hook(leave, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def _hooks(self, name: str, module: nn.Module) -> tuple[Callable[..., None], ...]:
        """What to call before and after `module`; copies of it inherit these, and are not noted."""

        def enter(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if called is not module:
                return
            inner = self._open[:1]
            self._open += inner or [(self.timeline.mark(), Call.of(module, args, kwargs))]

        def leave(called: nn.Module, *_: Any) -> None:
            if called is not module:
                return
            start, call = self._open.pop()
            if not self._open:
                self.spans.append(Span(name, start, self.timeline.mark(), call))

        return enter, leave

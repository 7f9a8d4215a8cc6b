"""Monitor: how long work talks to its caller, whoever that is.

The core calls a monitor at every step and never knows who listens: a terminal, a ComfyUI node, a
test. A monitor cancels the work by raising; whoever called the core sees that exception, and the
work on disk stays resumable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of long work: `step` of `total` in `stage` ("record", "distill", "sample", ...).

    `metrics` are the step's figures (loss, ...). `preview`, when set, makes an estimate of the
    clean latents [B, C, T, H, W] in model space; call it only when a picture is wanted. `notes` are
    sentences that should be shown, each told once. `picture` is the file of the last picture that
    the work has made of itself.
    """

    stage: str
    step: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    preview: Callable[[], Tensor] | None = None
    notes: tuple[str, ...] = ()
    picture: Path | None = None


Monitor = Callable[[Progress], None]


class Cancelled(Exception):
    """A monitor of the terminal or of a test raises this to stop; ComfyUI raises its own."""


class Held:
    """A monitor whose wish to stop is kept until the work asks for it."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.stop: BaseException | None = None
        """What the monitor raised first."""

    def __call__(self, progress: Progress) -> None:
        try:
            self.monitor(progress)
        except BaseException as stop:
            self.stop = self.stop or stop


def silent(progress: Progress) -> None:
    """The monitor that listens to nothing."""


def together(*monitors: Monitor) -> Monitor:
    """A monitor that calls `monitors` in order; those after one that raises hear nothing."""

    def call(progress: Progress) -> None:
        for monitor in monitors:
            monitor(progress)

    return call

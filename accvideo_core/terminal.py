"""The terminal's Monitor: one line that updates itself, and Ctrl-C as a clean cancel."""

from __future__ import annotations

import shutil
import signal
import time
from types import FrameType
from typing import Any, TextIO

from .monitor import Cancelled, Progress

_QUIET_SECONDS = 10.0
"""How often a line is written where there is no terminal to redraw it on."""


class Terminal:
    """Shows progress on `stream`; use as a context manager around the work.

    Inside the `with` block Ctrl-C stops the work at its next step, where everything done is on the
    disk; a second Ctrl-C stops it at once.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.live = stream.isatty()
        self.stage = ""
        self.stopping = False
        self._started = self._written = 0.0
        self._first = 0
        self._last = ""
        self._handler: Any = None

    def __enter__(self) -> Terminal:
        try:
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        except ValueError:  # not in the main thread, where no signal arrives either
            self._handler = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        self.finish()

    def __call__(self, progress: Progress) -> None:
        """The Monitor itself."""
        now = time.monotonic()
        if progress.stage != self.stage:
            self.finish()
            self.stage, self._first = progress.stage, progress.step
            self._started, self._written = now, now - (_QUIET_SECONDS if self.live else 0)
        self._last = line(progress, now - self._started, progress.step - self._first)
        if self.live and now - self._written > 0.1:
            self._write(f"\r\033[K{self._last[: shutil.get_terminal_size().columns - 1]}")
            self._written = now
        elif not self.live and now - self._written >= _QUIET_SECONDS:
            self._write(self._last + "\n")
            self._written, self._last = now, ""
        for note in progress.notes:
            self.say(note)
        if self.stopping:
            raise Cancelled

    def finish(self) -> None:
        """Leave the last state of the running stage on a line of its own."""
        if self._last:
            self._write(f"\r\033[K{self._last}\n" if self.live else f"{self._last}\n")
        self.stage = self._last = ""

    def say(self, text: str) -> None:
        """A line of its own above the progress."""
        self.finish()
        self._write(text + "\n")

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self._write("\nstopping after this step; press Ctrl-C again to stop at once\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def line(progress: Progress, seconds: float, steps: int, width: int = 24) -> str:
    """`stage  [###---]  step/total  figures  elapsed, ETA`.

    Args:
        seconds: since the stage was first seen.
        steps: done in those seconds; a resumed stage does not start at 0.
    """
    total = max(progress.total, 1)
    filled = min(width, width * progress.step // total)
    bar = "#" * filled + "-" * (width - filled)
    names = ("loss", "records_done", "records_per_hour", "workers")
    shown = [name for name in names if name in progress.metrics]
    figures = [f"{name.replace('_', ' ')} {_figure(progress.metrics[name])}" for name in shown]
    left = progress.total - progress.step
    eta = f", {duration(seconds * left / steps)} left" if steps > 0 and left > 0 else ""
    parts = [progress.stage, f"[{bar}]", f"{progress.step}/{progress.total}", *figures]
    return "  ".join([*parts, f"{duration(seconds)}{eta}"])


def _figure(value: float) -> str:
    """Four digits, or all of a large number's."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds for people: 42s, 3m05s, 2h07m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole // 60 % 60:02d}m"

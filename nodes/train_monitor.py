"""A training node's Monitor: beside words and progress it draws the loss curve and a sample."""

from __future__ import annotations

import html
import io
import time
from pathlib import Path

from PIL import Image

from ..accvideo_core.evaluate.curve import LossCurve
from ..accvideo_core.evaluate.pictures import Line, panels
from ..accvideo_core.files import write_bytes
from ..accvideo_core.monitor import Progress
from . import live, paths
from .monitor import PICTURE_SECONDS, NodeMonitor, Picture, Preview

EVENT_SECONDS = 0.5
SIZE = 640
"""Pixels of the longer side of what the node shows: a curve above a sample."""


TRAINING, LOOKING = "distill", "look"
"""Stages of a run."""


class TrainMonitor(NodeMonitor):
    """Reports a run to the node's preview and to the page.

    The sample is the last picture that the run itself leaves in its folder (`Progress.picture`);
    until there is one, a preview of teacher and student.
    """

    def __init__(self, run: str, preview: Preview | None = None):
        super().__init__(preview)
        self._run, self._folder = run, paths.run_folder(run)
        self._curve = LossCurve.of_run(self._folder)
        self._sample = live.last_sample(self._folder)
        self._notes: tuple[str, ...] = ()
        self._total = 0
        self._next_event = self._next_curve = float("-inf")

    def __call__(self, progress: Progress) -> None:
        last = progress.step >= progress.total
        if progress.stage == TRAINING:
            self._total = progress.total
            self._curve.add(progress.step, progress.metrics)
        if progress.picture is not None:
            self._sample, self._preview = progress.picture, None
        if progress.notes or (last and progress.stage == LOOKING):
            # What a look says holds until the next one; a resumed run does not say it again.
            self._notes = progress.notes or live.last_notes(self._folder)
        super().__call__(progress)
        now = time.monotonic()
        if self._node is not None and (now >= self._next_event or last):
            self._next_event = now + EVENT_SECONDS
            more = {"total": self._total, "notes": self._notes}
            live.tell(self._node, live.state(self._run, self._curve, self._sample, **more))

    def _words(self, progress: Progress, seconds: float, done: int) -> str:
        # The page takes it for HTML.
        notes = [html.escape(note, quote=False) for note in self._notes]
        return "\n".join([super()._words(progress, seconds, done), *notes])

    def _picture(self, progress: Progress, now: float) -> Picture | None:
        made = super()._picture(progress, now) if progress.stage == TRAINING else None
        if made is not None:
            self._sample = _saved(made[1], self._folder / live.PREVIEW)
        if now < self._next_curve or live.page_draws():
            return None
        self._next_curve = now + PICTURE_SECONDS
        lines = self._curve.lines(live.POINTS)
        return ("JPEG", stacked(self._run, lines, self._sample), SIZE) if lines else None


def stacked(run: str, lines: dict[str, Line], sample: Path | None) -> Image.Image:
    """The curve of a run, and below it its last sample, as wide as the curve."""
    curve = panels({f"{run}: loss by step": lines}, list(lines))
    if sample is None:
        return curve
    with Image.open(sample) as picture:
        height = round(picture.height * curve.width / picture.width)
        fitted = picture.convert("RGB").resize((curve.width, height), Image.Resampling.LANCZOS)
    both = Image.new("RGB", (curve.width, curve.height + height), "white")
    both.paste(curve, (0, 0))
    both.paste(fitted, (0, curve.height))
    return both


def _saved(picture: Image.Image, path: Path) -> Path:
    data = io.BytesIO()
    picture.save(data, "PNG")
    write_bytes(path, data.getvalue())
    return path

"""ComfyUI's side of a Monitor: progress bar, a line of text on the node, pictures, cancel."""

from __future__ import annotations

import time
from collections.abc import Callable

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ..accvideo_core.monitor import Progress

Preview = Callable[[Tensor], Image.Image]
"""Makes a picture of latents [B, C, T, H, W] in model space."""

Picture = tuple[str, Image.Image, int]
"""(format, picture, pixels of its longer side) as ComfyUI's progress bar takes it."""

TEXT_SECONDS = 0.5
PICTURE_SECONDS = 2.0
PICTURE_SHARE = 0.05
"""Largest part of the time that may go into pictures."""

PICTURE_SIZE = 512


class NodeMonitor:
    """Reports to whoever watches the running node, and raises when it is cancelled.

    Works without a client, and never reports more often than a person can read.
    """

    def __init__(self, preview: Preview | None = None):
        context = get_executing_context()
        self._node = context.node_id if context else None
        self._preview = preview
        self._next_picture = self._told = float("-inf")
        self._task: tuple[str, int] | None = None
        # When each task began and at which step; one that is begun anew counts from there.
        self._began: dict[tuple[str, int], tuple[float, int]] = {}

    def __call__(self, progress: Progress) -> None:
        # Every step, because ComfyUI's own progress bar checks only when it redraws itself.
        comfy.model_management.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        task = (progress.stage, progress.total)
        if self._task != task:
            self._task = task
            self._bar = comfy.utils.ProgressBar(progress.total, node_id=self._node)
        if progress.step <= self._began.get(task, (now, progress.step))[1]:
            self._began[task] = now, progress.step
        start, first = self._began[task]
        self._bar.update_absolute(progress.step, preview=self._picture(progress, now))
        if now - self._told >= TEXT_SECONDS or progress.step >= progress.total:
            self._told = now
            self.tell(self._words(progress, now - start, progress.step - first))

    def _words(self, progress: Progress, seconds: float, done: int) -> str:
        return describe(progress, seconds, done)

    def _picture(self, progress: Progress, now: float) -> Picture | None:
        if not (self._preview and progress.preview) or now < self._next_picture:
            return None
        picture = self._preview(progress.preview())
        done = time.monotonic()
        self._next_picture = done + max(PICTURE_SECONDS, (done - now) / PICTURE_SHARE)
        return "JPEG", picture, PICTURE_SIZE

    def tell(self, text: str) -> None:
        """A line of text on the running node, for whoever watches it."""
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None and self._node is not None:
            server.send_progress_text(text, self._node, server.client_id)


def describe(progress: Progress, seconds: float, done: int) -> str:
    """`distill 240/1000, loss 0.031, 4.1 s/step, 52 min left`, after `done` steps in `seconds`."""
    parts = [f"{progress.stage} {progress.step}/{progress.total}"]
    parts += [f"{name} {value:.4g}" for name, value in progress.metrics.items() if "loss" in name]
    skipped = progress.metrics.get("records_skipped", 0)
    parts += [f"{skipped:.0f} left out"] if skipped else []
    if done > 0:
        pace = seconds / done
        left = pace * max(0, progress.total - progress.step)
        parts.append(f"{pace:.2g} s/step")
        parts.append(f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left")
    return ", ".join(parts)

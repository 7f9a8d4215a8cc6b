"""Cutting clips out of videos: which frames, by the times at which they are shown.

A clip's frame i is what the video shows i / rate seconds after the clip begins; clip k begins k
spacings after the video. So a clip follows from its video and its number alone, and videos of
changing rate give clips of a steady one.

Shapes: F frames of a clip, H, W pixels, 3 colours in [0, 1].
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AccVideoError
from ..images import fitted
from ..video_reading import ROUNDING, BrokenVideo, TimedFrame, Timing, timed_frames


@dataclass(frozen=True, slots=True)
class Cutting:
    """How clips are cut from videos."""

    fps: float | None = None
    """Frames a second that are taken; None is each video's own rate, its mean."""
    stride: int = 1
    """Every so many of those are taken."""
    spacing: float | None = None
    """Seconds from the beginning of one clip to that of the next; None lets them follow one
    another without a gap."""

    def __post_init__(self) -> None:
        for name in ("fps", "spacing"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise AccVideoError(f"{name} is {value}; it must be a positive number")
        if self.stride < 1:
            raise AccVideoError(f"stride is {self.stride}; it must be at least 1")

    def __str__(self) -> str:
        frames = "frames at their own rate" if self.fps is None else f"{self.fps:g} frames a second"
        stride = f", 1 in {self.stride} of them" if self.stride > 1 else ""
        spacing = "one after another" if self.spacing is None else f"every {self.spacing:g} s"
        return f"{frames}{stride}, clips {spacing}"

    def rate(self, timing: Timing) -> float:
        """Frames a second of the clips of a video."""
        return (self.fps or timing.rate) / self.stride

    def pace(self, timing: Timing, frames: int) -> float:
        """Seconds from the beginning of one clip of `frames` frames to that of the next."""
        return self.spacing or frames / self.rate(timing)

    def count(self, timing: Timing, frames: int) -> int:
        """How many whole clips of `frames` frames a video has."""
        slack = min(ROUNDING, 0.25 / timing.rate)
        span = (frames - 1) / self.rate(timing)
        # The last frame of a clip has to be on the screen, and not over, at its time.
        spare = timing.end - timing.first - span - slack
        return 0 if spare <= 0 else int(spare // self.pace(timing, frames)) + 1


def cut(
    path: Path,
    timing: Timing,
    how: Cutting,
    size: tuple[int, int, int],
    wanted: Collection[int],
) -> Iterator[tuple[int, Tensor]]:
    """(number, frames [F, H, W, 3]) of the clips `wanted` of a video, in the order they end.

    Every frame has the middle of the picture, brought to height and width; small pictures are
    enlarged. A frame of the video is read once, and nothing after the last one needed.

    Args:
        size: (frames, height, width) of a clip.

    Raises:
        BrokenVideo: the video breaks off before the last of these clips is whole.
    """
    if not wanted:
        return
    frames, height, width = size
    clips: dict[int, list[Tensor]] = {number: [] for number in wanted}
    rate, pace = how.rate(timing), how.pace(timing, frames)
    due = deque(
        sorted(
            (timing.first + number * pace + i / rate, number)
            for number in clips
            for i in range(frames)
        )
    )
    slack = min(ROUNDING, 0.25 / timing.rate)
    for shown, until in _with_end(timed_frames(path), 1 / timing.rate):
        picture = None
        while due and due[0][0] + slack < until:
            _, number = due.popleft()
            picture = fitted(shown.pixels(), height, width) if picture is None else picture
            clips[number].append(picture)
            if len(clips[number]) == frames:
                yield number, torch.stack(clips.pop(number))
        if not due:
            return
    raise BrokenVideo(f"{path} ends earlier than its file says; write it again")


def _with_end(frames: Iterator[TimedFrame], last_for: float) -> Iterator[tuple[TimedFrame, float]]:
    """Every frame with the time at which it is gone; the last one stays `last_for` seconds."""
    shown = next(frames, None)
    for later in frames:
        assert shown is not None
        yield shown, later.time
        shown = later
    if shown is not None:
        yield shown, shown.time + last_for

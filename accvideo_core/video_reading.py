"""Videos of any origin: when each frame is shown, and its pixels upright and in full depth.

A video's frames are told apart by the times at which they are shown and never by their numbers, so
that a video of changing rate is read like any other. Times are seconds in the file's own clock.

Shapes: H, W pixels, 3 colours in [0, 1].
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import AccVideoError

ROUNDING = 0.002
"""Seconds that a time may be off: Matroska and others round times to a thousandth."""

# Files may name other files or addresses to read; none but files is ever followed.
_OPTIONS = {"protocol_whitelist": "file"}
_MATRIX = struct.Struct("<9i")
_ATTACHED_PICTURE = 0x400  # of FFmpeg's stream dispositions


class BrokenVideo(AccVideoError):
    """A file that is not a video, or one that cannot be read to its end."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When a video's frames are shown."""

    frames: int
    first: float
    """Time of its first frame."""
    last: float
    """Time of its last frame."""
    nominal: float
    """Frames a second as the file says, for a video of one frame."""

    @property
    def rate(self) -> float:
        """Frames a second, on the average."""
        span = self.last - self.first
        return (self.frames - 1) / span if span > 0 else self.nominal

    @property
    def end(self) -> float:
        """When its last frame is gone."""
        return self.last + 1 / self.rate


@dataclass(frozen=True, slots=True)
class Scan:
    """What a video is, without decoding more than its first frame."""

    timing: Timing
    height: int
    """Of the upright picture of square pixels."""
    width: int
    stated: int
    """Frames that the file says it has; 0 where it says nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class TimedFrame:
    """One frame of a video, its pixels not made yet."""

    time: float
    picture: Any
    """PyAV's frame."""
    ratio: float
    """Width of a pixel over its height."""

    def pixels(self) -> Tensor:
        """[H, W, 3] float32 in [0, 1], upright and of square pixels.

        More than 8 bits are kept; what is transparent is put on black.
        """
        parts = self.picture.format.components
        deep = max(part.bits for part in parts) > 8
        clear = self.picture.format.has_palette or any(part.is_alpha for part in parts)
        names = {False: ("rgb24", "rgba"), True: ("rgb48le", "rgba64le")}
        width = max(1, round(self.picture.width * self.ratio))
        raw = self.picture.reformat(width=width, format=names[deep][clear]).to_ndarray()
        x = torch.from_numpy(raw.astype(np.float32)) / (65535 if deep else 255)
        if clear:
            x = x[..., :3] * x[..., 3:]
        return _upright(x, self.picture)


@contextmanager
def opened_stream(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and the video stream of a file. Raises BrokenVideo where there is none."""
    import av

    if not path.is_file():
        raise BrokenVideo(f"there is no video file {path}; check the path")
    # By its whole path and as a file: no name is taken for an address or a pattern.
    with readable(path):
        container = av.open(f"file:{path.absolute()}", options=_OPTIONS)
    with container:
        # The picture on the cover of a piece of music is a stream too.
        streams = [s for s in container.streams.video if not _is_cover(s)]
        if not streams:
            raise BrokenVideo(f"{path} has no video stream; give a video file")
        yield container, streams[0]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """FFmpeg's errors as one sentence."""
    import av

    try:
        yield
    except (av.FFmpegError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BrokenVideo(f"{path} is not a video that can be read ({reason})") from error


def scan(path: Path) -> Scan:
    """What the video at `path` is, by its packets. Raises BrokenVideo when it has no frames."""
    with opened_stream(path) as (container, stream):
        nominal, stated = _nominal(stream), stream.frames
        with readable(path):
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            shown = (p.pts if p.pts is not None else p.dts for p in packets)
            found = [_time(container, stream, pts, i) for i, pts in enumerate(shown)]
    frames = timed_frames(path)
    first = next(frames, None)
    frames.close()
    if first is None or not found:
        raise BrokenVideo(f"{path} is a video without frames; write it again")
    height, width = first.pixels().shape[:2]
    return Scan(Timing(len(found), min(found), max(found), nominal), height, width, stated)


def timed_frames(path: Path) -> Generator[TimedFrame, None, None]:
    """Every frame, in the order they are shown, each decoded when it is asked for.

    Raises BrokenVideo where the video breaks off, or where a frame is shown before the one that
    goes before it.
    """
    import av

    with opened_stream(path) as (container, stream):
        last = None
        ratio = _pixel_ratio(stream)
        try:
            for number, picture in enumerate(container.decode(stream)):
                time = _time(container, stream, picture.pts, number)
                if last is not None and time < last - ROUNDING:
                    raise BrokenVideo(
                        f"{path} has frames whose times go backwards; convert it to MP4"
                    )
                last = time if last is None else max(time, last)
                yield TimedFrame(last, picture, ratio)
        except av.FFmpegError as error:
            where = "cannot be decoded" if last is None else f"is damaged after {last:.2f} s"
            raise BrokenVideo(f"{path} {where} ({error.strerror})") from error


def _upright(x: Tensor, picture: Any) -> Tensor:
    """`x` [H, W, 3] turned and mirrored as the file's display matrix says.

    The matrix takes (x, y) to (a x + c y, b x + d y); only quarter turns and mirrors are followed.
    """
    data = next((bytes(s) for s in picture.side_data if s.type.name == "DISPLAYMATRIX"), b"")
    if len(data) < _MATRIX.size:
        return x
    a, b, _, c, d = _MATRIX.unpack(data[: _MATRIX.size])[:5]
    if abs(b) > abs(a):
        x, a, d = x.transpose(0, 1), c, b
    flipped = [axis for axis, sign in ((0, d), (1, a)) if sign < 0]
    return x.flip(flipped).contiguous()


def _nominal(stream: Any) -> float:
    return float(stream.average_rate or stream.guessed_rate or 25)


def _pixel_ratio(stream: Any) -> float:
    """Width of a pixel over its height; 1 where that is not known or beyond belief."""
    ratio = float(stream.sample_aspect_ratio or 1)
    return ratio if 0.25 <= ratio <= 4 else 1.0


def _time(container: Any, stream: Any, pts: int | None, number: int) -> float:
    """When frame `number` is shown. AVI knows one rate and no times but those of storing."""
    if pts is None or container.format.name == "avi":
        return number / _nominal(stream)
    return float(pts * stream.time_base)


def _is_cover(stream: Any) -> bool:
    return bool(int(getattr(stream, "disposition", 0)) & _ATTACHED_PICTURE)

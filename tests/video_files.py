"""Video files of every kind for the tests, written with PyAV."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_UNIT = 65536  # of a display matrix' numbers
QUARTER = (0, _UNIT, 0, -_UNIT, 0, 0)
"""Display matrix of a phone held upright: what is shown is turned clockwise by a quarter."""
HALF = (-_UNIT, 0, 0, 0, -_UNIT, 0)
THREE_QUARTERS = (0, -_UNIT, 0, _UNIT, 0, 0)
MIRRORED = (-_UNIT, 0, 0, 0, _UNIT, 0)


def grey_clip(count: int, height: int = 16, width: int = 16) -> Tensor:
    """uint8 [count, H, W, 3] whose frame i is all of the value i."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, height, width, 3)


def write_frames(
    path: Path,
    frames: Tensor | np.ndarray,
    fps: float = 8,
    times: Sequence[float] | None = None,
    codec: str = "ffv1",
    pix_fmt: str = "bgr0",
    given: str = "rgb24",
    options: Mapping[str, str] | None = None,
    ratio: Fraction | None = None,
) -> Path:
    """Write frames (PyAV's format `given`), without loss unless `codec` says otherwise.

    `times` are those at which they are shown, in seconds; `ratio` is a pixel's width by its height.
    """
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(f"file:{path}", "w") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream: Any = container.add_stream(codec, rate=rate, options=dict(options or {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if ratio is not None:
            stream.codec_context.sample_aspect_ratio = ratio
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=given)
            if times is not None:
                picture.pts, picture.time_base = round(1000 * times[number]), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def write_h264(path: Path, frames: Tensor, fps: float = 8, first: bool = False) -> Path:
    """An ordinary MP4; with `first` its index comes first, so that a part of it can be read."""
    import av

    with av.open(
        f"file:{path}", "w", container_options={"movflags": "+faststart"} if first else {}
    ) as container:
        stream: Any = container.add_stream("libx264", rate=round(fps), options={"g": "10"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(pixels.contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """A file with sound alone."""
    import av

    with av.open(f"file:{path}", "w") as container:
        stream: Any = container.add_stream("aac", rate=44100)
        for number in range(8):
            silence = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.rate, frame.pts = 44100, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turned(path: Path, matrix: Sequence[int]) -> Path:
    """Give an MP4 a display matrix (its first six numbers)."""
    data = bytearray(path.read_bytes())
    header = data.find(b"tkhd") + 4
    start = header + (40 if data[header] == 0 else 52)
    struct.pack_into(">9i", data, start, *matrix, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path

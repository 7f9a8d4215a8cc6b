"""Reading and writing video files with PyAV.

Shapes: T frames, H, W pixels, 3 colours in [0, 1].
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import AccVideoError
from .files import write_bytes
from .video_reading import opened_stream, readable

# Visually lossless; small clips are a few kilobytes all the same.
_OPTIONS = {"crf": "12", "preset": "medium"}


def write_video(path: Path, frames: Tensor, fps: float, upscale: int = 1) -> Path:
    """Write an H.264 MP4 (yuv420p, so that every player and browser shows it).

    Args:
        path: the file; it appears whole or not at all.
        frames: [T, H, W, 3], clamped to [0, 1]; or uint8.
        fps: frames per second.
        upscale: every pixel becomes `upscale` x `upscale` pixels. An odd height or width then gets
            its last row or column twice, because yuv420p needs even sizes.
    """
    _check_fps(fps)
    write_bytes(Path(path), _encode(_pixels(frames, upscale), fps))
    return Path(path)


def write_lossless(path: Path, frames: Tensor, fps: float) -> Path:
    """Write a Matroska file (FFV1, RGB) whose pixels come back exactly, for data of few pixels.

    Args and errors are those of `write_video`.
    """
    _check_fps(fps)
    write_bytes(Path(path), _encode(_pixels(frames, 1), fps, "matroska", "ffv1", "bgr0", {}))
    return Path(path)


def read_video(path: Path) -> tuple[Tensor, float]:
    """Frames [T, H, W, 3] float32 in [0, 1] and frames per second of a video file.

    Raises:
        AccVideoError: the file is missing, or is not a video.
    """
    with opened_video(path) as (frames, fps):
        stacked = torch.stack(list(frames))
    return stacked.float() / 255, fps


@contextmanager
def opened_video(path: Path) -> Iterator[tuple[Iterator[Tensor], float]]:
    """Frames uint8 [H, W, 3] of a video file, each decoded when it is asked for, and its fps.

    Raises:
        AccVideoError: the file is missing or is not a video; or, once frames are asked for, it
            breaks off, has none, or changes its size.
    """
    with opened_stream(Path(path)) as (container, stream):
        yield _decoded(path, container.decode(stream)), float(stream.average_rate or 0)


def _decoded(path: Path, pictures: Iterable[Any]) -> Iterator[Tensor]:
    """The frames of a video that has some, all of one size."""
    size = None
    with readable(path):
        for picture in pictures:
            frame = torch.from_numpy(picture.to_ndarray(format="rgb24"))
            if size not in (None, frame.shape):
                raise AccVideoError(f"{path} changes its size between frames; write it again")
            size = frame.shape
            yield frame
    if size is None:
        raise AccVideoError(f"{path} is a video without frames; write it again")


def side_by_side(clips: Sequence[Tensor], gap: int = 2) -> Tensor:
    """Clips [T, H, W, 3] of one shape next to one another, `gap` white pixels between them."""
    if not clips or any(clip.shape != clips[0].shape for clip in clips):
        shapes = [tuple(clip.shape) for clip in clips]
        raise AccVideoError(f"clips of shape {shapes} cannot stand side by side; give equal shapes")
    most = 255 if clips[0].dtype == torch.uint8 else 1
    white = clips[0].new_full((*clips[0].shape[:2], gap, 3), most)
    parts = [part for clip in clips for part in (white, clip)][1:]
    return torch.cat(parts, dim=2)


def _pixels(frames: Tensor, upscale: int) -> Tensor:
    """uint8 [T, H, W, 3] of even size."""
    if frames.dim() != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise AccVideoError(
            f"frames have shape {tuple(frames.shape)}; a video is [T, H, W, 3], T >= 1"
        )
    if not torch.isfinite(frames).all():
        raise AccVideoError("frames hold NaN or infinite values; sample the clip again")
    if upscale < 1:
        raise AccVideoError(f"upscale is {upscale}, but it must be a whole number of at least 1")
    pixels = frames.detach().cpu()
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(upscale, 1).repeat_interleave(upscale, 2)
    for axis in (1, 2):
        if pixels.shape[axis] % 2:
            last = pixels.narrow(axis, pixels.shape[axis] - 1, 1)
            pixels = torch.cat([pixels, last], dim=axis)
    return pixels


def _check_fps(fps: float) -> None:
    if not fps > 0:
        raise AccVideoError(f"fps is {fps}, but a video needs a positive number of frames a second")


def _encode(
    pixels: Tensor,
    fps: float,
    container_format: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] = _OPTIONS,
) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=container_format) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream: Any = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = pix_fmt
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(picture.contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()

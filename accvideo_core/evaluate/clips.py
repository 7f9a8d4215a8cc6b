"""The videos that are evaluated: files of a folder, or frames in memory, a few frames at a time.

Shapes: T frames, H, W pixels, 3 colours in [0, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import AccVideoError
from ..files import disk_errors
from ..video import opened_video

SUFFIXES = (".mp4", ".webm", ".mov", ".m4v", ".mkv", ".avi", ".gif")

_AT_ONCE = 16
_PIXELS_AT_ONCE = 2**22
"""Frames are decoded and measured in chunks of at most so many pixels: 4 frames of 720p."""


class UnusableClip(AccVideoError):
    """One video cannot be measured; others can."""


class Clip(Protocol):
    """One video. What it raises for its own sake is an `UnusableClip`."""

    @property
    def name(self) -> str:
        """What it is matched by."""
        ...

    @property
    def path(self) -> Path | None:
        """Its file, where it has one."""
        ...

    def digest(self) -> str:
        """Hexadecimal digits that follow from its content."""
        ...

    def opened(self) -> AbstractContextManager[tuple[Iterator[Tensor], float]]:
        """Chunks of frames [<= 16, H, W, 3] float32, and frames per second."""
        ...


@dataclass(frozen=True)
class VideoFile:
    """A video on the disk, never wholly in memory."""

    path: Path
    name: str

    def digest(self) -> str:
        with _unusable():
            return file_digest(self.path)

    @contextmanager
    def opened(self) -> Iterator[tuple[Iterator[Tensor], float]]:
        with _unusable(), opened_video(self.path) as (frames, fps):
            yield _chunks(frames), fps


@dataclass(frozen=True, eq=False)
class Frames:
    """A video in memory."""

    frames: Tensor
    """[T, H, W, 3] in [0, 1]."""
    fps: float
    name: str
    path: None = field(default=None, init=False)

    def digest(self) -> str:
        raw = self.frames.detach().cpu().float().contiguous().numpy()
        told = f"{tuple(self.frames.shape)} {self.fps}".encode()
        return hashlib.sha256(told + raw.tobytes()).hexdigest()

    @contextmanager
    def opened(self) -> Iterator[tuple[Iterator[Tensor], float]]:
        yield _chunks(self.frames), self.fps


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with disk_errors("read", path), open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def clips_of(path: Path) -> list[VideoFile]:
    """The videos of a folder in the order of their names (its subfolders are not looked into), or
    the one at `path`.

    Raises:
        AccVideoError: there is nothing there, or two videos have the same name but for the suffix.
    """
    if path.is_file():
        return [VideoFile(path, path.stem)]
    if not path.is_dir():
        raise AccVideoError(f"there is no video or folder {path}; check the path")
    with disk_errors("read", path):
        files = sorted(
            file
            for file in path.iterdir()
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
        )
    if not files:
        raise AccVideoError(f"there are no videos in {path} ({' '.join(SUFFIXES)}); check the path")
    named: dict[str, Path] = {}
    for file in files:
        if file.stem in named:
            raise AccVideoError(
                f"{path} has both {named[file.stem].name} and {file.name}, and videos are matched "
                "by name; rename or remove one"
            )
        named[file.stem] = file
    return [VideoFile(file, name) for name, file in named.items()]


def clips_of_batch(frames: Tensor, fps: float, length: int = 0) -> list[Frames]:
    """Clips that follow one another in a batch of frames [N, H, W, 3], `length` frames each; 0 is
    all in one clip.

    Raises:
        AccVideoError: the frames are not a whole number of clips.
    """
    if frames.dim() != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise AccVideoError(
            f"the frames have shape {tuple(frames.shape)}; expected [frames, height, width, 3]"
        )
    length = length or len(frames)
    if len(frames) % length:
        raise AccVideoError(
            f"{len(frames)} frames are no whole number of clips of {length} frames; "
            "correct frames_per_clip"
        )
    parts = frames.split(length)
    return [Frames(part, fps, f"clip_{number:04d}") for number, part in enumerate(parts)]


@contextmanager
def _unusable() -> Iterator[None]:
    try:
        yield
    except AccVideoError as error:
        raise UnusableClip(str(error)) from error


def _chunks(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """Frames [H, W, 3] together, as many as `_PIXELS_AT_ONCE` allows, as numbers in [0, 1]."""
    held: list[Tensor] = []
    for frame in frames:
        held.append(frame)
        if len(held) >= min(_AT_ONCE, _PIXELS_AT_ONCE // frame[..., 0].numel()):
            yield _numbers(held)
            held = []
    if held:
        yield _numbers(held)


def _numbers(frames: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(frames))
    return stacked.float() / 255 if stacked.dtype == torch.uint8 else stacked.float()

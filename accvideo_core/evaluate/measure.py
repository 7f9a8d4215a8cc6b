"""Measuring videos and pairs of videos, each once: what was measured is kept by content.

Shapes: T frames, H, W pixels, 3 colours in [0, 1]; D features of I3D.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import read_safetensors, write_safetensors
from .clips import Clip
from .fvd import Detector
from .yardsticks import CLIP_YARDSTICKS, PairYardstick

_REVISION = 1
"""Of the figures of one video; another number, and everything is measured anew."""

_THUMB = 32
_THUMB_EVERY = 8


@dataclass(frozen=True, eq=False)
class ClipFigures:
    """What is kept of one video."""

    figures: dict[str, Tensor]
    """Yardstick -> its values along the video; empty where the video is shorter than its span."""
    thumbs: Tensor
    """Every 8th frame, averaged to 32 x 32, uint8 [T / 8, 32, 32, 3]: for diversity."""
    frames: int
    height: int
    width: int
    fps: float

    @property
    def size(self) -> str:
        """In words."""
        return f"{self.frames} frames of {self.height} x {self.width}"

    def mean(self, figure: str) -> float | None:
        values = self.figures[figure]
        return float(values.mean()) if len(values) else None


class Measured:
    """A folder of what was measured; work that was interrupted finds there what it has done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests: dict[Clip, str] = {}

    def digest(self, clip: Clip) -> str:
        """The clip's own, made once."""
        if clip not in self._digests:
            self._digests[clip] = clip.digest()
        return self._digests[clip]

    def clip(self, clip: Clip, device: str = "cpu") -> ClipFigures:
        """The figures of one video."""
        key = ("clip", str(_REVISION), self.digest(clip))
        tensors = self._kept(key, lambda: _measure_clip(clip, device))
        height, width, frames = map(int, tensors.pop("size"))
        fps, thumbs = float(tensors.pop("fps")), tensors.pop("thumbs")
        return ClipFigures(tensors, thumbs, frames, height, width, fps)

    def pair(
        self, a: Clip, b: Clip, yardsticks: Mapping[str, PairYardstick], device: str = "cpu"
    ) -> dict[str, Tensor]:
        """Yardstick -> its value for every frame [T]; what is new to the folder in one pass."""
        keys = {
            name: ("pair", name, one.key, self.digest(a), self.digest(b))
            for name, one in yardsticks.items()
        }
        new = {name: one for name, one in yardsticks.items() if not self._path(keys[name]).exists()}
        made = _measure_pair(a, b, new, device) if new else {}

        def values(name: str) -> Tensor:
            return self._kept(keys[name], lambda: {"values": made[name]})["values"]

        return {name: values(name) for name in yardsticks}

    def features(self, clip: Clip, detector: Detector) -> Tensor:
        """The features [D] that FVD compares."""
        key = ("fvd", detector.digest, self.digest(clip))
        return self._kept(key, lambda: {"features": detector.features(clip)})["features"]

    def _kept(
        self, key: tuple[str, ...], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        path = self._path(key)
        if not path.exists():
            write_safetensors(path, make())
        return read_safetensors(path)[0]

    def _path(self, key: tuple[str, ...]) -> Path:
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        return self.folder / f"{name}.safetensors"


@torch.no_grad()
def _measure_clip(clip: Clip, device: str) -> dict[str, Tensor]:
    values: dict[str, list[Tensor]] = {name: [] for name in CLIP_YARDSTICKS}
    thumbs, count, tail = [], 0, torch.empty(0)
    with clip.opened() as (chunks, fps):
        for chunk in chunks:
            frames = chunk.to(device)
            seen = torch.cat([tail, frames]) if count else frames
            for name, one in CLIP_YARDSTICKS.items():
                # As many frames again as windows of this span reach back.
                recent = seen[max(0, len(seen) - len(frames) - one.span + 1) :]
                if len(recent) >= one.span:
                    windows = recent.unfold(0, one.span, 1).movedim(-1, 1)
                    values[name].append(one.measure(windows).cpu())
            thumbs.append(_thumbs(frames[-count % _THUMB_EVERY :: _THUMB_EVERY]))
            count += len(frames)
            tail = seen[1 - max(one.span for one in CLIP_YARDSTICKS.values()) :]
    size = torch.tensor([*tail.shape[1:3], count])
    found = {name: torch.cat(x) if x else torch.empty(0) for name, x in values.items()}
    return {**found, "thumbs": torch.cat(thumbs), "size": size, "fps": torch.tensor([fps])}


def _thumbs(frames: Tensor) -> Tensor:
    small = F.adaptive_avg_pool2d(frames.movedim(-1, 1), _THUMB).movedim(1, -1)
    return (small * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def _measure_pair(
    a: Clip, b: Clip, yardsticks: Mapping[str, PairYardstick], device: str
) -> dict[str, Tensor]:
    values: dict[str, list[Tensor]] = {name: [] for name in yardsticks}
    with a.opened() as (ones, _), b.opened() as (others, _):
        for one, other in zip(ones, others, strict=True):
            chunks = one.to(device), other.to(device)
            for name, yardstick in yardsticks.items():
                values[name].append(yardstick.measure(*chunks).float().cpu())
    return {name: torch.cat(x) for name, x in values.items()}

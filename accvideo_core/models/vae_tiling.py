"""Tiling: the tiles that diffusers' VAEs decode one after the other where a video does not fit.

Neighbours overlap and are blended there. Fewer tiles are faster, because overlaps are decoded
twice, and show fewer seams. What a VAE class has to be told is an entry of a table.

Shapes: B batch, C channels, T latent frames, H, W latent size. All sizes here count latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

OVERLAP = 64
"""Pixels that neighbours share, as in diffusers' own tiles."""
SMALLEST = 64
"""Pixels from one tile to the next, at least: below, tiles see too little of the picture."""
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of tiles that are tried."""
SHORTEST = 3
"""Latent frames from one part of a clip to the next, at least; diffusers' own number."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Pieces of `size` along one axis, each `stride` after the one before."""

    size: int
    stride: int

    @classmethod
    def equal(cls, length: int, count: int, overlap: int) -> Cut:
        """`count` pieces of one size (the last may be smaller), or the whole."""
        stride = -(-length // count)
        return cls(length, length) if count == 1 else cls(min(length, stride + overlap), stride)

    def sizes(self, length: int) -> list[int]:
        """Of all the pieces."""
        return [min(self.size, length - start) for start in range(0, length, self.stride)]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How latents are cut. `t` is None where a clip is decoded in one part."""

    h: Cut
    w: Cut
    t: Cut | None = None

    def tiles(self, shape: tuple[int, ...]) -> int:
        """Of a picture of [.., H, W]; one where a tile is as large as that."""
        cuts = zip((self.h, self.w), shape[-2:], strict=True)
        return math.prod(1 if cut.size >= size else len(cut.sizes(size)) for cut, size in cuts)

    def work(self, shape: tuple[int, ...]) -> int:
        """Latents that are decoded for [.., T, H, W], overlaps counted each time."""
        frames, height, width = shape[-3:]
        parts = [frames] if self.t is None else self.t.sizes(frames)
        return sum(self.h.sizes(height)) * sum(self.w.sizes(width)) * sum(parts)


def whole(shape: tuple[int, ...]) -> Tiling:
    """No tiles at all."""
    return Tiling(Cut(shape[-2], shape[-2]), Cut(shape[-1], shape[-1]))


@dataclass(frozen=True, slots=True)
class Kind:
    """What tells one class of VAEs from another."""

    settings: Callable[[Any, Tiling], Mapping[str, Any]]
    """(module, tiling) -> attributes of the module that make it decode so."""
    in_time: bool = False
    """Whether it decodes clips in parts on request. The others always go through a clip a few
    frames at a time."""
    steady: int = 0
    """Latent frames, or one fewer, from which on a longer clip of as odd a number takes no more
    memory but for its frames; 0 where a clip is decoded as a whole."""
    copies: int = 1
    """Of all frames, beside the tiles and the rows of them, when tiles are put together."""


def _wan(module: Any, tiling: Tiling) -> Mapping[str, Any]:
    return _strides(tiling, module.spatial_compression_ratio)


def _hunyuan_video(module: Any, tiling: Tiling) -> Mapping[str, Any]:
    plain = _strides(tiling, module.spatial_compression_ratio)
    if tiling.t is None:
        return {**plain, "use_framewise_decoding": False}
    ratio = module.temporal_compression_ratio
    return {
        **plain,
        "use_framewise_decoding": True,
        # It takes one latent frame more than this.
        "tile_sample_min_num_frames": (tiling.t.size - 1) * ratio,
        "tile_sample_stride_num_frames": tiling.t.stride * ratio,
    }


def _strides(tiling: Tiling, ratio: int) -> dict[str, Any]:
    return {
        "use_tiling": True,
        "tile_sample_min_height": tiling.h.size * ratio,
        "tile_sample_min_width": tiling.w.size * ratio,
        "tile_sample_stride_height": tiling.h.stride * ratio,
        "tile_sample_stride_width": tiling.w.stride * ratio,
    }


def _cogvideox(module: Any, tiling: Tiling) -> Mapping[str, Any]:
    ratio = 2 ** (len(module.config.block_out_channels) - 1)
    settings: dict[str, Any] = {"use_tiling": True}
    for name, cut in (("height", tiling.h), ("width", tiling.w)):
        settings[f"tile_sample_min_{name}"] = cut.size * ratio
        settings[f"tile_latent_min_{name}"] = cut.size
        # diffusers rounds what it computes with this down, which a float may take one too far.
        settings[f"tile_overlap_factor_{name}"] = Fraction(cut.size - cut.stride, cut.size)
    return settings


KINDS: Mapping[str, Kind] = {
    "AutoencoderKLHunyuanVideo": Kind(_hunyuan_video, in_time=True),
    "AutoencoderKLWan": Kind(_wan, steady=5, copies=2),
    "AutoencoderKLCogVideoX": Kind(_cogvideox, steady=5),
}
"""By the name of diffusers' class. A VAE of another class decodes as it does by itself."""


@contextmanager
def tiled(module: nn.Module, tiling: Tiling) -> Iterator[None]:
    """Inside, a VAE of a known kind decodes so; afterwards it is as it was."""
    changed = KINDS[type(module).__name__].settings(module, tiling)
    before = {name: getattr(module, name) for name in changed}
    try:
        for name, value in changed.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def tilings(kind: Kind, shape: tuple[int, ...], stride_hw: int) -> list[list[Tiling]]:
    """Ways to decode latents [.., T, H, W], those of each list from large tiles to small ones.

    There is a list for each number of parts that a clip is decoded in.
    """
    frames, height, width = shape[-3:]
    times: list[Cut | None] = [None]
    count = 2
    while kind.in_time and -(-(frames - 1) // count) >= SHORTEST:
        stride = -(-(frames - 1) // count)
        times.append(Cut(stride + 2, stride))
        count *= 2
    overlap, least = OVERLAP // stride_hw, SMALLEST // stride_hw
    rows, columns = max(1, height // least), max(1, width // least)
    found = []
    for count in COUNTS:
        fitting = [
            Tiling(Cut.equal(height, r, overlap), Cut.equal(width, count // r, overlap))
            for r in range(1, rows + 1)
            if count % r == 0 and count // r <= columns
        ]
        fitting = [
            each
            for each in fitting
            if each.tiles(shape) == count
            and min(each.h.sizes(height)[-1], each.w.sizes(width)[-1]) >= min(overlap, height)
        ]
        if fitting:
            found.append(min(fitting, key=lambda each: each.work(shape)))
    found.sort(key=lambda each: -each.h.size * each.w.size)
    return [[Tiling(each.h, each.w, t) for each in found] for t in times]

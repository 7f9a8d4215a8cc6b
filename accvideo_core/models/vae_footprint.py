"""What decoding takes on its device, and the tiles that fit into what is free.

A tile is decoded without values on torch's meta device while a ledger counts. What is held beside
it (tiles that are done, the frames that are put together from them) is added by its size: going
through hundreds of tiles would take as long without values as with them.

Shapes: B batch, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import AccVideoError
from .footprint import gigabytes, without_values
from .ledger import Ledger, fused_kernels
from .vae_tiling import KINDS, Tiling, tiled, tilings, whole

Shape = tuple[int, ...]
INDEXED = 2**31
"""Values of a tensor up to which every CUDA kernel for convolutions can count them; beyond, older
ones are left for others that are many times slower."""
_COLOURS = 3
_FLOAT32 = 4
"""Bytes of a colour in what a decode returns."""


class _Pass(NamedTuple):
    """What the decoding of one tile takes, beside its latents."""

    bytes: int
    convolved: int
    """Values of the largest tensor that a convolution takes or gives."""


class DecodeFootprint:
    """Bytes that decoding takes beside the weights of a VAE of a known kind."""

    def __init__(
        self,
        module: nn.Module,
        stride_t: int,
        stride_hw: int,
        device: torch.device | None = None,
    ) -> None:
        """`device` is where it will be; None is where the VAE is."""
        self.module: Any = without_values(module)
        self.kind = KINDS[type(module).__name__]
        self.stride_t, self.stride_hw = stride_t, stride_hw
        parameter = next(module.parameters())
        self.dtype = parameter.dtype
        self.device = parameter.device if device is None else device
        self._passes: dict[Shape, _Pass] = {}

    def needed(self, shape: Shape, tiling: Tiling) -> int:
        """The most bytes that decoding latents [B, C, T, H, W] takes at once."""
        batch, channels, frames, height, width = shape
        parts = [frames] if tiling.t is None else tiling.t.sizes(frames)
        rows, columns = tiling.h.sizes(height), tiling.w.sizes(width)
        result = self._frames(batch, frames, height, width)
        # Frames of a narrower number format are made float32 at the end.
        stages = [result if self.dtype.itemsize == _FLOAT32 else 3 * result]
        one = max(self._held(tile) for tile in self._tiles(shape, tiling))
        for number, part in enumerate(parts):
            done = sum(self._frames(batch, x, height, width) for x in parts[:number])
            tiles = self._frames(batch, part, sum(rows), sum(columns))
            last = self._frames(batch, part, rows[-1], columns[-1])
            stages.append(done + tiles - last + one)
            if tiling.tiles(shape) > 1:
                together = (1 + self.kind.copies) * self._frames(batch, part, height, width)
                stages.append(done + tiles + together)
        if len(parts) > 1:
            stages.append(sum(self._frames(batch, x, height, width) for x in parts) + result)
        latents = batch * channels * frames * height * width * (self.dtype.itemsize + _FLOAT32)
        return latents + max(stages)

    def fits(self, shape: Shape, tiling: Tiling, free: int) -> bool:
        """Whether latents [B, C, T, H, W] can be decoded so into `free` bytes."""
        if self.needed(shape, tiling) > free:
            return False
        if self.device.type != "cuda":
            return True
        return all(self._pass(x).convolved < INDEXED for x in self._tiles(shape, tiling))

    def choose(self, shape: Shape, free: int) -> Tiling:
        """The way of decoding latents [B, C, T, H, W] into `free` bytes that is the least work.

        Raises:
            AccVideoError: none fits.
        """
        everything = whole(shape)
        if self.fits(shape, everything, free):
            return everything
        likely: list[Tiling] = []
        others: list[Tiling] = []
        for ways in tilings(self.kind, shape, self.stride_hw):
            first = bisect_left(ways, True, key=lambda way: self.fits(shape, way, free))
            likely, others = likely + ways[first:], others + ways[:first]
        for some in (likely, others):
            for way in sorted(some, key=lambda each: each.work(shape)):
                if self.fits(shape, way, free):
                    return way
        raise AccVideoError(self._too_large(shape, free))

    def _too_large(self, shape: Shape, free: int) -> str:
        ways = [way for ways in tilings(self.kind, shape, self.stride_hw) for way in ways]
        least = min(self.needed(shape, way) for way in ways)
        frames = (shape[2] - 1) * self.stride_t + 1
        height, width = (size * self.stride_hw for size in shape[3:])
        return (
            f"decoding {frames} frames of {width} x {height} pixels takes {gigabytes(least)} in "
            f"the best of tiles, and {self.device} has {gigabytes(free)} for it; use a tiny "
            "decoder, free memory there, or choose smaller or shorter videos"
        )

    def _tiles(self, shape: Shape, tiling: Tiling) -> list[Shape]:
        """Shapes of the tiles that may take most."""
        batch, channels, frames, height, width = shape
        sizes = [
            sorted({frames} if tiling.t is None else set(tiling.t.sizes(frames))),
            sorted(set(tiling.h.sizes(height))),
            sorted(set(tiling.w.sizes(width))),
        ]
        if self.device.type != "cpu":  # whose kernels for small tiles take more than others
            sizes = [each[-1:] for each in sizes]
        return [(batch, channels, *each) for each in product(*sizes)]

    def _held(self, shape: Shape) -> int:
        """Bytes that decoding one tile of latents takes, which puts its parts together."""
        frames, seen = shape[2], self._seen(shape[2])
        if not self.kind.steady:
            return self._pass(shape).bytes
        whole_tile = self._frames(shape[0], *shape[2:])
        more = whole_tile - self._frames(shape[0], seen, *shape[3:])
        together = (1 + self.kind.copies) * whole_tile if frames > seen else 0
        return max(self._pass(shape).bytes + more, together)

    def _pass(self, shape: Shape) -> _Pass:
        counted = (*shape[:2], self._seen(shape[2]), *shape[3:])
        if counted not in self._passes:
            self._passes[counted] = self._count(counted)
        return self._passes[counted]

    def _seen(self, frames: int) -> int:
        """Latent frames that are counted of a tile."""
        steady = self.kind.steady
        return min(frames, steady - (frames - steady) % 2) if steady else frames

    def _count(self, shape: Shape) -> _Pass:
        ledger = Ledger(self.device)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            fused_kernels(self.device),
            tiled(self.module, whole(shape)),
            ledger,
        ):
            z = torch.empty(shape, dtype=self.dtype, device="meta")
            before = ledger.live
            self.module.decode(z, return_dict=False)
        return _Pass(ledger.peak - before, ledger.convolved)

    def _frames(self, batch: int, frames: int, height: int, width: int) -> int:
        """Bytes of decoded frames, of latents of these sizes."""
        count = (frames - 1) * self.stride_t + 1
        pixels = height * width * self.stride_hw**2
        return batch * count * pixels * _COLOURS * self.dtype.itemsize

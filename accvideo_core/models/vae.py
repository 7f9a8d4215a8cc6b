"""VideoVAE: between latents in model space and frames.

Shapes: B batch, C channels, T latent frames, H, W latent size. Frames are [B, T, H, W, 3], and
there T, H and W count frames and pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AccVideoError
from ..latents import LatentSpec
from .footprint import gigabytes
from .frame_vae import BY_FRAMES, OUT_OF_MEMORY, decode_frames, encode_frames
from .vae_footprint import DecodeFootprint
from .vae_tiling import KINDS, tiled

PIXELS_AT_ONCE = 2**20
"""Batches are cut so that one pass holds about this many pixels, and at least one clip."""
_AGAIN = 0.7
"""Of what was tried: where that did not fit after all."""
_log = logging.getLogger(__name__)


class VideoVAE:
    """A diffusers video autoencoder that speaks model space and frames in [0, 1]."""

    def __init__(self, module: nn.Module, spec: LatentSpec) -> None:
        self.module: Any = module.eval().requires_grad_(False)
        self.spec = spec
        self._footprint: DecodeFootprint | None = None
        # Only frames larger than a tile are tiled: a whole 544p clip would not fit a card.
        if hasattr(self.module, "use_tiling"):
            self.module.enable_tiling()
        self._by_frames = type(module).__name__ in BY_FRAMES

    def decode(self, x: Tensor, free: int | None = None) -> Tensor:
        """Model-space latents [B, C, T, H, W] -> frames [B, T, H, W, 3], float32, on the CPU.

        Args:
            free: bytes that it may take on its device beside the weights that lie there. It is
                then decoded in as few tiles as fit, or in one. None: in the VAE's own tiles.

        Raises:
            AccVideoError: even the smallest tiles do not fit.
        """
        return self._decoded(x, free, _to_cpu)

    def decode_bytes(self, x: Tensor, free: int | None = None) -> Tensor:
        """As `decode`, but uint8 from 0 to 255, rounded as `video.write_video` does.

        A quarter of the bytes leaves the device, and for pinned memory where that is a GPU.
        """
        return self._decoded(x, free, _to_bytes)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, T, H, W, 3] in [0, 1] -> model-space latents [B, C, T, H, W] (the mode)."""
        if frames.dim() != 5 or frames.shape[-1] != 3:
            raise AccVideoError(
                f"frames have shape {tuple(frames.shape)}; expected [B, T, H, W, 3]"
            )
        count, height, width = frames.shape[1:4]
        self.spec.shape(count, height, width)
        return self._in_parts(self._encode, frames, count * height * width)

    @property
    def footprint(self) -> DecodeFootprint | None:
        """What decoding takes; None for a VAE whose tiles cannot be chosen."""
        if type(self.module).__name__ not in KINDS:
            return None
        if self._footprint is None or self._footprint.device != self.module.device:
            self._footprint = DecodeFootprint(self.module, self.spec.stride_t, self.spec.stride_hw)
        return self._footprint

    def _decoded(self, x: Tensor, free: int | None, finish: Callable[[Tensor], Tensor]) -> Tensor:
        self.spec.check(x)
        frames = ((x.shape[2] - 1) * self.spec.stride_t + 1) * self.spec.stride_hw**2
        work = partial(self._decode, free=free, finish=finish)
        return self._in_parts(work, x, frames * x.shape[3] * x.shape[4])

    def _in_parts(self, work: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
        # Plain tensors come out even inside inference mode, so that training may use them.
        with torch.inference_mode(False), torch.no_grad():
            parts = [work(part) for part in x.split(max(1, PIXELS_AT_ONCE // pixels))]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, x: Tensor, free: int | None, finish: Callable[[Tensor], Tensor]) -> Tensor:
        z = self._to_module(self.spec.from_model(x.float()))
        video = self._plain(z) if free is None else self._fitted(z, free)
        # In place, because a long clip's frames are gigabytes.
        return finish(video.float().div_(2).add_(0.5).clamp_(0, 1).permute(0, 2, 3, 4, 1))

    def _fitted(self, z: Tensor, free: int) -> Tensor:
        """Decode in as few tiles as fit into `free` bytes."""
        footprint = self.footprint
        while footprint is not None:
            tiling = footprint.choose(tuple(z.shape), free)
            try:
                with tiled(self.module, tiling):
                    return self._plain(z)
            except OUT_OF_MEMORY:
                # Some kernels take memory to work in, of which torch knows nothing.
                tried = footprint.needed(tuple(z.shape), tiling)
                free = int(_AGAIN * min(free, tried))
                _log.warning("%s were too little to decode; trying less", gigabytes(tried))
        return self._plain(z)

    def _plain(self, z: Tensor) -> Tensor:
        if self._by_frames:
            return decode_frames(self.module, z)
        return self.module.decode(z, return_dict=False)[0]

    def _encode(self, frames: Tensor) -> Tensor:
        video = self._to_module(frames.float().permute(0, 4, 1, 2, 3) * 2 - 1)
        if self._by_frames:
            z = encode_frames(self.module, video)
        else:
            z = self.module.encode(video, return_dict=False)[0].mode()
        return self.spec.to_model(z.float()).cpu()

    def _to_module(self, x: Tensor) -> Tensor:
        return x.to(self.module.device, self.module.dtype)


def _to_cpu(frames: Tensor) -> Tensor:
    return frames.cpu()


def _to_bytes(frames: Tensor) -> Tensor:
    """[0, 1] -> 0 to 255 in main memory."""
    pixels = frames.mul_(255).round_().to(torch.uint8)
    if not pixels.is_cuda:
        return pixels.cpu()
    here = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
    here.copy_(pixels.contiguous(), non_blocking=True)
    torch.cuda.current_stream(pixels.device).synchronize()  # and not the whole device
    return here

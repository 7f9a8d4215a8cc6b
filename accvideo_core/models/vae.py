"""VideoVAE: between latents in model space and frames.

Shapes: B batch, C channels, T latent frames, H, W latent size. Frames are [B, T, H, W, 3], and
there T, H and W count frames and pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AccVideoError
from ..latents import LatentSpec

PIXELS_AT_ONCE = 2**20
"""Batches are cut so that one pass holds about this many pixels, and at least one clip."""


class VideoVAE:
    """A diffusers video autoencoder that speaks model space and frames in [0, 1]."""

    def __init__(self, module: nn.Module, spec: LatentSpec) -> None:
        self.module: Any = module.eval().requires_grad_(False)
        self.spec = spec
        # Only frames larger than a tile are tiled: a whole 544p clip would not fit a card.
        if hasattr(self.module, "enable_tiling"):
            self.module.enable_tiling()

    def decode(self, x: Tensor) -> Tensor:
        """Model-space latents [B, C, T, H, W] -> frames [B, T, H, W, 3], float32, on the CPU."""
        self.spec.check(x)
        frames = ((x.shape[2] - 1) * self.spec.stride_t + 1) * self.spec.stride_hw**2
        return self._in_parts(self._decode, x, frames * x.shape[3] * x.shape[4])

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, T, H, W, 3] in [0, 1] -> model-space latents [B, C, T, H, W] (the mode)."""
        if frames.dim() != 5 or frames.shape[-1] != 3:
            raise AccVideoError(
                f"frames have shape {tuple(frames.shape)}; expected [B, T, H, W, 3]"
            )
        count, height, width = frames.shape[1:4]
        self.spec.shape(count, height, width)
        return self._in_parts(self._encode, frames, count * height * width)

    def _in_parts(self, work: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
        # Plain tensors come out even inside inference mode, so that training may use them.
        with torch.inference_mode(False), torch.no_grad():
            return torch.cat([work(part) for part in x.split(max(1, PIXELS_AT_ONCE // pixels))])

    def _decode(self, x: Tensor) -> Tensor:
        z = self._to_module(self.spec.from_model(x.float()))
        video = self.module.decode(z, return_dict=False)[0].float()
        return (video / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).cpu()

    def _encode(self, frames: Tensor) -> Tensor:
        video = self._to_module(frames.float().permute(0, 4, 1, 2, 3) * 2 - 1)
        z = self.module.encode(video, return_dict=False)[0].mode().float()
        return self.spec.to_model(z).cpu()

    def _to_module(self, x: Tensor) -> Tensor:
        return x.to(self.module.device, self.module.dtype)

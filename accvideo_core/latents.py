"""LatentSpec: the geometry of a latent video, and the way between VAE space and model space.

VAE space is what a VAE's encoder gives and its decoder takes, and what ComfyUI's LATENT socket
carries. Model space is what the diffusion network sees: (x - shift) * scale per channel.

Shapes: B batch, C channels, T latent frames, H, W latent height and width.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import AccVideoError


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Geometry and scaling of one family's latents.

    `stride_t` and `stride_hw` are pixels per latent; `patch` and `patch_t` are latents per token
    along H and W and along T. `scale` and `shift` hold one number, or one per channel.
    """

    channels: int
    stride_t: int
    stride_hw: int
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)
    patch: int = 1
    patch_t: int = 1

    def __post_init__(self) -> None:
        for name in ("channels", "stride_t", "stride_hw", "patch", "patch_t"):
            if getattr(self, name) < 1:
                raise AccVideoError(f"LatentSpec.{name} is {getattr(self, name)}; it must be >= 1")
        for name in ("scale", "shift"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise AccVideoError(
                    f"LatentSpec.{name} has {len(getattr(self, name))} values; "
                    f"it needs 1 or one for each of the {self.channels} channels"
                )

    def to_model(self, x: Tensor) -> Tensor:
        """VAE space -> model space, [B, C, T, H, W]."""
        return (x - self._per_channel(self.shift, x)) * self._per_channel(self.scale, x)

    def from_model(self, x: Tensor) -> Tensor:
        """Model space -> VAE space, [B, C, T, H, W]."""
        return x / self._per_channel(self.scale, x) + self._per_channel(self.shift, x)

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a video of `frames` x `height` x `width` pixels.

        T is rounded up to whole tokens; `crop` takes the surplus off again.
        """
        if frames < 1 or (frames - 1) % self.stride_t:
            low = max(0, (frames - 1) // self.stride_t) * self.stride_t + 1
            raise AccVideoError(
                f"{frames} frames do not fit this model, which takes {self.stride_t}k+1 frames; "
                f"use {low} or {low + self.stride_t}"
            )
        multiple = self.stride_hw * self.patch
        for name, size in (("height", height), ("width", width)):
            if size < multiple or size % multiple:
                low = max(multiple, size // multiple * multiple)
                raise AccVideoError(
                    f"{name} {size} is not a multiple of {multiple}; use {low} or {low + multiple}"
                )
        latent_frames = -(-self._needed(frames) // self.patch_t) * self.patch_t
        return self.channels, latent_frames, height // self.stride_hw, width // self.stride_hw

    def crop(self, x: Tensor, frames: int) -> Tensor:
        """[B, C, T, H, W] without the surplus latent frames that lead a video of `frames`."""
        return x[:, :, max(0, x.shape[2] - self._needed(frames)) :]

    def fill(self, x: Tensor, frames: int) -> Tensor:
        """The inverse of `crop`: the first latent frame once more for each of the surplus."""
        surplus = -self._needed(frames) % self.patch_t
        return torch.cat([x[:, :, :1]] * surplus + [x], dim=2) if surplus else x

    def _needed(self, frames: int) -> int:
        return (frames - 1) // self.stride_t + 1

    def check(self, x: Tensor, what: str = "latents") -> Tensor:
        """`x` itself, after checking that it is [B, C, T, H, W] of this spec and finite."""
        if x.dim() != 5 or x.shape[1] != self.channels:
            raise AccVideoError(
                f"{what} have shape {tuple(x.shape)}; expected [B, {self.channels}, T, H, W]"
            )
        if not torch.isfinite(x).all():
            raise AccVideoError(
                f"{what} hold NaN or infinite values; lower the learning rate or use float32, "
                "and make them again"
            )
        return x

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form; `LatentSpec.from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LatentSpec:
        """The inverse of `as_dict`."""
        lists = {"scale": tuple(data["scale"]), "shift": tuple(data["shift"])}
        return cls(**{**data, **lists})

    def _per_channel(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(1, -1, 1, 1, 1)


def key_generator(*key: object) -> torch.Generator:
    """A CPU generator whose seed follows from `key` alone, the same on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def seeded_noise(shape: tuple[int, ...], *key: object) -> Tensor:
    """Standard normal noise (float32, CPU) that follows from `key` alone.

    A record's noise is `seeded_noise(shape, dataset_seed, prompt_id, sample)`.
    """
    return torch.randn(shape, generator=key_generator(*key))

"""A linear codec of 4x4 RGB blocks of single frames: the latent space that the tiny VAE is taught.

A block of 4 x 4 pixels x 3 colours (48 numbers) is projected on its 8 principal components, which
are whitened partly (divided by std ** POWER) and then scaled together to unit variance.

Shapes: B clips, T frames, H = W = 32 pixels, C = 8 channels, h = w = 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from accvideo_core.evaluate import image_world, world
from accvideo_core.models.tiny_svd import LATENT_CHANNELS

POWER = 0.6
_BLOCK = 48


@dataclass(frozen=True, slots=True)
class FrameCodec:
    """``z = (block - mean) @ analysis`` and ``block = z @ synthesis + mean``."""

    mean: Tensor  # [48]
    analysis: Tensor  # [48, 8]
    synthesis: Tensor  # [8, 48]

    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, T, 32, 32] in [-1, 1] to unit-variance latents [B, T, 8, 8, 8]."""
        z = (_to_blocks(video) - self.mean) @ self.analysis
        return rearrange(z, "b t h w c -> b t c h w").contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of ``encode`` within the span of the components, unclamped."""
        blocks = rearrange(latents, "b t c h w -> b t h w c") @ self.synthesis + self.mean
        return rearrange(blocks, "b t h w (c y x) -> b c t (h y) (w x)", c=3, y=4, x=4)


def _to_blocks(video: Tensor) -> Tensor:
    return rearrange(video, "b c t (h y) (w x) -> b t h w (c y x)", y=4, x=4)


def fit(clips: int = 4096, seed: int = 0) -> FrameCodec:
    """Principal components of the blocks of ``clips`` random clips."""
    generator = torch.Generator().manual_seed(seed)
    count, total, outer = 0, torch.zeros(_BLOCK).double(), torch.zeros(_BLOCK, _BLOCK).double()
    for _ in range(clips // 128):
        video = image_world.render(world.sample_specs(128, generator), generator)
        blocks = _to_blocks(video).reshape(-1, _BLOCK).double()
        count += len(blocks)
        total += blocks.sum(0)
        outer += blocks.T @ blocks
    mean = total / count
    values, vectors = torch.linalg.eigh(outer / count - mean[:, None] * mean)
    values, vectors = values.flip(0)[:LATENT_CHANNELS], vectors.flip(1)[:, :LATENT_CHANNELS]
    # An eigenvector's sign is arbitrary; fix it so that the codec is reproducible.
    vectors = vectors * vectors.sum(0, keepdim=True).sign()
    std = values.sqrt()
    gain = std**-POWER
    gain = gain / ((std * gain) ** 2).mean().sqrt()
    return FrameCodec(
        mean.float(),
        (vectors * gain).float(),
        (vectors / gain).T.float().contiguous(),
    )


def load_or_fit(path: Path) -> FrameCodec:
    """The codec stored at ``path``; fitted and stored first where there is none."""
    names = ("mean", "analysis", "synthesis")
    if not path.exists():
        codec = fit()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: getattr(codec, name).contiguous() for name in names}, path)
    return FrameCodec(**load_file(path))

"""A linear codec of 4x4x4 RGB blocks: the latent space that the tiny VAE is taught.

A block of 4 frames x 4 x 4 pixels x 3 colours (192 numbers) is projected on its 16 principal
components. Like the causal VAE, the first latent frame holds one frame only: it is repeated four
times, so that every latent frame is coded by the same matrix.

Channels are whitened partly (divided by std ** POWER): full whitening would spend the diffusion
model's loss on components nobody sees. Then all are scaled together to unit variance.

Shapes: B clips, T = 17 frames, F = 5 latent frames, H = W = 32 pixels, C = 16 channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from accvideo_core.evaluate import world

CHANNELS = 16
POWER = 0.6


@dataclass(frozen=True, slots=True)
class Codec:
    """``z = (block - mean) @ analysis`` and ``block = z @ synthesis + mean``."""

    mean: Tensor  # [192]
    analysis: Tensor  # [192, 16]
    synthesis: Tensor  # [16, 192]

    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, 17, 32, 32] in [-1, 1] to unit-variance latents [B, 16, 5, 8, 8]."""
        z = (_to_blocks(video) - self.mean) @ self.analysis
        return rearrange(z, "b f h w c -> b c f h w").contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of ``encode`` within the span of the components, unclamped."""
        blocks = rearrange(latents, "b c f h w -> b f h w c") @ self.synthesis + self.mean
        video = rearrange(blocks, "b f h w (c t y x) -> b c (f t) (h y) (w x)", c=3, t=4, y=4, x=4)
        first = video[:, :, :4].mean(2, keepdim=True)
        return torch.cat([first, video[:, :, 4:]], dim=2)


def _to_blocks(video: Tensor) -> Tensor:
    padded = torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], dim=2)
    return rearrange(padded, "b c (f t) (h y) (w x) -> b f h w (c t y x)", t=4, y=4, x=4)


def fit(clips: int = 4096, seed: int = 0) -> Codec:
    """Principal components of the blocks of ``clips`` random clips."""
    generator = torch.Generator().manual_seed(seed)
    count, total, outer = 0, torch.zeros(192).double(), torch.zeros(192, 192).double()
    for _ in range(clips // 128):
        video = world.render(world.sample_specs(128, generator), generator)
        blocks = _to_blocks(video).reshape(-1, 192).double()
        count += len(blocks)
        total += blocks.sum(0)
        outer += blocks.T @ blocks
    mean = total / count
    values, vectors = torch.linalg.eigh(outer / count - mean[:, None] * mean)
    values, vectors = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
    # An eigenvector's sign is arbitrary; fix it so that the codec is reproducible.
    vectors = vectors * vectors.sum(0, keepdim=True).sign()
    std = values.sqrt()
    gain = std**-POWER
    gain = gain / ((std * gain) ** 2).mean().sqrt()
    return Codec(
        mean.float(),
        (vectors * gain).float(),
        (vectors / gain).T.float().contiguous(),
    )


def save(codec: Codec, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("mean", "analysis", "synthesis")
    save_file({name: getattr(codec, name).contiguous() for name in names}, path)


def load_or_fit(path: Path) -> Codec:
    """The codec stored at ``path``; fitted and stored first where there is none."""
    if not path.exists():
        save(fit(), path)
    return Codec(**load_file(path))

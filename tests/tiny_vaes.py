"""Very small random VAEs of the classes whose tiles can be chosen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLWan
from torch import nn

from accvideo_core.latents import LatentSpec
from accvideo_core.models.vae import VideoVAE

CHANNELS = 4
_PLAIN = {"latent_channels": CHANNELS, "block_out_channels": (8, 8, 8, 8)}
_WAN = {"z_dim": CHANNELS, "latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}

MAKERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "hunyuan_video": (
        lambda: AutoencoderKLHunyuanVideo(**_PLAIN, layers_per_block=1, norm_num_groups=2),
        8,
    ),
    "wan": (lambda: AutoencoderKLWan(base_dim=4, num_res_blocks=1, **_WAN), 8),
    "wan22": (
        lambda: AutoencoderKLWan(
            **_WAN,
            base_dim=4,
            decoder_base_dim=4,
            num_res_blocks=1,
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_spatial=16,
        ),
        16,
    ),
    "cogvideox": (
        lambda: AutoencoderKLCogVideoX(**_PLAIN, layers_per_block=1, norm_num_groups=2),
        8,
    ),
}
"""Name -> (maker, pixels of a latent along H and W)."""


def vae(name: str) -> VideoVAE:
    make, stride = MAKERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VideoVAE(make(), LatentSpec(CHANNELS, stride_t=4, stride_hw=stride))


def latents(frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, CHANNELS, frames, height, width, generator=generator)

"""Very small random HunyuanVideo networks for the tests, every parameter random.

diffusers initialises gates with zeros, which would hide most of the network from a test.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn

from accvideo_core.conditioning import Condition
from accvideo_core.latents import LatentSpec
from accvideo_core.models import FAMILIES, VideoModel
from accvideo_core.models import tiny as embedded

TEXT, POOLED, CHANNELS = 24, 20, 4
SPEC = LatentSpec(CHANNELS, stride_t=4, stride_hw=4, scale=(0.5,), patch=2)
WORDS = ("a", "red", "blue", "circle", "square", "moving", "left", "right")


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter, gates and biases too, a random value of a sane size."""
    generator = torch.Generator().manual_seed(seed)
    for _name, p in sorted(module.named_parameters()):
        std = 0.2 if p.dim() < 2 else p[0].numel() ** -0.5
        centre = 1.0 if p.dim() == 1 and bool((p == 1).all()) else 0.0
        p.copy_(centre + std * torch.randn(p.shape, generator=generator))


def network(seed: int = 0, guidance: bool = True) -> HunyuanVideoTransformer3DModel:
    """2 dual and 2 single blocks of width 32."""
    module = HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        guidance_embeds=guidance,
        text_embed_dim=TEXT,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 6, 6),
    )
    randomise(module, seed)
    return module.eval().requires_grad_(False)


def video_model(seed: int = 0, guidance: bool = True) -> VideoModel:
    return VideoModel(network(seed, guidance), FAMILIES["hunyuan_video"], SPEC, source="tiny")


def condition(batch: int = 2, length: int = 5, seed: int = 1) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    return Condition(
        text=torch.randn(batch, length, TEXT, generator=generator),
        mask=torch.ones(batch, length, dtype=torch.bool),
        pooled=torch.randn(batch, POOLED, generator=generator),
    )


def latents(batch: int = 2, seed: int = 2) -> torch.Tensor:
    """[B, 4, 2, 4, 4]: 5 frames of 16 x 16 pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, 2, 4, 4, generator=generator)


def save_random_pipeline(folder: Path, seed: int = 0) -> Path:
    """A complete random HunyuanVideoPipeline folder (the embedded teacher's classes and sizes)."""
    pipeline = embedded.build_pipeline(WORDS, seed)
    randomise(pipeline.transformer, seed)
    embedded.save_pipeline(pipeline, folder)
    return folder

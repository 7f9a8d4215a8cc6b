"""Very small random Stable Video Diffusion networks and pipelines, every parameter random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from accvideo_core.conditioning import Condition
from accvideo_core.latents import LatentSpec
from accvideo_core.models import FAMILIES, VideoModel
from accvideo_core.models.svd_checkpoint import SCHEDULER
from tests.tiny import randomise

EMBEDDING, CHANNELS, WIDTHS = 24, 4, (32, 32, 32, 64)
HEADS = (2, 2, 2, 4)
SPEC = LatentSpec(CHANNELS, stride_t=1, stride_hw=8, scale=(0.18215,))


def network(seed: int = 0) -> UNetSpatioTemporalConditionModel:
    """The real four levels, 32 to 64 channels wide with one layer each."""
    module = UNetSpatioTemporalConditionModel(
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=WIDTHS,
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=48,
        layers_per_block=1,
        cross_attention_dim=EMBEDDING,
        num_attention_heads=HEADS,
        num_frames=3,
    )
    randomise(module, seed)
    return module.eval().requires_grad_(False)


def video_model(seed: int = 0) -> VideoModel:
    return VideoModel(network(seed), FAMILIES["svd"], SPEC, source="tiny")


def condition(batch: int = 2, seed: int = 1) -> Condition:
    """An image of 64 x 64 pixels at the official 7 frames per second, motion 127, noise 0.02."""
    generator = torch.Generator().manual_seed(seed)
    return Condition(
        text=torch.randn(batch, 1, EMBEDDING, generator=generator),
        image=torch.randn(batch, CHANNELS, 1, 8, 8, generator=generator),
        micro=torch.tensor([[6.0, 127.0, 0.02]]).repeat(batch, 1),
    )


def latents(batch: int = 2, seed: int = 2) -> torch.Tensor:
    """[B, 4, 3, 8, 8]: 3 frames of 64 x 64 pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, 3, 8, 8, generator=generator)


def scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**SCHEDULER)


def vae(seed: int = 0) -> AutoencoderKLTemporalDecoder:
    """The real one's four levels, 32 channels wide."""
    levels: Any = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "block_out_channels": (32,) * 4,
    }
    module = AutoencoderKLTemporalDecoder(layers_per_block=1, latent_channels=CHANNELS, **levels)
    randomise(module, seed)
    return module.eval().requires_grad_(False)


def image_encoder(seed: int = 0) -> CLIPVisionModelWithProjection:
    """One layer of 16 channels over the 224 x 224 pixels that the pipeline resizes to."""
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=EMBEDDING,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=224,
        patch_size=56,
        hidden_act="gelu",
    )
    module = CLIPVisionModelWithProjection(config)
    randomise(module, seed)
    return module.eval().requires_grad_(False)


def build_pipeline(seed: int = 0) -> StableVideoDiffusionPipeline:
    pipeline = StableVideoDiffusionPipeline(
        vae=vae(seed),
        image_encoder=image_encoder(seed + 1),
        unet=network(seed),
        scheduler=scheduler(),
        feature_extractor=CLIPImageProcessor(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(folder: Path, seed: int = 0) -> Path:
    """A complete random StableVideoDiffusionPipeline folder."""
    build_pipeline(seed).save_pretrained(folder, safe_serialization=True)
    return folder

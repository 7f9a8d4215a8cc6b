"""The embedded image-to-video teacher: an SVD pipeline of the real classes, very small.

The image encoder is random and frozen, like the text encoders of the other embedded teacher: what
the network must know of the first frame is in its latents. Everything else is trained by the
scripts in ``scripts/tiny_svd_teacher``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..embedded import TINY_SVD

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPVisionModelWithProjection

FRAMES = TINY_SVD.frames
LATENT_CHANNELS = 8
SCALING_FACTOR = 0.18215
SIGMA_MIN, SIGMA_MAX = 0.002, 700.0
IMAGE_WIDTH = 64
_TIME_WIDTH = 32


def embedded_image_teacher_path() -> Path:
    """The pipeline folder that ships with the package."""
    return TINY_SVD.path


def unet() -> UNetSpatioTemporalConditionModel:
    """The untrained denoiser: four levels, of 8x8 to 1x1 latents.

    Every normalisation of this class has 32 groups: 64 channels are the fewest that let a group see
    more than one channel, and with it the mean of a picture.
    """
    from diffusers import UNetSpatioTemporalConditionModel

    return UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=2 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=(
            "DownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal",
            "DownBlockSpatioTemporal",
        ),
        up_block_types=(
            "UpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal",
            "UpBlockSpatioTemporal",
        ),
        block_out_channels=(64, 64, 64, 64),
        addition_time_embed_dim=_TIME_WIDTH,
        projection_class_embeddings_input_dim=3 * _TIME_WIDTH,
        layers_per_block=1,
        cross_attention_dim=IMAGE_WIDTH,
        num_attention_heads=(2, 2, 2, 2),
        num_frames=FRAMES,
    )


def vae() -> AutoencoderKLTemporalDecoder:
    """The untrained autoencoder: 4x in space, every frame alone in the encoder."""
    from diffusers import AutoencoderKLTemporalDecoder

    return AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 3,  # type: ignore[arg-type]  # annotated as one
        block_out_channels=(64, 64, 64),  # type: ignore[arg-type]  # annotated as one number
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        sample_size=32,
        scaling_factor=SCALING_FACTOR,
    )


@torch.no_grad()
def image_encoder(seed: int) -> CLIPVisionModelWithProjection:
    """A random frozen encoder, rounded to float16 so that a saved copy computes the same."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            projection_dim=IMAGE_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=224,  # to which the pipeline resizes every image
            patch_size=28,  # four pixels of a 32 x 32 image
        )
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(encoder.named_parameters()):
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = 0.3 if "position" in name else parameter[0].numel() ** -0.5
        parameter.normal_(0, std, generator=generator)
        parameter.copy_(parameter.half().float())
    return encoder.eval().requires_grad_(False)


def scheduler() -> EulerDiscreteScheduler:
    """SVD's own: Karras' noise levels, v-prediction, continuous time 0.25 ln(sigma)."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        interpolation_type="linear",
        steps_offset=1,
        use_karras_sigmas=True,
        sigma_min=SIGMA_MIN,
        sigma_max=SIGMA_MAX,
    )


def build_pipeline(seed: int = 0) -> StableVideoDiffusionPipeline:
    """The whole pipeline, untrained; ``seed`` is that of the image encoder."""
    from diffusers import StableVideoDiffusionPipeline
    from transformers import CLIPImageProcessor

    return StableVideoDiffusionPipeline(
        vae=vae(),
        image_encoder=image_encoder(seed),
        unet=unet(),
        scheduler=scheduler(),
        feature_extractor=CLIPImageProcessor(),
    )

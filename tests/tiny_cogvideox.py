"""Very small random CogVideoX networks and pipelines for the tests, every parameter random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from accvideo_core.conditioning import Condition
from accvideo_core.latents import LatentSpec
from accvideo_core.models import FAMILIES, VideoModel
from tests.tiny import WORDS, randomise

TEXT, CHANNELS, TOKENS = 24, 4, 226
TRAINED = {"sample_height": 6, "sample_width": 8, "sample_frames": 9}
KINDS: dict[str, dict[str, Any]] = {
    "cogvideox_2b": TRAINED,
    "cogvideox_5b": {**TRAINED, "use_rotary_positional_embeddings": True},
    "cogvideox_1_5": {
        "use_rotary_positional_embeddings": True,
        "patch_size_t": 2,
        "patch_bias": False,
        # The release's 300 x 300 bound the positions, and this does here.
        "sample_height": 16,
        "sample_width": 16,
        "sample_frames": 9,
    },
}
SNR_SHIFT = {"cogvideox_2b": 3.0, "cogvideox_5b": 1.0, "cogvideox_1_5": 1.0}


def network(name: str, seed: int = 0) -> CogVideoXTransformer3DModel:
    """3 blocks of width 32."""
    module = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=16,
        text_embed_dim=TEXT,
        num_layers=3,
        max_text_seq_length=TOKENS,
        **KINDS[name],
    )
    randomise(module, seed)
    return module.eval().requires_grad_(False)


def spec(name: str) -> LatentSpec:
    """4 latent channels, 4 frames and 8 pixels each way per latent."""
    patch_t = KINDS[name].get("patch_size_t", 1)
    return LatentSpec(CHANNELS, stride_t=4, stride_hw=8, scale=(0.7,), patch=2, patch_t=patch_t)


def video_model(name: str, seed: int = 0) -> VideoModel:
    return VideoModel(network(name, seed), FAMILIES[name], spec(name), source="tiny")


def condition(batch: int = 2, seed: int = 1) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    return Condition(text=torch.randn(batch, TOKENS, TEXT, generator=generator))


def latents(batch: int = 2, frames: int = 2, seed: int = 2) -> torch.Tensor:
    """[B, 4, T, 4, 6]: 32 x 48 pixels, another shape than the networks are trained on."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, frames, 4, 6, generator=generator)


def scheduler(name: str) -> CogVideoXDDIMScheduler:
    """The scheduler of the family's release, deterministic."""
    return CogVideoXDDIMScheduler(
        snr_shift_scale=SNR_SHIFT[name],
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def save_pipeline(folder: Path, name: str, seed: int = 0) -> Path:
    """A complete random CogVideoXPipeline folder."""
    from transformers import T5Config, T5EncoderModel

    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=16, d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    for i, part in enumerate((vae, t5)):
        randomise(part, seed + i)
    pipeline = CogVideoXPipeline(
        tokenizer=_tokenizer(),
        text_encoder=t5.eval(),
        vae=vae.eval(),
        transformer=network(name, seed),
        scheduler=scheduler(name),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TOKENS,
    )

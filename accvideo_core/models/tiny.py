"""The embedded teacher: a HunyuanVideo pipeline of the real classes at a few million parameters.

The text encoders are random and frozen: with a vocabulary of a few dozen words any injective map
will do, and the transformer learns to read it. Everything else is trained by the scripts in
``scripts/tiny_teacher``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..embedded import TINY

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextModel, LlamaModel, PreTrainedTokenizerFast

TEXT_WIDTH = 64
LATENT_CHANNELS = 16
SCALING_FACTOR = 0.5  # not 1, so that a forgotten scaling shows
_SPECIAL = ("<pad>", "<bos>", "<unk>", "<tmpl>", "<eot>")


def embedded_teacher_path() -> Path:
    """The pipeline folder that ships with the package."""
    return TINY.path


def tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that makes HunyuanVideo's prompt template exactly 95 tokens.

    Diffusers cuts the first 95 tokens off; the template's own text is therefore replaced by 94
    fillers behind the beginning-of-sequence token. Unknown words become ``<unk>``.
    """
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate((*_SPECIAL, *vocabulary))}
    prefix, suffix = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
    fillers = DEFAULT_PROMPT_TEMPLATE["crop_start"] - 1
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(prefix, " <tmpl> " * fillers),
            normalizers.Replace(suffix, " <eot> "),
            normalizers.Lowercase(),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )


def text_encoders(vocabulary: Sequence[str], seed: int) -> tuple[LlamaModel, CLIPTextModel]:
    """Random frozen encoders, rounded to float16 so that a saved copy computes the same."""
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    words = len(_SPECIAL) + len(vocabulary)
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=words,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=3,  # the pipeline reads hidden_states[-3]: the first layer's output
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=4,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=TEXT_WIDTH,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=0,  # the pooled vector is read at the first padding token
        )
    )
    generator = torch.Generator().manual_seed(seed)
    for encoder in (llama, clip):
        _randomise(encoder, generator)
        encoder.eval().requires_grad_(False)
    return llama, clip


@torch.no_grad()
def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    # The default std of 0.02 would leave all words nearly alike.
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
        parameter.normal_(0, std, generator=generator)
        parameter.copy_(parameter.half().float())


def transformer() -> HunyuanVideoTransformer3DModel:
    """The untrained denoiser: 2.7 M parameters, width 128, embedded guidance."""
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        rope_axes_dim=(8, 12, 12),
    )


def vae() -> AutoencoderKLHunyuanVideo:
    """The untrained autoencoder: 4x in space, 4x in time (first frame alone), 16 channels."""
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(16, 32, 32),  # type: ignore[arg-type]  # annotated as one number
        layers_per_block=1,
        norm_num_groups=1,
        scaling_factor=SCALING_FACTOR,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
    )


def build_pipeline(vocabulary: Sequence[str], seed: int = 0) -> HunyuanVideoPipeline:
    """The whole pipeline, untrained.

    Args:
        vocabulary: the words that prompts are made of, lower case.
        seed: of the text encoders; the other networks take torch's default initialisation.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    llama, clip = text_encoders(vocabulary, seed)
    return HunyuanVideoPipeline(
        text_encoder=llama,
        tokenizer=tokenizer(vocabulary),  # type: ignore[arg-type]
        transformer=transformer(),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip,
        tokenizer_2=tokenizer(vocabulary),  # type: ignore[arg-type]
    )


def save_pipeline(pipeline: HunyuanVideoPipeline, folder: Path) -> None:
    """Write an ordinary pipeline folder that transformers 4 and 5 both load.

    Transformers 5 names a tokenizer class that 4 does not know; both know the older name.
    """
    pipeline.save_pretrained(folder, safe_serialization=True)
    index = _read(folder / "model_index.json")
    for name in ("tokenizer", "tokenizer_2"):
        index[name] = ["transformers", "PreTrainedTokenizerFast"]
        settings = _read(folder / name / "tokenizer_config.json")
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        _write(folder / name / "tokenizer_config.json", settings)
    _write(folder / "model_index.json", index)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

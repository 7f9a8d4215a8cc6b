"""Very small random HunyuanVideo I2V networks and pipelines, every parameter random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

from accvideo_core.conditioning import Condition
from accvideo_core.latents import LatentSpec
from accvideo_core.models import FAMILIES, VideoModel
from accvideo_core.models import tiny as embedded
from tests.tiny import WORDS, randomise

CONCAT, REPLACE = "hunyuan_video_i2v", "hunyuan_video_i2v_replace"
TEXT, POOLED, CHANNELS = 24, embedded.TEXT_WIDTH, embedded.LATENT_CHANNELS
SPEC = LatentSpec(CHANNELS, stride_t=4, stride_hw=4, scale=(0.5,), patch=2)
KINDS: dict[str, dict[str, Any]] = {
    CONCAT: {
        "in_channels": 2 * CHANNELS + 1,
        "guidance_embeds": False,
        "image_condition_type": "latent_concat",
    },
    REPLACE: {
        "in_channels": CHANNELS,
        "guidance_embeds": True,
        "image_condition_type": "token_replace",
    },
}


def network(name: str, seed: int = 0) -> HunyuanVideoTransformer3DModel:
    """2 dual and 2 single blocks of width 32."""
    module = HunyuanVideoTransformer3DModel(
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 6, 6),
        **KINDS[name],
    )
    randomise(module, seed)
    return module.eval().requires_grad_(False)


def video_model(name: str, seed: int = 0) -> VideoModel:
    return VideoModel(network(name, seed), FAMILIES[name], SPEC, source="tiny")


def condition(batch: int = 2, seed: int = 1) -> Condition:
    """Text of 5 tokens and an image of 16 x 24 pixels."""
    generator = torch.Generator().manual_seed(seed)
    return Condition(
        text=torch.randn(batch, 5, TEXT, generator=generator),
        pooled=torch.randn(batch, POOLED, generator=generator),
        image=torch.randn(batch, CHANNELS, 1, 4, 6, generator=generator),
    )


def latents(batch: int = 2, seed: int = 2) -> torch.Tensor:
    """[B, 16, 3, 4, 6]: 9 frames of 16 x 24 pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, 3, 4, 6, generator=generator)


def build_pipeline(name: str, seed: int = 0) -> HunyuanVideoImageToVideoPipeline:
    """The whole pipeline, with a Llava of a few thousand parameters."""
    from transformers import CLIPImageProcessor

    vae = embedded.vae()
    llava = _llava()
    randomise(vae, seed)
    randomise(llava, seed + 1)
    side = {"shortest_edge": 336}
    pipeline = HunyuanVideoImageToVideoPipeline(
        text_encoder=llava,
        tokenizer=_tokenizer(),
        transformer=network(name, seed),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=embedded.text_encoders(WORDS, seed)[1],
        tokenizer_2=embedded.tokenizer(WORDS),
        image_processor=CLIPImageProcessor(size=side, crop_size={"height": 336, "width": 336}),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(folder: Path, name: str, seed: int = 0) -> Path:
    """A complete random HunyuanVideoImageToVideoPipeline folder."""
    build_pipeline(name, seed).save_pretrained(folder, safe_serialization=True)
    return folder


_SPECIAL = ("<pad>", "<bos>", "<unk>", "<tmpl>", "<nl>", "system", "user", "assistant")
_MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")
_IDS = {word: i for i, word in enumerate((*_SPECIAL, *_MARKS, *WORDS))}


def _llava() -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=336,
            patch_size=14,  # 576 tokens, which the pipeline counts on
        ),
        text_config=LlamaConfig(
            vocab_size=len(_IDS),
            hidden_size=TEXT,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            pad_token_id=0,
        ),
        image_token_index=_IDS["<image>"],
        pad_token_id=0,
    )
    return LlavaForConditionalGeneration(config).eval()


def _tokenizer() -> Any:
    """Word level; the template's own text becomes fillers, so that it has its 103 tokens."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import (
        DEFAULT_PROMPT_TEMPLATE,
    )
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    description = DEFAULT_PROMPT_TEMPLATE["template"].split("<image>\n")[1].split("<|eot_id|>")[0]
    fillers = DEFAULT_PROMPT_TEMPLATE["crop_start"] - 12
    core = Tokenizer(models.WordLevel(_IDS, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(description, "<tmpl> " * fillers),
            normalizers.Replace("\n\n", " <nl> "),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", _IDS["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=list(_MARKS),
        model_max_length=2048,
        padding_side="right",
    )

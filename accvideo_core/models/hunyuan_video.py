"""HunyuanVideo (text to video): the family's entry, over diffusers' HunyuanVideoTransformer3DModel.

Shapes: B batch, C channels, T latent frames, H, W; L text tokens, D token width; h, w token grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioning import Condition
from ..errors import AccVideoError
from ..latents import LatentSpec
from . import context_parallel
from .keys.hunyuan_video import key_table
from .video_model import Family

GUIDANCE = 6.0
TEXT_TOKENS = 256
"""Of the prompt itself, beside the tokens of the template around it."""
TIMESTEPS = 1000.0  # the network counts time and guidance in thousandths


def _latent_spec(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentSpec:
    return LatentSpec(
        # Image to video networks have more input channels: the image's.
        channels=transformer.get("out_channels") or transformer.get("in_channels", 16),
        stride_t=vae.get("temporal_compression_ratio", 4),
        stride_hw=vae.get("spatial_compression_ratio", 8),
        scale=(vae.get("scaling_factor", 0.476986),),
        patch=transformer.get("patch_size", 2),
    )


def _forward(module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """v [B, C, T, H, W]; time and guidance enter the network's sinusoids in float32."""
    if cond.pooled is None:
        raise AccVideoError(
            "the prompt has no pooled text embedding, which HunyuanVideo needs; "
            "encode it with HunyuanVideo's own text encoders (Llama and CLIP-L)"
        )
    guidance = None
    if module.config.guidance_embeds:
        scale = torch.full_like(t, GUIDANCE) if cond.guidance is None else cond.guidance
        guidance = scale.to(t).expand_as(t) * TIMESTEPS
    return module(
        hidden_states=x_t,
        timestep=t * TIMESTEPS,
        encoder_hidden_states=cond.text,
        encoder_attention_mask=cond.full_mask(),
        pooled_projections=cond.pooled,
        guidance=guidance,
        return_dict=False,
    )[0]


def _blocks(module: Any) -> list[nn.Module]:
    return [*module.transformer_blocks, *module.single_transformer_blocks]


def _tail(module: Any) -> nn.Module:
    return module.norm_out


def _tokens(module: Any, output: Any, shape: tuple[int, ...]) -> Tensor:
    """Both kinds of block return (video tokens [B, T*h*w, D], text tokens)."""
    config = module.config
    frames, height, width = shape[2:]
    grid = (frames // config.patch_size_t, height // config.patch_size, width // config.patch_size)
    return output[0].unflatten(1, grid)


def _encode(pipeline: Any, texts: Sequence[str], device: torch.device) -> Condition:
    """Text encoders of a diffusers HunyuanVideoPipeline -> float32 Condition without padding."""
    text, pooled, mask = pipeline.encode_prompt(prompt=list(texts), device=device)
    return Condition(text=text.float(), mask=mask.bool(), pooled=pooled.float()).trim()


def _from_native(text: Tensor, extra: Mapping[str, Any], _spec: LatentSpec) -> Condition:
    """ComfyUI's HunyuanVideo conditioning -> float32 Condition on the CPU.

    `text` [B, L, D]; `extra` holds "pooled_output" [B, P] and maybe "attention_mask" [B, L] and
    "guidance" (6.0 when absent).
    """
    pooled = extra.get("pooled_output")
    if pooled is None:
        raise AccVideoError(
            "this CONDITIONING has no pooled_output, so it was not encoded for HunyuanVideo; "
            "use a DualCLIPLoader of type hunyuan_video (Llama and CLIP-L) to encode the prompt"
        )
    mask = extra.get("attention_mask")
    rows = []
    for i in range(text.shape[0]):
        # Text tokens carry no position: dropping the padded ones, wherever they are, is exact.
        kept = text[i] if mask is None else text[i][mask[i].to(text.device, torch.bool)]
        rows.append(Condition(kept[None].cpu().float(), pooled=pooled[i : i + 1].cpu().float()))
    joined = rows[0] if len(rows) == 1 else Condition.cat(rows)
    return joined.with_guidance(float(extra.get("guidance", GUIDANCE)))


def _is_text_to_video(config: Mapping[str, Any]) -> bool:
    """Networks of others that take an image have no condition type, but more channels in."""
    same = config.get("in_channels", 16) == config.get("out_channels", 16)
    return same and not config.get("image_condition_type")


HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    title="HunyuanVideo",
    matches=_is_text_to_video,
    transformer_class="HunyuanVideoTransformer3DModel",
    pipeline_class="HunyuanVideoPipeline",
    shift=7.0,
    steps=50,
    guidance=GUIDANCE,
    latent_spec=_latent_spec,
    forward=_forward,
    blocks=_blocks,
    tail=_tail,
    tokens=_tokens,
    tables=("rope",),
    texts=("time_text_embed.text_embedder",),
    lora_targets=(
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        "proj_mlp",
        # Numbered, because the network's last layer is called proj_out too and stays as it is.
        *(f"{block}.proj_out" for block in range(100)),
    ),
    key_table=key_table,
    sequence=context_parallel.HUNYUAN_VIDEO,
    encode=_encode,
    text_tokens=TEXT_TOKENS,
    from_native=_from_native,
)

"""HunyuanVideo, text or image to video: Tencent's release names <-> diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import AccVideoError
from .table import KeyTable, Rules, Shapes, fused, one

TITLE = "HunyuanVideo"
CLASS = "HunyuanVideoTransformer3DModel"
MARKERS = (
    "context_embedder.token_refiner.refiner_blocks.0.norm1",
    "transformer_blocks.0.norm1.linear",
)
UNSEEN = ("rope_theta", "rope_axes_dim", "image_condition_type")
PROBE: dict[str, Any] = {
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 4.0,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
}


def key_table(config: Mapping[str, Any]) -> KeyTable:
    """The table of the network with diffusers configuration `config`."""
    head, mlp_ratio = config["attention_head_dim"], config["mlp_ratio"]
    width = config["num_attention_heads"] * head
    mlp = int(width * mlp_ratio)
    pixels = config["patch_size_t"] * config["patch_size"] ** 2 * config["out_channels"]
    rules: Rules = {"img_in.proj": one("x_embedder.proj", width)}
    embedder = "time_text_embed"
    rules |= _pair("time_in.mlp.{}", (0, 2), f"{embedder}.timestep_embedder", width)
    rules |= _pair("vector_in.{}_layer", ("in", "out"), f"{embedder}.text_embedder", width)
    if config["guidance_embeds"]:
        rules |= _pair("guidance_in.mlp.{}", (0, 2), f"{embedder}.guidance_embedder", width)
    rules |= _refiner(config["num_refiner_layers"], width)
    for i in range(config["num_layers"]):
        rules |= _double_block(i, width, head, mlp)
    for i in range(config["num_single_layers"]):
        rules |= _single_block(i, width, head, mlp)
    # Tencent's last layer gives (shift, scale), diffusers' (scale, shift).
    rules["final_layer.adaLN_modulation.1"] = one("norm_out.linear", 2 * width, swap=True)
    rules["final_layer.linear"] = one("proj_out", pixels)
    return KeyTable(rules)


def _pair(native: str, ends: tuple[object, object], layer: str, width: int) -> Rules:
    """The two linear layers of an embedder."""
    return {native.format(end): one(f"{layer}.linear_{i + 1}", width) for i, end in enumerate(ends)}


def _qkv(attn: str, names: tuple[str, str, str], width: int) -> list[tuple[str, int]]:
    return [(f"{attn}.{name}", width) for name in names]


def _refiner(blocks: int, width: int) -> Rules:
    """The refiner of the text tokens, whose MLP is always four times as wide."""
    ours, embedder = "context_embedder", "context_embedder.time_text_embed"
    rules: Rules = {"txt_in.input_embedder": one(f"{ours}.proj_in", width)}
    rules |= _pair("txt_in.t_embedder.mlp.{}", (0, 2), f"{embedder}.timestep_embedder", width)
    rules |= _pair("txt_in.c_embedder.linear_{}", (1, 2), f"{embedder}.text_embedder", width)
    for i in range(blocks):
        a = f"txt_in.individual_token_refiner.blocks.{i}"
        b = f"{ours}.token_refiner.refiner_blocks.{i}"
        rules |= {
            f"{a}.norm1": one(f"{b}.norm1", width),
            f"{a}.self_attn_qkv": fused(*_qkv(f"{b}.attn", ("to_q", "to_k", "to_v"), width)),
            f"{a}.self_attn_proj": one(f"{b}.attn.to_out.0", width),
            f"{a}.norm2": one(f"{b}.norm2", width),
            f"{a}.mlp.fc1": one(f"{b}.ff.net.0.proj", 4 * width),
            f"{a}.mlp.fc2": one(f"{b}.ff.net.2", width),
            f"{a}.adaLN_modulation.1": one(f"{b}.norm_out.linear", 2 * width),
        }
    return rules


def _double_block(i: int, width: int, head: int, mlp: int) -> Rules:
    image = ("norm1", ("to_q", "to_k", "to_v"), "to_out.0", "norm_", "ff")
    text = (
        "norm1_context",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        *("to_add_out", "norm_added_", "ff_context"),
    )
    rules: Rules = {}
    for side, (norm, qkv, out, qk_norm, ff) in (("img", image), ("txt", text)):
        a, b = f"double_blocks.{i}.{side}", f"transformer_blocks.{i}"
        rules |= {
            f"{a}_mod.linear": one(f"{b}.{norm}.linear", 6 * width),
            f"{a}_attn_qkv": fused(*_qkv(f"{b}.attn", qkv, width)),
            f"{a}_attn_q_norm": one(f"{b}.attn.{qk_norm}q", head),
            f"{a}_attn_k_norm": one(f"{b}.attn.{qk_norm}k", head),
            f"{a}_attn_proj": one(f"{b}.attn.{out}", width),
            f"{a}_mlp.fc1": one(f"{b}.{ff}.net.0.proj", mlp),
            f"{a}_mlp.fc2": one(f"{b}.{ff}.net.2", width),
        }
    return rules


def _single_block(i: int, width: int, head: int, mlp: int) -> Rules:
    a, b = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
    qkv = _qkv(f"{b}.attn", ("to_q", "to_k", "to_v"), width)
    return {
        f"{a}.modulation.linear": one(f"{b}.norm.linear", 3 * width),
        f"{a}.linear1": fused(*qkv, (f"{b}.proj_mlp", mlp)),
        f"{a}.q_norm": one(f"{b}.attn.norm_q", head),
        f"{a}.k_norm": one(f"{b}.attn.norm_k", head),
        f"{a}.linear2": one(f"{b}.proj_out", width),
    }


def read(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """(family name, diffusers configuration) of a file.

    Token-replace image to video has the tensors of text to video; only a person can tell them
    apart.
    """
    width, channels, patch_t, patch, _ = shapes["x_embedder.proj"]
    (head,) = shapes["transformer_blocks.0.attn.norm_q"]
    out = shapes["proj_out"][0] // (patch_t * patch**2)
    family, condition = _kind(channels, out)
    return family, {
        "in_channels": channels,
        "out_channels": out,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": shapes.count("transformer_blocks.0.norm1.linear"),
        "num_single_layers": shapes.count("single_transformer_blocks.0.norm.linear"),
        "num_refiner_layers": shapes.count(MARKERS[0]),
        "mlp_ratio": shapes["transformer_blocks.0.ff.net.0.proj"][0] / width,
        "patch_size": patch,
        "patch_size_t": patch_t,
        "qk_norm": "rms_norm",
        "guidance_embeds": shapes.get("time_text_embed.guidance_embedder.linear_1") is not None,
        "text_embed_dim": shapes["context_embedder.proj_in"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1"][1],
        "rope_theta": 256.0,
        "rope_axes_dim": _rope_axes(head),
        "image_condition_type": condition,
    }


def _kind(channels: int, out: int) -> tuple[str, str | None]:
    if channels == out:
        return "hunyuan_video", None
    if channels == 2 * out + 1:  # noise, image, mask
        return "hunyuan_video_i2v", "latent_concat"
    name = "SkyReels-V1 image to video" if channels == 2 * out else "a variant of HunyuanVideo"
    raise AccVideoError(
        f"this file is {name} ({channels} input channels for {out} output channels), which is not "
        f"supported; choose HunyuanVideo ({out}) or HunyuanVideo-I2V ({out} or {2 * out + 1})"
    )


def _rope_axes(head: int) -> tuple[int, int, int]:
    """The official proportions (16, 56, 56) of 128, every axis even."""
    side = head * 7 // 32 * 2
    return head - 2 * side, side, side

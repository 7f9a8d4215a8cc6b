"""Wan 2.1 and 2.2, text and image to video: the release's names <-> diffusers' names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import AccVideoError
from .table import KeyTable, Rules, Shapes, one

TITLE = "Wan"
CLASS = "WanTransformer3DModel"
MARKERS = ("condition_embedder.time_proj", "blocks.0.attn1.to_q")
UNSEEN = ("num_attention_heads", "attention_head_dim", "eps", "rope_max_seq_len")
PROBE: dict[str, Any] = {
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "num_layers": 1,
    "ffn_dim": 512,
    "out_channels": 16,
    "patch_size": (1, 2, 2),
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": 1280,
    "added_kv_proj_dim": 128,
}
HEAD = 128
TI2V_CHANNELS = 48


def key_table(config: Mapping[str, Any]) -> KeyTable:
    """The table of the network with diffusers configuration `config`."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    pixels = config["out_channels"] * math.prod(config["patch_size"])
    embedder = "condition_embedder"
    rules: Rules = {
        "patch_embedding": one("patch_embedding", width),
        "time_embedding.0": one(f"{embedder}.time_embedder.linear_1", width),
        "time_embedding.2": one(f"{embedder}.time_embedder.linear_2", width),
        "time_projection.1": one(f"{embedder}.time_proj", 6 * width),
        "text_embedding.0": one(f"{embedder}.text_embedder.linear_1", width),
        "text_embedding.2": one(f"{embedder}.text_embedder.linear_2", width),
        "head.modulation": one("scale_shift_table", 1),
        "head.head": one("proj_out", pixels),
    }
    image = config.get("image_dim")
    if image is not None:
        rules |= {
            "img_emb.proj.0": one(f"{embedder}.image_embedder.norm1", image),
            "img_emb.proj.1": one(f"{embedder}.image_embedder.ff.net.0.proj", image),
            "img_emb.proj.3": one(f"{embedder}.image_embedder.ff.net.2", width),
            "img_emb.proj.4": one(f"{embedder}.image_embedder.norm2", width),
        }
    for i in range(config["num_layers"]):
        rules |= _block(f"blocks.{i}", width, config)
    return KeyTable(rules)


def _block(block: str, width: int, config: Mapping[str, Any]) -> Rules:
    rules: Rules = {
        f"{block}.modulation": one(f"{block}.scale_shift_table", 1),
        f"{block}.ffn.0": one(f"{block}.ffn.net.0.proj", config["ffn_dim"]),
        f"{block}.ffn.2": one(f"{block}.ffn.net.2", width),
    }
    layers = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    if config["qk_norm"]:
        layers |= {"norm_q": "norm_q", "norm_k": "norm_k"}
    for native, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        a, b = f"{block}.{native}", f"{block}.{ours}"
        rules |= {f"{a}.{x}": one(f"{b}.{y}", width) for x, y in layers.items()}
    if config.get("added_kv_proj_dim") is not None:
        added = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
        a, b = f"{block}.cross_attn", f"{block}.attn2"
        rules |= {f"{a}.{x}": one(f"{b}.{y}", width) for x, y in added.items()}
    if config["cross_attn_norm"]:
        # Each side counts its norms in the order in which it runs them.
        rules[f"{block}.norm3"] = one(f"{block}.norm2", width)
    return rules


def read(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """(family name, diffusers configuration) of a file.

    Heads have width 128 in every release; a smaller network is taken to have one head.
    """
    width, channels, *patch = shapes["patch_embedding"]
    out = shapes["proj_out"][0] // math.prod(patch)
    image = shapes.get("condition_embedder.image_embedder.norm1")
    added = shapes.get("blocks.0.attn2.add_k_proj")
    heads = max(1, width // HEAD)
    time = shapes["condition_embedder.time_embedder.linear_1"]
    return _family(channels, out, image is not None), {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": out,
        "text_dim": shapes["condition_embedder.text_embedder.linear_1"][1],
        "freq_dim": time[1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj"][0],
        "num_layers": shapes.count("blocks.0.attn1.to_q"),
        "cross_attn_norm": shapes.get("blocks.0.norm2") is not None,
        "qk_norm": "rms_norm_across_heads" if shapes.get("blocks.0.attn1.norm_q") else None,
        "eps": 1e-6,
        "image_dim": image[0] if image else None,
        "added_kv_proj_dim": added[1] if added else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def _family(channels: int, out: int, image_tokens: bool) -> str:
    """TI2V-5B is told by the channels of its VAE; an expert of A14B by having no image tokens."""
    if channels == out and not image_tokens:
        return "wan22_ti2v" if out == TI2V_CHANNELS else "wan_t2v"
    if channels == 2 * out + 4 and out != TI2V_CHANNELS:  # noise, mask of 4 frames, image
        return "wan_i2v" if image_tokens else "wan22_i2v"
    raise AccVideoError(
        f"this file is a Wan Fun, control or other variant ({channels} input channels for {out} "
        f"output channels{', image tokens' if image_tokens else ''}), which is not supported; "
        f"choose Wan text to video ({out}) or image to video ({2 * out + 4})"
    )

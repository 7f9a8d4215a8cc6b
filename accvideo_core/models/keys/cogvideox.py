"""CogVideoX 2B, 5B and 1.5, text to video: stock ComfyUI's names <-> diffusers' names.

The releases have diffusers' names. The older ones of the SAT framework have no table: rows of one
of their AdaLN layers alternate between two of diffusers' layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import AccVideoError
from .table import KeyTable, Rules, Shapes, one

TITLE = "CogVideoX"
CLASS = "CogVideoXTransformer3DModel"
MARKERS = ("patch_embed.text_proj", "transformer_blocks.0.norm1.linear")
UNSEEN = (
    *("sample_height", "sample_width", "sample_frames", "temporal_compression_ratio"),
    *("max_text_seq_length", "spatial_interpolation_scale", "temporal_interpolation_scale"),
    "use_rotary_positional_embeddings",
)
PROBE: dict[str, Any] = {
    "num_attention_heads": 1,
    "attention_head_dim": 64,
    "num_layers": 1,
    "time_embed_dim": 512,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": None,
}
WIDTH_2B = 1920


def key_table(config: Mapping[str, Any]) -> KeyTable:
    """The table of the network with diffusers configuration `config`."""
    head, time = config["attention_head_dim"], config["time_embed_dim"]
    width = config["num_attention_heads"] * head
    pixels = config["patch_size"] ** 2 * (config.get("patch_size_t") or 1) * config["out_channels"]
    rules: Rules = {
        "patch_embed.proj": one("patch_embed.proj", width),
        "patch_embed.text_proj": one("patch_embed.text_proj", width),
        "time_embedding_linear_1": one("time_embedding.linear_1", time),
        "time_embedding_linear_2": one("time_embedding.linear_2", time),
    }
    for i in range(config["num_layers"]):
        rules |= _block(f"blocks.{i}", f"transformer_blocks.{i}", width, head)
    return KeyTable(
        rules
        | {
            "norm_final": one("norm_final", width),
            "norm_out.linear": one("norm_out.linear", 2 * width),
            "norm_out.norm": one("norm_out.norm", width),
            "proj_out": one("proj_out", pixels),
        }
    )


def _block(a: str, b: str, width: int, head: int) -> Rules:
    return {
        f"{a}.norm1.linear": one(f"{b}.norm1.linear", 6 * width),
        f"{a}.norm1.norm": one(f"{b}.norm1.norm", width),
        f"{a}.q": one(f"{b}.attn1.to_q", width),
        f"{a}.k": one(f"{b}.attn1.to_k", width),
        f"{a}.v": one(f"{b}.attn1.to_v", width),
        f"{a}.norm_q": one(f"{b}.attn1.norm_q", head),
        f"{a}.norm_k": one(f"{b}.attn1.norm_k", head),
        f"{a}.attn_out": one(f"{b}.attn1.to_out.0", width),
        f"{a}.norm2.linear": one(f"{b}.norm2.linear", 6 * width),
        f"{a}.norm2.norm": one(f"{b}.norm2.norm", width),
        f"{a}.ff_proj": one(f"{b}.ff.net.0.proj", 4 * width),
        f"{a}.ff_out": one(f"{b}.ff.net.2", width),
    }


def read(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """(family name, diffusers configuration) of a file.

    2B and 5B differ in nothing but size; a network as wide as 2B or narrower is taken for one. 1.5
    embeds patches of two frames with a linear layer.
    """
    width, *patch = shapes["patch_embed.proj"]
    (head,) = shapes["transformer_blocks.0.attn1.norm_q"]
    newer = len(patch) == 1
    channels, size = (patch[0] // 8, 2) if newer else (patch[0], patch[1])
    out = shapes["proj_out"][0] // (size**2 * (2 if newer else 1))
    _check_channels(channels, out)
    small = width <= WIDTH_2B and not newer
    time, text = shapes["time_embedding.linear_1"], shapes["patch_embed.text_proj"]
    family = "cogvideox_1_5" if newer else "cogvideox_2b" if small else "cogvideox_5b"
    return family, {
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "in_channels": channels,
        "out_channels": out,
        "time_embed_dim": time[0],
        "text_embed_dim": text[1],
        "num_layers": shapes.count("transformer_blocks.0.norm1.linear"),
        "attention_bias": shapes.get("transformer_blocks.0.attn1.to_q", "bias") is not None,
        "patch_size": size,
        "patch_size_t": 2 if newer else None,
        "patch_bias": not newer and shapes.get("patch_embed.proj", "bias") is not None,
        **_positions(rotary=not small, newer=newer),
    }


def _positions(rotary: bool, newer: bool) -> dict[str, Any]:
    """What the positions are made of and for; no tensor shows it."""
    height, width, frames = (96, 170, 81) if newer else (60, 90, 49)
    return {
        "sample_height": height,
        "sample_width": width,
        "sample_frames": frames,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 226,
        "spatial_interpolation_scale": 1.875,
        "temporal_interpolation_scale": 1.0,
        "use_rotary_positional_embeddings": rotary,
        "use_learned_positional_embeddings": False,
    }


def _check_channels(channels: int, out: int) -> None:
    if channels == out:
        return
    kind = "image to video" if channels == 2 * out else "an inpainting or control variant"
    raise AccVideoError(
        f"this file is CogVideoX {kind} ({channels} input channels for {out} output channels), "
        f"which is not supported; choose CogVideoX text to video ({out})"
    )

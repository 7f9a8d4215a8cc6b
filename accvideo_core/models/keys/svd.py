"""Stable Video Diffusion's UNet: the release's names, which are ComfyUI's, <-> diffusers' names.

The release counts the layers of encoder and decoder through (`input_blocks`, `output_blocks`), with
what enlarges or shrinks between them; diffusers counts levels, and layers in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any

from ...errors import AccVideoError
from .table import KeyTable, Rules, Shapes, one

TITLE = "Stable Video Diffusion"
CLASS = "UNetSpatioTemporalConditionModel"
MARKERS = ("add_embedding.linear_1", "down_blocks.0.resnets.0.temporal_res_block.conv1")
UNSEEN = ("num_attention_heads", "num_frames", "sample_size")
PROBE: dict[str, Any] = {
    "out_channels": 4,
    "block_out_channels": (320,),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal",),
    "layers_per_block": 1,
}
HEAD = 64
IDS = 3
"""Numbers that the network is told beside the image."""

_BLOCK = {
    **{name: (name, 1) for name in ("norm1", "norm2", "norm3")},
    **{
        f"{attn}.{name}": (f"{attn}.{name}", 1)
        for attn in ("attn1", "attn2")
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    },
    "ff.net.0.proj": ("ff.net.0.proj", 8),
    "ff.net.2": ("ff.net.2", 1),
}
"""Layers of a transformer block: native -> (diffusers, rows in widths of the block)."""
_TIME_BLOCK = _BLOCK | {
    "norm_in": ("norm_in", 1),
    "ff_in.net.0.proj": ("ff_in.net.0.proj", 8),
    "ff_in.net.2": ("ff_in.net.2", 1),
}


def key_table(config: Mapping[str, Any]) -> KeyTable:
    """The table of the network with diffusers configuration `config`."""
    widths = tuple(config["block_out_channels"])
    time = 4 * widths[0]
    return KeyTable(
        {
            "time_embed.0": one("time_embedding.linear_1", time),
            "time_embed.2": one("time_embedding.linear_2", time),
            "label_emb.0.0": one("add_embedding.linear_1", time),
            "label_emb.0.2": one("add_embedding.linear_2", time),
            "input_blocks.0.0": one("conv_in", widths[0]),
            **_encoder(widths, config),
            **_resnet("middle_block.0", "mid_block.resnets.0", widths[-1], widths[-1]),
            **_transformer("middle_block.1", "mid_block.attentions.0", widths[-1], config),
            **_resnet("middle_block.2", "mid_block.resnets.1", widths[-1], widths[-1]),
            **_decoder(widths, config),
            "out.0": one("conv_norm_out", widths[0]),
            "out.2": one("conv_out", config["out_channels"]),
        }
    )


def _attends(config: Mapping[str, Any]) -> list[bool]:
    """Of each level of the encoder, whether it attends."""
    return [kind.startswith("CrossAttn") for kind in config["down_block_types"]]


def _encoder(widths: tuple[int, ...], config: Mapping[str, Any]) -> Rules:
    rules: Rules = {}
    numbers, inner = count(1), widths[0]
    for level, (width, attends) in enumerate(zip(widths, _attends(config), strict=True)):
        b = f"down_blocks.{level}"
        for i in range(config["layers_per_block"]):
            a = f"input_blocks.{next(numbers)}"
            rules |= _resnet(f"{a}.0", f"{b}.resnets.{i}", inner, width)
            if attends:
                rules |= _transformer(f"{a}.1", f"{b}.attentions.{i}", width, config)
            inner = width
        if level < len(widths) - 1:
            a = f"input_blocks.{next(numbers)}"
            rules[f"{a}.0.op"] = one(f"{b}.downsamplers.0.conv", width)
    return rules


def _decoder(widths: tuple[int, ...], config: Mapping[str, Any]) -> Rules:
    """From the deepest level up; its layers see what the encoder's gave, the last first."""
    rules: Rules = {}
    layers, attention = config["layers_per_block"], _attends(config)
    numbers, inner = count(), widths[-1]
    for up, level in enumerate(reversed(range(len(widths)))):
        width, above = widths[level], widths[max(level - 1, 0)]
        for i in range(layers + 1):
            a, b = f"output_blocks.{next(numbers)}", f"up_blocks.{up}"
            seen = above if i == layers else width
            rules |= _resnet(f"{a}.0", f"{b}.resnets.{i}", inner + seen, width)
            if attention[level]:
                rules |= _transformer(f"{a}.1", f"{b}.attentions.{i}", width, config)
            inner = width
            if i == layers and level:
                place = f"{a}.{1 + attention[level]}.conv"
                rules[place] = one(f"{b}.upsamplers.0.conv", width)
    return rules


def _resnet(a: str, b: str, inner: int, width: int) -> Rules:
    """A layer over frames and one along time, from `inner` channels to `width`."""
    rules: Rules = {f"{a}.time_mixer.mix_factor": one(f"{b}.time_mixer.mix_factor", 1)}
    if inner != width:
        rules[f"{a}.skip_connection"] = one(f"{b}.spatial_res_block.conv_shortcut", width)
    for x, y, channels in ((a, "spatial_res_block", inner), (f"{a}.time_stack", "", width)):
        y = f"{b}.{y or 'temporal_res_block'}"
        rules |= {
            f"{x}.in_layers.0": one(f"{y}.norm1", channels),
            f"{x}.in_layers.2": one(f"{y}.conv1", width),
            f"{x}.emb_layers.1": one(f"{y}.time_emb_proj", width),
            f"{x}.out_layers.0": one(f"{y}.norm2", width),
            f"{x}.out_layers.3": one(f"{y}.conv2", width),
        }
    return rules


def _transformer(a: str, b: str, width: int, config: Mapping[str, Any]) -> Rules:
    rules: Rules = {f"{a}.{name}": one(f"{b}.{name}", width) for name in ("norm", "proj_in")}
    for i in range(config.get("transformer_layers_per_block", 1)):
        for x, y, layers in (
            ("transformer_blocks", "transformer_blocks", _BLOCK),
            ("time_stack", "temporal_transformer_blocks", _TIME_BLOCK),
        ):
            for native, (ours, rows) in layers.items():
                rules[f"{a}.{x}.{i}.{native}"] = one(f"{b}.{y}.{i}.{ours}", rows * width)
    return rules | {
        f"{a}.time_pos_embed.0": one(f"{b}.time_pos_embed.linear_1", 4 * width),
        f"{a}.time_pos_embed.2": one(f"{b}.time_pos_embed.linear_2", width),
        f"{a}.time_mixer.mix_factor": one(f"{b}.time_mixer.mix_factor", 1),
        f"{a}.proj_out": one(f"{b}.proj_out", width),
    }


def read(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """(family name, diffusers configuration) of a file.

    Heads have width 64 in both releases; a narrower level is taken to have one head. The releases
    of 14 and of 25 frames have the same tensors.
    """
    layers, attends = _structure(shapes)
    kinds = {True: "CrossAttn{}BlockSpatioTemporal", False: "{}BlockSpatioTemporal"}
    config: dict[str, Any] = {
        "down_block_types": tuple(kinds[x].format("Down") for x in attends),
        "up_block_types": tuple(kinds[x].format("Up") for x in reversed(attends)),
        "layers_per_block": layers,
        "transformer_layers_per_block": 1,
    }
    probe = key_table(config | {"block_out_channels": (1,) * len(attends), "out_channels": 1})
    known = Shapes(shapes.shapes, probe, shapes.naming)
    first = "down_blocks.{}.resnets.0.spatial_res_block.conv1"
    widths = tuple(known[first.format(level)][0] for level in range(len(attends)))
    inputs, outputs = known["conv_in"][1], known["conv_out"][0]
    told = known["add_embedding.linear_1"][1]
    if inputs != 2 * outputs or told % IDS:
        raise AccVideoError(
            f"this file is SV3D or another variant of Stable Video Diffusion ({inputs} input "
            f"channels for {outputs} output channels, {told} numbers beside the image), which is "
            "not supported; choose svd or svd_xt"
        )
    return "svd", config | {
        "in_channels": inputs,
        "out_channels": outputs,
        "block_out_channels": widths,
        "addition_time_embed_dim": told // IDS,
        "projection_class_embeddings_input_dim": told,
        "cross_attention_dim": known["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"][1],
        "num_attention_heads": tuple(max(1, width // HEAD) for width in widths),
        "num_frames": 14,
        "sample_size": 96,
    }


def _structure(shapes: Shapes) -> tuple[int, list[bool]]:
    """(layers in each level of the encoder, for each level whether it attends)."""

    def number(pattern: str, start: int = 0) -> int:
        found = takewhile(lambda i: f"{pattern.format(i)}.weight" in shapes.shapes, count(start))
        return len(list(found))

    if shapes.naming == "diffusers":
        resnet = "down_blocks.{}.resnets.{}.spatial_res_block.conv1"
        levels, layers = number(resnet.format("{}", 0)), number(resnet.format(0, "{}"))
        places = [f"down_blocks.{level}.attentions.0.norm" for level in range(levels)]
    else:
        layers = number("input_blocks.{}.0.in_layers.0", start=1)
        step = layers + 1
        downs = (f"input_blocks.{step * (i + 1)}.0.op.weight" for i in count())
        levels = 1 + len(list(takewhile(lambda name: name in shapes.shapes, downs)))
        places = [f"input_blocks.{step * level + 1}.1.norm" for level in range(levels)]
    return layers, [f"{place}.weight" in shapes.shapes for place in places]

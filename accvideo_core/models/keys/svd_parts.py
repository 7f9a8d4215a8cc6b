"""What stands beside the UNet in a Stable Video Diffusion checkpoint: its VAE and image encoder.

The release holds the VAE's encoder twice. The one that its image conditions are made with lies with
the conditioner, and has a last 1 x 1 convolution (`quant_conv`); diffusers has that one. The other
lies with the decoder and has none; ComfyUI computes with that one. The CLIP image encoder has the
names of OpenCLIP.

States here are without the prefixes of a checkpoint's parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .table import KeyTable, Rules, fused, one

State = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
QUANT = "quant_conv"
_HEAD = 80


# The VAE --------------------------------------------------------------------------------------


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """diffusers' configuration of AutoencoderKLTemporalDecoder from native names and shapes."""
    levels = _number(shapes, "encoder.down.{}.block.0.conv1.weight")
    widths = tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels))
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "layers_per_block": _number(shapes, "encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "force_upcast": True,
    }


def vae_table(config: Mapping[str, Any]) -> KeyTable:
    """The table of the VAE with diffusers configuration `config`, without `quant_conv`."""
    widths, layers = tuple(config["block_out_channels"]), config["layers_per_block"]
    latent, deep, last = config["latent_channels"], widths[-1], len(widths) - 1
    rules: Rules = {
        "encoder.conv_in": one("encoder.conv_in", widths[0]),
        "decoder.conv_in": one("decoder.conv_in", deep),
        **_attention("encoder", deep),
        **_attention("decoder", deep),
    }
    for i in range(2):
        rules |= _resnet(f"encoder.mid.block_{i + 1}", f"encoder.mid_block.resnets.{i}", deep, deep)
    for i in range(layers):
        a, b = f"decoder.mid.block_{i + 1}", f"decoder.mid_block.resnets.{i}"
        rules |= _video_resnet(a, b, deep, deep)
    inner = widths[0]
    for level, width in enumerate(widths):
        a, b = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        for i in range(layers):
            rules |= _resnet(f"{a}.block.{i}", f"{b}.resnets.{i}", inner, width)
            inner = width
        if level < last:
            rules[f"{a}.downsample.conv"] = one(f"{b}.downsamplers.0.conv", width)
    for level, width in reversed([*enumerate(widths)]):
        a, b = f"decoder.up.{level}", f"decoder.up_blocks.{last - level}"
        for i in range(layers + 1):
            rules |= _video_resnet(f"{a}.block.{i}", f"{b}.resnets.{i}", inner, width)
            inner = width
        if level:
            rules[f"{a}.upsample.conv"] = one(f"{b}.upsamplers.0.conv", width)
    for side, width, out in (("encoder", deep, 2 * latent), ("decoder", widths[0], 3)):
        rules[f"{side}.norm_out"] = one(f"{side}.conv_norm_out", width)
        rules[f"{side}.conv_out"] = one(f"{side}.conv_out", out)
    return KeyTable(rules | {"decoder.conv_out.time_mix_conv": one("decoder.time_conv_out", 3)})


def _resnet(a: str, b: str, inner: int, width: int) -> Rules:
    rules: Rules = {
        f"{a}.norm1": one(f"{b}.norm1", inner),
        f"{a}.conv1": one(f"{b}.conv1", width),
        f"{a}.norm2": one(f"{b}.norm2", width),
        f"{a}.conv2": one(f"{b}.conv2", width),
    }
    if inner != width:
        rules[f"{a}.nin_shortcut"] = one(f"{b}.conv_shortcut", width)
    return rules


def _video_resnet(a: str, b: str, inner: int, width: int) -> Rules:
    time = f"{b}.temporal_res_block"
    return _resnet(a, f"{b}.spatial_res_block", inner, width) | {
        f"{a}.mix_factor": one(f"{b}.time_mixer.mix_factor", 1),
        f"{a}.time_stack.in_layers.0": one(f"{time}.norm1", width),
        f"{a}.time_stack.in_layers.2": one(f"{time}.conv1", width),
        f"{a}.time_stack.out_layers.0": one(f"{time}.norm2", width),
        f"{a}.time_stack.out_layers.3": one(f"{time}.conv2", width),
    }


def _attention(side: str, width: int) -> Rules:
    a, b = f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"
    layers = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    return {f"{a}.{x}": one(f"{b}.{y}", width) for x, y in layers.items()}


def vae_from_native(state: State, table: KeyTable) -> dict[str, Tensor]:
    """Native -> diffusers; without a `quant_conv` one that changes nothing."""
    found = {name: x for name, x in state.items() if name.startswith(f"{QUANT}.")}
    if not found:
        out = state["encoder.conv_out.bias"]
        eye = torch.eye(len(out), dtype=out.dtype)[:, :, None, None]
        found = {f"{QUANT}.weight": eye, f"{QUANT}.bias": torch.zeros_like(out)}
    for name, x in state.items():
        if not name.startswith(f"{QUANT}."):
            x = x.flatten(1) if _is_projection(name) else x  # convolutions of 1 x 1
            found |= dict(table.to_diffusers(name, x))
    return found


def vae_to_native(state: State, table: KeyTable) -> dict[str, Tensor]:
    """The inverse of `vae_from_native`, `quant_conv` included."""
    quant = {name: x for name, x in state.items() if name.startswith(f"{QUANT}.")}
    others = {name: x for name, x in state.items() if name not in quant}
    native = table.to_native(others)
    return quant | {n: x[:, :, None, None] if _is_projection(n) else x for n, x in native.items()}


def without_quant(native: State) -> dict[str, Tensor]:
    """A native VAE whose `quant_conv` has become part of the convolution before it; exact."""
    found = {name: x for name, x in native.items() if not name.startswith(f"{QUANT}.")}
    w, b = native[f"{QUANT}.weight"].double().flatten(1), native[f"{QUANT}.bias"].double()
    for name, extra in (("encoder.conv_out.weight", 0), ("encoder.conv_out.bias", b)):
        x = found[name]
        found[name] = (torch.einsum("ij,j...->i...", w, x.double()) + extra).to(x.dtype)
    return found


def _is_projection(name: str) -> bool:
    return ".mid.attn_1." in name and name.endswith(".weight") and ".norm." not in name


# The image encoder ----------------------------------------------------------------------------


def vision_config(shapes: Shapes) -> dict[str, Any]:
    """transformers' configuration of CLIPVisionModelWithProjection, from OpenCLIP's names and
    shapes or from its own.

    ViT-H, which is the release's, has heads of 80; a narrower encoder is taken to have one head.
    """
    if "conv1.weight" in shapes:
        patches, places = shapes["conv1.weight"], shapes["positional_embedding"]
        inner, projection = "transformer.resblocks.{}.mlp.c_fc.weight", shapes["proj"][1]
    else:
        embeddings = "vision_model.embeddings"
        patches = shapes[f"{embeddings}.patch_embedding.weight"]
        places = shapes[f"{embeddings}.position_embedding.weight"]
        inner = "vision_model.encoder.layers.{}.mlp.fc1.weight"
        projection = shapes["visual_projection.weight"][0]
    hidden, _, patch, _ = patches
    return {
        "hidden_size": hidden,
        "intermediate_size": shapes[inner.format(0)][0],
        "projection_dim": projection,
        "num_hidden_layers": _number(shapes, inner),
        "num_attention_heads": max(1, hidden // _HEAD),
        "image_size": round((places[0] - 1) ** 0.5) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def vision_table(config: Mapping[str, Any]) -> KeyTable:
    """The table of the encoder; what OpenCLIP has as bare parameters are layers here."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    tokens = (config["image_size"] // config["patch_size"]) ** 2 + 1
    model = "vision_model"
    rules: Rules = {
        "class_embedding": one(f"{model}.embeddings.class_embedding", width),
        "positional_embedding": one(f"{model}.embeddings.position_embedding", tokens),
        "conv1": one(f"{model}.embeddings.patch_embedding", width),
        "ln_pre": one(f"{model}.pre_layrnorm", width),
        "ln_post": one(f"{model}.post_layernorm", width),
        "proj": one("visual_projection", config["projection_dim"]),
    }
    for i in range(config["num_hidden_layers"]):
        a, b = f"transformer.resblocks.{i}", f"{model}.encoder.layers.{i}"
        attn = [(f"{b}.self_attn.{name}_proj", width) for name in "qkv"]
        rules |= {
            f"{a}.ln_1": one(f"{b}.layer_norm1", width),
            f"{a}.attn.in_proj": fused(*attn),
            f"{a}.attn.out_proj": one(f"{b}.self_attn.out_proj", width),
            f"{a}.ln_2": one(f"{b}.layer_norm2", width),
            f"{a}.mlp.c_fc": one(f"{b}.mlp.fc1", inner),
            f"{a}.mlp.c_proj": one(f"{b}.mlp.fc2", width),
        }
    return KeyTable(rules)


_BARE = ("positional_embedding", "proj")


def vision_from_native(state: State, table: KeyTable) -> dict[str, Tensor]:
    """OpenCLIP -> transformers."""
    found: dict[str, Tensor] = {}
    for name, x in state.items():
        layer = name.replace(".attn.in_proj_", ".attn.in_proj.")
        layer = f"{layer}.weight" if name in _BARE else layer
        # OpenCLIP multiplies by its projection from the right.
        found |= dict(table.to_diffusers(layer, x.T if name == "proj" else x))
    return found


def vision_to_native(state: State, table: KeyTable) -> dict[str, Tensor]:
    """The inverse of `vision_from_native`; older transformers' table of places is left out."""
    known = {name: x for name, x in state.items() if not name.endswith("position_ids")}
    found = {}
    for layer, x in table.to_native(known).items():
        name = layer.removesuffix(".weight") if layer.removesuffix(".weight") in _BARE else layer
        name = name.replace(".attn.in_proj.", ".attn.in_proj_")
        found[name] = x.T.contiguous() if name == "proj" else x
    return found


def _number(shapes: Shapes, pattern: str) -> int:
    return next(i for i in count() if pattern.format(i) not in shapes)

"""One block of each kind at its real width, where head counts and fused rows must be right.

Shapes: L tokens of video then text, D token width; one sample, a video grid of 2 x 2 x 2 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from accvideo_core.latents import seeded_noise

from . import official
from .regenerate import Tensors, weight

GRID = (2, 2, 2)
ROPE = [16, 56, 56]
VIDEO, TEXT, VALID = 8, 5, 4
HUNYUAN_WIDTH, WAN_WIDTH, WAN_FFN = 3072, 5120, 13824


@dataclass(frozen=True, slots=True)
class Block:
    """One block: where its parameters lie in the native network, and how to build and run it."""

    name: str
    code: str
    prefix: str
    """Of its parameters' native names."""
    family: str
    config: dict[str, Any]
    """Of a diffusers network that has this block."""
    build: Callable[[Any], nn.Module]
    run: Callable[[nn.Module, ModuleType, Tensors], Tensors]
    """(block, code, inputs) -> outputs."""
    inputs: dict[str, tuple[int, ...]]
    seed: int


def make(case: Block, code: ModuleType) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and header of one block's reference file."""
    with torch.device("meta"):
        block = case.build(code)
    block.eval().requires_grad_(False)
    shapes = {name: list(p.shape) for name, p in block.named_parameters()}
    for name, shape in shapes.items():
        value = {name: weight(f"{case.prefix}.{name}", tuple(shape), case.seed)}
        block.load_state_dict(value, strict=False, assign=True)
    inputs = {
        name: seeded_noise(shape, "parity", case.seed, "input", name)
        for name, shape in case.inputs.items()
    }
    with torch.no_grad():
        outputs = case.run(block, code, inputs)
    info = {
        "family": case.family,
        "code": case.code,
        "seed": case.seed,
        "config": case.config,
        "grid": GRID,
        "valid": VALID,
        "parameters": {f"{case.prefix}.{name}": shape for name, shape in shapes.items()},
    }
    return {**inputs, **{f"out.{name}": x for name, x in outputs.items()}}, info


def _segments() -> dict[str, Any]:
    mask = (torch.arange(TEXT) < VALID)[None]
    ends = official.cu_seqlens(mask, VIDEO)
    longest = VIDEO + TEXT
    return {
        "cu_seqlens_q": ends,
        "cu_seqlens_kv": ends,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
    }


def _run_double(block: nn.Module, code: ModuleType, x: Tensors) -> Tensors:
    video, text = block(
        x["video"],
        x["text"],
        x["vec"],
        **_segments(),
        freqs_cis=official.hunyuan_rope(code, ROPE, GRID),
    )
    return {"video": video, "text": text[:, :VALID]}


def _run_single(block: nn.Module, code: ModuleType, x: Tensors) -> Tensors:
    both = torch.cat([x["video"], x["text"]], 1)
    out = block(
        both, x["vec"], TEXT, **_segments(), freqs_cis=official.hunyuan_rope(code, ROPE, GRID)
    )
    return {"video": out[:, :VIDEO], "text": out[:, VIDEO : VIDEO + VALID]}


def _run_wan(block: nn.Module, code: Any, x: Tensors) -> Tensors:
    head = 128
    axes = (head - 4 * (head // 6), 2 * (head // 6), 2 * (head // 6))
    freqs = torch.cat([code.rope_params(1024, axis) for axis in axes], dim=1)
    out = block(
        x["video"],
        e=x["time"],
        seq_lens=torch.tensor([VIDEO]),
        grid_sizes=torch.tensor([GRID]),
        freqs=freqs,
        context=x["text"],
        context_lens=None,
    )
    return {"video": out}


_HUNYUAN_INPUTS = {
    "video": (1, VIDEO, HUNYUAN_WIDTH),
    "text": (1, TEXT, HUNYUAN_WIDTH),
    "vec": (1, HUNYUAN_WIDTH),
}
_HUNYUAN_CONFIG = {"num_layers": 1, "num_single_layers": 1}  # diffusers' defaults are the release

BLOCKS: tuple[Block, ...] = (
    Block(
        "block_hunyuan_double",
        "hunyuan",
        "double_blocks.0",
        "hunyuan_video",
        _HUNYUAN_CONFIG,
        lambda code: code.MMDoubleStreamBlock(HUNYUAN_WIDTH, 24, 4.0, qkv_bias=True),
        _run_double,
        _HUNYUAN_INPUTS,
        seed=21,
    ),
    Block(
        "block_hunyuan_single",
        "hunyuan",
        "single_blocks.0",
        "hunyuan_video",
        _HUNYUAN_CONFIG,
        lambda code: code.MMSingleStreamBlock(HUNYUAN_WIDTH, 24, 4.0),
        _run_single,
        _HUNYUAN_INPUTS,
        seed=22,
    ),
    Block(
        "block_wan",
        "wan21",
        "blocks.0",
        "wan_t2v",
        {"num_layers": 1},
        lambda code: code.WanAttentionBlock(
            "t2v_cross_attn", WAN_WIDTH, WAN_FFN, 40, cross_attn_norm=True
        ),
        _run_wan,
        {"video": (1, VIDEO, WAN_WIDTH), "text": (1, 6, WAN_WIDTH), "time": (1, 6, WAN_WIDTH)},
        seed=23,
    ),
)

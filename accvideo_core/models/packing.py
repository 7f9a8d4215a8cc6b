"""Packing a loaded teacher's weights into fewer bits, so that one copy of them takes less memory.

Only the linear layers of the blocks are packed: they hold nearly all weights and bear rounding.
Embeddings, norms and the output layers stay as they are.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import AccVideoError
from .experts import blocks_of
from .quantised import Fp8Linear, Nf4Linear, PackedLinear
from .video_model import VideoModel

_FP8 = torch.float8_e4m3fn


def pack_fp8(weight: Tensor, bias: Tensor | None = None) -> Fp8Linear:
    """`weight` [O, I] in e4m3, with a scale per row that makes its largest number fp8's largest."""
    rows = weight.float()
    largest = rows.abs().amax(dim=1, keepdim=True)
    # A row of zeros has no largest number to divide by.
    scale = (largest / torch.finfo(_FP8).max).clamp_min(torch.finfo(torch.float32).tiny)
    return Fp8Linear((rows / scale).to(_FP8), scale, bias)


def pack_nf4(weight: Tensor, bias: Tensor | None = None) -> Nf4Linear:
    """`weight` [O, I] in NF4: four bits a number, and a float32 scale for every 64 of them."""
    return Nf4Linear.pack(weight.float(), bias)


PACKERS: dict[str, Callable[[Tensor, Tensor | None], PackedLinear]] = {
    "fp8": pack_fp8,
    "nf4": pack_nf4,
}


def pack_weights(
    model: VideoModel, how: str, device: torch.device | str | None = None
) -> VideoModel:
    """The model with the linear layers of its blocks packed.

    `model` is used up: its layers are replaced one after the other, each freed before the next is
    packed, so that the weights never exist twice. The fingerprint stays that of the unpacked
    weights, so that datasets and students of the unpacked teacher fit this one.

    Args:
        model: loaded; linear layers that its file had packed stay as they are.
        how: "fp8" or "nf4".
        device: where the model goes, layer by layer, packed there; None leaves it where it is.

    Raises:
        AccVideoError: `how` is unknown, nothing is left to pack, or NF4's library is missing.
    """
    if how not in PACKERS:
        raise AccVideoError(f"weights {how!r} are unknown; choose one of {', '.join(PACKERS)}")
    fingerprint, target = model.fingerprint, model.device if device is None else device
    # Parameters made inside inference mode could never be trained against.
    with torch.inference_mode(False), torch.no_grad():
        packed = sum(
            _pack_block(block, PACKERS[how], target)
            for blocks in blocks_of(model)
            for block in blocks
        )
        model.module.to(target)
    if not packed:
        raise AccVideoError(
            f"the weights of {model.source or 'the teacher'} are packed already; leave out weights "
            f"{how}, or load the bf16 file"
        )
    source = f"{model.source or model.family.name} ({how})"
    return replace(model, source=source, _fingerprint=fingerprint)


def _pack_block(
    block: nn.Module,
    pack: Callable[[Tensor, Tensor | None], PackedLinear],
    device: torch.device | str,
) -> int:
    """Replace a block's plain linear layers; how many there were.

    A LoRA beside a layer (`AdaptedLinear`) stays, and the layer under it is packed.
    """
    # Names only: holding the layers would keep their weights alive.
    names = [name for name, layer in block.named_modules() if type(layer) is nn.Linear]
    for name in names:
        path, _, last = name.rpartition(".")
        owner, layer = block.get_submodule(path), cast(nn.Linear, block.get_submodule(name))
        bias = None if layer.bias is None else layer.bias.to(device)
        setattr(owner, last, pack(layer.weight.to(device), bias).eval())
        del layer
    return len(names)

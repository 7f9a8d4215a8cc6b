"""Very small random tiny decoders, in files as they are published."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]


def weights(channels: int, patch: int, widths: tuple[int, ...] = (16, 8, 8, 4)) -> Weights:
    """Random tensors under the names of a published file, parts of an encoder among them."""
    a, b, c, d = widths
    shapes: dict[str, tuple[int, ...]] = {"encoder.0.weight": (64, 3, 3, 3)}

    def conv(name: str, before: int, after: int, size: int = 3, bias: bool = True) -> None:
        shapes[f"decoder.{name}.weight"] = (after, before, size, size)
        if bias:
            shapes[f"decoder.{name}.bias"] = (after,)

    conv("1", channels, a)
    for stage, (width, after, grow) in enumerate(((a, b, 1), (b, c, 2), (c, d, 2))):
        for block in range(3):
            for part, before in ((0, 2 * width), (2, width), (4, width)):
                conv(f"{3 + 6 * stage + block}.conv.{part}", before, width)
        conv(f"{7 + 6 * stage}.conv", width, width * grow, 1, bias=False)
        conv(f"{8 + 6 * stage}", width, after, bias=False)
    conv("22", d, 3 * patch**2)
    generator = torch.Generator().manual_seed(channels + patch)
    made = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    scaled = {n: x * (x[0].numel() ** -0.5 if x.dim() > 1 else 0.1) for n, x in made.items()}
    scaled["decoder.22.bias"] += 0.5  # so that few of the pixels are cut at 0 and 1
    return scaled


def write(path: Path, tensors: Weights) -> Path:
    torch.save(tensors, path) if path.suffix == ".pth" else save_file(tensors, path)
    return path

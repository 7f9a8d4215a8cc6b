"""What a reference file does not hold, because both sides make it again from names and seeds.

Shapes: B batch, C channels, T latent frames, H, W.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from accvideo_core.latents import key_generator

Tensors = dict[str, Tensor]


def weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The value of one native parameter, float32.

    Official initialisation leaves gates and biases at zero, where most errors would not show, so
    every parameter is noise: matrices keep the variance of what they are applied to, norms stay
    near one. The noise is uniform, of variance one: torch's uniform numbers are the same on every
    processor, its normal ones differ in their last bits.
    """
    uniform = torch.rand(shape, generator=key_generator("parity", seed, name))
    noise = (2 * uniform - 1) * math.sqrt(3)
    if len(shape) == 1:
        return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    if name.endswith("modulation"):
        return 0.5 * noise
    return noise / math.sqrt(math.prod(shape[1:]))


def velocity(x_t: Tensor, t: float) -> Tensor:
    """A fixed velocity field for samplers: bent in x_t and in t, so that no two steps are alike."""
    return torch.tanh(x_t) * (0.5 + t) + 0.25 * torch.sin(3.0 * x_t + 2.0 * t)


def save_reference(path: Path, tensors: Tensors, info: dict[str, Any]) -> None:
    """One reference file: float32 tensors, and everything else as JSON in the header."""
    kept = {name: x.detach().clone().contiguous() for name, x in tensors.items()}
    save_file(kept, path, metadata={"reference": json.dumps(info, sort_keys=True)})


def load_reference(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, info), as `save_reference` was given them."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, json.loads(file.metadata()["reference"])

"""Networks on ComfyUI's device while they work, and away from it when they do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import comfy.model_management as management
import torch
from torch import nn

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher

HEADROOM = 1.2
"""Memory asked for, in units of the weights: activations need some as well."""


@contextmanager
def on_device(teacher: Teacher, *modules: nn.Module) -> Iterator[list[nn.Module]]:
    """Have the teacher and the modules on ComfyUI's device for the block, making room there first.

    Yields the list of what is put away afterwards; append modules that were made in the block.
    A student shares its teacher's weights, so they move as one and no ModelPatcher, which would
    count them twice, holds them.
    """
    device = management.get_torch_device()
    placed = list(modules)
    if device.type == "cpu":
        yield placed
        return
    management.free_memory(HEADROOM * _bytes([teacher.model.module, *placed]), device)
    _move(teacher, placed, device)
    try:
        yield placed
    finally:
        _move(teacher, placed, management.unet_offload_device())
        management.soft_empty_cache()


def default_dtype() -> torch.dtype:
    """What "auto" means: float32 on a CPU, else bfloat16 where the device has it, else float16."""
    device = management.get_torch_device()
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if management.should_use_bf16(device) else torch.float16


def _bytes(modules: list[nn.Module]) -> int:
    shared = {parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in shared)


def _move(teacher: Teacher, modules: list[nn.Module], device: torch.device) -> None:
    # Weights that were moved inside ComfyUI's inference mode could never be trained.
    with torch.inference_mode(False):
        teacher.to(device)
        for module in modules:
            module.to(device)

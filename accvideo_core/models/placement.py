"""Placement: which of a network's weights are on the device, and which wait in main memory.

What moves keeps its identity: a student, or an optimiser, that holds the same tensors sees them at
their new place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MAIN_MEMORY = torch.device("cpu")


@torch.inference_mode(False)
def move(modules: Sequence[nn.Module], device: torch.device, keep: nn.Module | None = None) -> None:
    """Move what the modules hold, except what `keep` holds as well."""
    for part, name, x in apart(modules, keep):
        if isinstance(x, nn.Parameter):
            x.data = _moved(x.data, device)
            x.grad = None if x.grad is None else x.grad.to(device)
        else:
            part._buffers[name] = _moved(x, device)


def apart(
    modules: Sequence[nn.Module], keep: nn.Module | None
) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(owner, name, tensor) of every weight and buffer that `keep` does not hold as well."""
    shared = set() if keep is None else {id(x) for x in [*keep.parameters(), *keep.buffers()]}
    for part in (part for module in modules for part in module.modules()):
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        yield from ((part, name, x) for name, x in own if id(x) not in shared)


@contextmanager
def visiting(
    module: nn.Module, device: torch.device, waiting: Sequence[nn.Module]
) -> Iterator[None]:
    """Inside, all of a module is on `device` but its parts `waiting`; afterwards it is back.

    The parts never pass through the device, which may be too small for all of them together.
    """
    blocks = nn.ModuleList(waiting)
    here = torch.empty(0, device=device).device  # with the number of the current one
    if all(x.device == here for _, _, x in apart([module], blocks)):
        yield
        return
    try:
        move([module], device, keep=blocks)
        yield
    finally:
        move([module], MAIN_MEMORY, keep=blocks)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """On the device, and fit for a backward pass even if it was moved in inference mode."""
    x = x.to(device)
    return x.clone() if x.is_inference() else x

"""What a recipe says about memory and speed, put into effect for the time of a run.

    gradient_checkpointing   a block's activations are computed again in the backward pass
    swap_blocks              frozen weights of blocks wait in main memory (`models.swapping`)
    offload_activations      what autograd keeps of the network's pass waits in main memory
    compile                  torch.compile, block by block

None of them changes a gradient. They change module structures (hooks, settings, a module's
`forward`) and never a weight, and all of it is undone at the end. The teacher is trained against
through a second structure of the same tensors, so that the caller's stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import AccVideoError
from ..models.compiling import Backend, check_compiler, compiled_blocks, replaced_forward
from ..models.experts import networks_of
from ..models.lora import shared_copy
from ..models.swapping import Transfer, spread_blocks, swapped_blocks, transfer_to
from ..models.video_model import VideoModel
from .optimiser import optimizer_of
from .recipes import Recipe
from .student import Student

OFFLOADED_BYTES = 2**20
"""Smaller tensors are not worth the way to main memory."""


def check_savings(recipe: Recipe, teacher: VideoModel, backend: Backend = "inductor") -> None:
    """Refuse what cannot be done, before anything is.

    Raises:
        AccVideoError: network or machine lack what an option or the optimiser needs.
    """
    optimizer_of(recipe)
    network, blocks = teacher.expert(1.0), teacher.num_blocks
    can_recompute = hasattr(network, "enable_gradient_checkpointing")
    if recipe.gradient_checkpointing and not can_recompute:
        raise AccVideoError(
            f"networks of class {type(network).__name__} cannot recompute activations; set "
            "recipe.gradient_checkpointing to False"
        )
    if recipe.swap_blocks > blocks:
        raise AccVideoError(
            f"recipe.swap_blocks is {recipe.swap_blocks}, but the network has {blocks} blocks; "
            f"choose at most {blocks}"
        )
    if recipe.compile:
        check_compiler(teacher.device, "recipe.compile", backend)


@contextmanager
def savings(
    student: Student,
    recipe: Recipe,
    transfer: Transfer | None = None,
    backend: Backend = "inductor",
) -> Iterator[VideoModel]:
    """Save what `recipe` says; gives the teacher to train `student` against.

    Args:
        student: fresh for this run.
        transfer: how swapped weights travel; None is the device's own way.
        backend: torch.compile's.

    Raises:
        AccVideoError: as `check_savings`.
    """
    teacher = student.as_teacher()
    check_savings(recipe, teacher, backend)
    own = replace(teacher, module=shared_copy(teacher.module), _fingerprint=teacher.fingerprint)
    with ExitStack() as stack:
        for model in (student.model, own):
            if recipe.gradient_checkpointing:
                stack.enter_context(checkpointed(model))
            if recipe.offload_activations:
                stack.enter_context(offloaded_activations(model, OFFLOADED_BYTES))
            if recipe.compile:
                stack.enter_context(compiled_blocks(model, backend))
        if recipe.swap_blocks:
            # The caller's teacher computes with the same tensors, should anyone ask it meanwhile.
            sharing = (student.model, own, teacher)
            structures = [spread_blocks(model, recipe.swap_blocks) for model in sharing]
            chosen = transfer_to(teacher.device) if transfer is None else transfer
            stack.enter_context(swapped_blocks(structures, chosen))
        yield own


@contextmanager
def checkpointed(model: VideoModel) -> Iterator[None]:
    """Inside, every block's activations are recomputed in the backward pass."""
    changed: list[Any] = []
    try:
        for network in networks_of(model.module).values():
            if not getattr(network, "is_gradient_checkpointing", False):
                network.enable_gradient_checkpointing()  # type: ignore[operator]
                changed.append(network)
        yield
    finally:
        for network in changed:
            network.disable_gradient_checkpointing()


@contextmanager
def offloaded_activations(model: VideoModel, least: int) -> Iterator[None]:
    """Inside, tensors of `least` bytes or more that autograd keeps of a pass wait in main memory.

    With checkpointing these are the inputs of the blocks. The network's own weights stay.
    """
    with ExitStack() as stack:
        for network in networks_of(model.module).values():
            hooks = _Offload(network, least)
            stack.enter_context(replaced_forward(network, hooks.around(network.forward)))
        yield


@dataclass(eq=False)
class _Away:
    """A piece of memory's copy in main memory, for as long as something of it is kept."""

    copy: Tensor
    device: torch.device
    origin: StorageWeakRef
    """Keeps the name of the original's storage from being given to another one."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A tensor that waits in main memory."""

    away: _Away
    shape: torch.Size
    stride: tuple[int, ...]


class _Offload:
    """What autograd does with the tensors that it keeps of one network's passes."""

    def __init__(self, network: nn.Module, least: int) -> None:
        weights = (*network.parameters(), *network.buffers())
        self.weights = {x.untyped_storage().data_ptr() for x in weights}
        self.least = least
        # Many operations keep the same tensor, and every block rotary tables.
        self.away: WeakValueDictionary[tuple[Any, ...], _Away] = WeakValueDictionary()

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def offloading(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(self.pack, self.unpack):
                return forward(*args, **kwargs)

        return offloading

    def pack(self, x: Tensor) -> Tensor | _Kept:
        storage = x.untyped_storage()
        # A tensor that is larger than its storage is an expanded one.
        small = storage.nbytes() < max(self.least, x.numel() * x.element_size())
        if small or storage.data_ptr() in self.weights:
            return x
        # Linear layers keep [tokens, width] of what others keep as [batch, tokens, width].
        flat = x.detach().view(-1) if x.is_contiguous() else x.detach()
        key = (storage._cdata, x.storage_offset(), flat.shape, flat.stride(), x.dtype, x._version)
        away = self.away.get(key)
        if away is None:
            copy = torch.empty_like(flat, device="cpu", pin_memory=x.is_cuda)
            copy.copy_(flat, non_blocking=x.is_cuda)
            away = self.away[key] = _Away(copy, x.device, StorageWeakRef(storage))
        return _Kept(away, x.shape, x.stride())

    @staticmethod
    def unpack(kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        away = kept.away
        # Compiled code relies on the strides, too.
        x = torch.empty_strided(kept.shape, kept.stride, dtype=away.copy.dtype, device=away.device)
        return x.copy_(away.copy.view(kept.shape), non_blocking=True)

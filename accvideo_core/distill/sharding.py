"""FSDP2 over networks that share weights: each process keeps a part of every weight.

A LoRA student and its teacher are two structures over the same tensors, and FSDP manages the
tensors of one module. So both structures' copies of a block become children of one `Unit`, which
FSDP shards: it knows shared parameters, and gathers them for whichever of the copies is asked. What
only one structure has (adapters) stays whole in every process.

Frozen weights are sharded within a machine, so that nothing but the adapters' gradients crosses the
network between machines (one GPU alone on its machine keeps them whole); trained ones over all
processes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import AccVideoError
from ..models.context_parallel import check_divisible, divide_sequence
from ..models.experts import networks_of
from ..models.lora import shared_copy
from ..models.quantised import trainable_in_full
from ..models.video_model import VideoModel
from ..ranks import Ranks
from .recipes import Recipe
from .student import Student, StudentInfo


def spread(
    student: Student, teacher: VideoModel, ranks: Ranks, start: Student | None = None
) -> VideoModel:
    """Shard the student and its teacher over `ranks`, in place; the teacher to train with.

    With sequence groups, both also divide the tokens of their samples. In one process nothing
    happens.

    Args:
        student: a full one has no weights of its own yet (`Student.create` with `own` False); it
            gets them here, part by part, so that no process ever holds all of them.
        teacher: the structure that training asks. `student.teacher` and a LoRA `start`, which
            have the same weights, are sharded along.
    """
    if ranks.size == 1:
        return teacher
    if ranks.sequence > 1 and teacher is student.teacher:
        teacher = replace(teacher, module=shared_copy(teacher.module))
    if student.info.lora is None:
        _own_weights(student.model.module)
        _shard([student.model.module], ranks.size, ranks, own=True)
    sharing = [teacher, student.teacher, *([] if student.info.lora is None else [student.model])]
    if start is not None and start.info.lora is not None:
        sharing.append(start.model)
    _shard([model.module for model in sharing], ranks.local_size, ranks)
    if ranks.sequence > 1:
        student.model, teacher = divide_sequence([student.model, teacher], ranks)
    return teacher


def check_ranks(
    ranks: Ranks, recipe: Recipe, info: StudentInfo, teacher: VideoModel, shape: Sequence[int]
) -> None:
    """Refuse what several processes cannot train, before anything is made.

    `shape` [C, T, H, W] is that of the latents.

    Raises:
        AccVideoError: with what would do instead.
    """
    if ranks.size == 1:
        return
    if recipe.batch_size % ranks.groups:
        raise AccVideoError(
            f"recipe.batch_size is {recipe.batch_size}, which {ranks.groups} groups of processes "
            f"cannot share equally; choose a multiple of {ranks.groups}, or other processes"
        )
    if recipe.swap_blocks:
        raise AccVideoError(
            f"recipe.swap_blocks is {recipe.swap_blocks}, which is for one process; set it to 0, "
            "because several processes share the weights among them"
        )
    if info.lora is None and recipe.optimizer != "adamw":
        raise AccVideoError(
            f"recipe.optimizer is {recipe.optimizer!r}, which cannot train sharded weights; choose "
            "adamw, or train a LoRA"
        )
    if info.lora is None and recipe.compile:
        raise AccVideoError(
            "recipe.compile is on, which several processes can only do with a LoRA; set it to "
            "False, or train a LoRA"
        )
    if info.lora is None and (reason := trainable_in_full(teacher.module)):
        raise AccVideoError(reason)
    if ranks.sequence > 1:
        check_divisible(teacher, shape, ranks.sequence)


class Unit(nn.Module):
    """A part of the network: its copies in all structures that share its weights."""

    def __init__(self, copies: Sequence[nn.Module]) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copies)
        self.forwards = [module.forward for module in copies]

    def forward(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """What copy `index` answers. FSDP gathers and lets go of the weights around this call."""
        return self.forwards[index](*args, **kwargs)


class _Root(nn.Module):
    """All units, which FSDP takes to be one network."""

    def __init__(self, units: Sequence[nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    def forward(self) -> None:
        """Nothing: the units are called one by one."""


def _shard(
    structures: Sequence[nn.Module], within: int, ranks: Ranks, own: bool = False
) -> None:
    """Shard what `structures` share, over groups of `within` processes.

    Args:
        own: give the one structure float32 weights of its own instead of those it shares.
    """
    if within == 1:
        return
    from torch.distributed.fsdp import fully_shard

    structures = list({id(module): module for module in structures}.values())
    shared = set(structures[0].parameters())
    apart = {p for module in structures for p in module.parameters()} - shared
    mesh = _mesh(next(structures[0].parameters()).device, within, ranks)
    # A block may return a part of a tensor, which nothing here writes into.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    units: list[Any] = []
    for expert, network in networks_of(structures[0]).items():
        chain: list[Any] = []
        for path in _parts(network, f"{expert}." if expert else ""):
            if own:
                _own_part(structures[0], path)
            unit = _unit([module.get_submodule(path) for module in structures])
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=apart)
            chain.append(unit)
        for unit, following in zip(chain, chain[1:], strict=False):
            unit.set_modules_to_forward_prefetch([following])
        units += chain
    root: Any = _Root(units)
    fully_shard(root, mesh=mesh, ignored_params=apart)
    root()  # FSDP takes for the root what is called first; units on their own could not overlap


def _unit(copies: Sequence[nn.Module]) -> Any:
    """A part's copies, each of which now goes through the unit when it is called."""
    unit = Unit(copies)
    for index, module in enumerate(copies):
        module.forward = partial(unit, index)
    return unit


def _mesh(device: torch.device, within: int, ranks: Ranks) -> Any:
    """Processes in groups of `within` neighbours, or in one group where that does not work out."""
    from torch.distributed.device_mesh import init_device_mesh

    within = within if ranks.size % within == 0 else ranks.size
    shape = (ranks.size // within, within)
    return init_device_mesh(device.type, shape, mesh_dim_names=("group", "rank"))["rank"]


def _parts(network: nn.Module, prefix: str) -> Iterator[str]:
    """Names of the blocks, and of the parts before and after them that have weights."""
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            yield from (f"{prefix}{name}.{index}" for index in range(len(child)))
        elif next(child.parameters(), None) is not None:
            yield prefix + name


def _own_weights(module: nn.Module) -> None:
    """Trainable float32 copies of the few weights that belong to no part; they stay whole."""
    for network in networks_of(module).values():
        for name, p in list(network.named_parameters(recurse=False)):
            network.register_parameter(name, nn.Parameter(p.to(torch.float32, copy=True)))


def _own_part(module: nn.Module, path: str) -> None:
    """A trainable float32 copy in place of the teacher's part."""
    owner, _, name = path.rpartition(".")
    part = copy.deepcopy(module.get_submodule(path)).float().requires_grad_(True)
    setattr(module.get_submodule(owner), name, part)

"""Whether a run fits in the memory that is free, and what to switch on when it does not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..errors import AccVideoError
from ..models.footprint import Unplannable, free_memory, gigabytes, tensor_bytes
from ..models.video_model import VideoModel
from ..wording import changes
from .batch import KeyStates
from .memory_plan import MemoryPlan, plan_memory
from .recipes import Recipe
from .rehearsal import batch_without_values
from .student import LoraSpec, StudentInfo

_WORTH = 0.97
"""What leaves more than this part of the memory is not worth its time."""
_log = logging.getLogger(__name__)

Planner = Callable[[Recipe], MemoryPlan]
"""Plans one and the same run with other settings."""


def planner_of(
    teacher: VideoModel,
    info: StudentInfo,
    states: KeyStates,
    recipe: Recipe,
    fresh: bool,
    device: torch.device | None = None,
) -> Planner:
    """Plans a run for batches like its first, whose prompts tell how long texts are.

    Args:
        info: of the student under `recipe`.
        fresh: whether the student is made as the recipe says, and not taken over.
        device: None is the teacher's.
    """
    real = states.batch(recipe.batch_size, recipe.seed, 0, torch.device("cpu"))
    first = batch_without_values(real)

    def plan(other: Recipe) -> MemoryPlan:
        own = replace(info, lora=other.lora) if fresh else info
        return plan_memory(teacher, own, other, first, device, states.bytes)

    return plan


def log_plan(plan: MemoryPlan) -> None:
    _log.info("%s", plan.table())


def settle_memory(
    planner: Planner,
    recipe: Recipe,
    teacher: VideoModel,
    free: int | None,
    tell: Callable[[MemoryPlan], None],
) -> None:
    """Tell the plan, and refuse a run that takes more than there is.

    Args:
        free: bytes of the device beside what lies there already; None asks the device, and where
            that does not tell either, nothing is refused.

    Raises:
        AccVideoError: it names the settings that make the run fit.
    """
    try:
        plan = planner(recipe)
    except Unplannable as error:
        _log.warning("%s", error)
        return
    tell(plan)
    free = free_memory(teacher.device) if free is None else free
    if free is None:
        return
    here = [x for x in teacher.module.parameters() if x.device == teacher.device]
    room = free + tensor_bytes(here)
    if plan.peak > room:
        raise AccVideoError(
            f"by its memory plan this run needs {gigabytes(plan.peak)}, and {plan.device} has "
            f"{gigabytes(room)} for it; {_remedy(planner, plan, room, recipe)}"
        )


def _remedy(planner: Planner, plan: MemoryPlan, room: int, recipe: Recipe) -> str:
    """The first settings that make the run fit in `room`, or all that help."""
    chosen: dict[str, Any] = {}
    best = plan.peak
    for change in _savings(recipe, plan):
        try:
            peak = planner(replace(recipe, **{**chosen, **change})).peak
        except AccVideoError:  # not possible here: a library is missing, a layer is too thin
            continue
        if peak < _WORTH * best:
            best, chosen = peak, {**chosen, **change}
        if best <= room:
            return f"set {_words(chosen)}"
    settings = f"set {_words(chosen)}, and " if chosen else ""
    return f"{settings}choose smaller or shorter videos, or a teacher with weights of fewer bits"


def _savings(recipe: Recipe, plan: MemoryPlan) -> Iterator[Mapping[str, Any]]:
    """Settings that save memory and are not chosen yet, those that cost least time first."""
    if recipe.accumulate < recipe.batch_size:
        yield {"accumulate": recipe.batch_size}
    if not recipe.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if recipe.optimizer == "adamw":
        yield {"optimizer": "adamw_8bit"}
    if recipe.lora is None:
        yield {"lora": LoraSpec()}
    if plan.device == "cpu":  # main memory is the device's own
        return
    if not recipe.offload_activations:
        yield {"offload_activations": True}
    if recipe.swap_blocks < plan.blocks:
        trained = {} if recipe.lora else {"lora": LoraSpec()}
        yield {"swap_blocks": plan.blocks, "gradient_checkpointing": True, **trained}


def _words(settings: Mapping[str, Any]) -> str:
    """accumulate to 32, lora to rank 32 and gradient_checkpointing to True."""
    shown = {n: f"rank {x.rank}" if isinstance(x, LoraSpec) else x for n, x in settings.items()}
    return changes(shown)

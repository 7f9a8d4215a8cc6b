"""The memory that a run will need on its device, known before it takes any.

What the objective needs is rehearsed without values (`rehearsal.py`). What one update does not
show is added by its size: the optimiser's state and the running average, and on the other side
weights that wait in main memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..models.footprint import (
    Unplannable,
    block_bytes,
    gigabytes,
    swapped_bytes,
    tensor_bytes,
)
from ..models.video_model import VideoModel
from .batch import KeyBatch
from .memory import check_savings
from .recipes import Recipe
from .rehearsal import Rehearsal
from .student import StudentInfo

_SCALED_BLOCK = 256
"""Values of bitsandbytes' 8-bit moments that share a scale."""
_SCALED_FROM = 4096
"""Values below which it keeps the moments of a tensor in 32 bits."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that a run holds on its device, and the most that it holds at once."""

    device: str
    weights: int
    """The teacher's, those that wait in main memory left out."""
    waiting: int
    """The teacher's in main memory (`swap_blocks`)."""
    trained: int
    """Adapters, or all weights of a full student."""
    heads: int
    gradients: int
    optimiser: int
    average: int
    states: int
    """Key states, prompts and noise of an update and of the preview; on a CPU the dataset's too."""
    activations: int
    """Kept for the backward pass, of the samples that are computed at once."""
    offloaded: int
    """The same in main memory (`offload_activations`)."""
    block: int
    """The most that one block of the student adds to them."""
    blocks: int
    """Blocks of the student."""
    peak: int

    @property
    def working(self) -> int:
        """What comes and goes on top of the rest, such as a block that is recomputed."""
        held = self.weights + self.trained + self.heads + self.gradients + self.optimiser
        return max(0, self.peak - held - self.average - self.states - self.activations)

    def table(self) -> str:
        """For people, one line each."""
        kept = f"up to {gigabytes(self.block)} for each of {self.blocks} blocks"
        rows = [
            ("teacher's weights", self.weights, _elsewhere(self.waiting)),
            ("trained weights", self.trained, ""),
            ("heads", self.heads, ""),
            ("gradients", self.gradients, ""),
            ("optimiser", self.optimiser, ""),
            ("running average", self.average, ""),
            ("key states", self.states, ""),
            ("activations", self.activations, _elsewhere(self.offloaded) or kept),
            ("working memory", self.working, ""),
            ("peak", self.peak, ""),
        ]
        lines = [f"  {name:<18}{gigabytes(size):>9}  {note}".rstrip() for name, size, note in rows]
        return "\n".join([f"memory plan ({self.device})", *lines])


def plan_memory(
    teacher: VideoModel,
    info: StudentInfo,
    recipe: Recipe,
    batch: KeyBatch,
    device: torch.device | None = None,
    dataset_bytes: int = 0,
) -> MemoryPlan:
    """What a run with these settings needs on its device.

    Args:
        teacher: its weights may lie anywhere, and on the meta device they need not be.
        info: of the student.
        batch: only its key times, its shapes and the lengths of its prompts count.
        device: where the run will be; None is where the teacher is. This machine may lack it.
        dataset_bytes: of key states that are held in main memory.

    Raises:
        AccVideoError: the settings do not fit the network; `Unplannable` where it cannot be told.
    """
    check_savings(recipe, teacher)
    there = teacher.device if device is None else device
    try:
        found = Rehearsal(teacher, info, recipe, batch, there)
    except RuntimeError as error:
        raise Unplannable(
            "the memory of this run cannot be planned, because its network does something that "
            f"needs values ({' '.join(str(error).split())[:200]}); watch the device's own figures"
        ) from error
    trained, heads = tensor_bytes(found.trained), tensor_bytes(found.heads)
    shapes = [tuple(p.shape) for p in (*found.trained, *found.heads)]
    optimiser = optimiser_bytes(recipe.optimizer, shapes)
    average = 0 if recipe.ema is None else trained
    on_cpu = there.type == "cpu"
    dataset = dataset_bytes if on_cpu else 0
    swapped, places = swapped_bytes(block_bytes(teacher), recipe.swap_blocks)
    waiting = -places if on_cpu else swapped - places
    step = found.after + _step_bytes(recipe.optimizer, shapes, on_cpu)
    # On a CPU a checkpoint is copied within the same memory, when batch and gradients are gone.
    save = found.after - found.batch + optimiser if on_cpu else 0
    updating = max(found.peak, step, save) + optimiser + average
    return MemoryPlan(
        device=str(there),
        weights=found.weights - waiting,
        waiting=max(0, waiting),
        trained=trained,
        heads=heads,
        gradients=trained + heads,
        optimiser=optimiser,
        average=average,
        states=found.batch + dataset,
        activations=found.activations,
        offloaded=found.offloaded,
        block=max(found.by_block.values(), default=0),
        blocks=teacher.num_blocks,
        peak=max(found.building, updating) + dataset - waiting,
    )


def optimiser_bytes(name: str, shapes: Iterable[Shape]) -> int:
    """What an optimiser remembers of float32 parameters with these shapes."""
    return sum(_STATES[name](shape) for shape in shapes)


def _adamw(shape: Shape) -> int:
    """Two moments, and a count of steps."""
    return 8 * math.prod(shape) + 4


def _adamw_8bit(shape: Shape) -> int:
    """Two moments of a byte each, with a float32 scale for every block."""
    size = math.prod(shape)
    blocks = -(-size // _SCALED_BLOCK)
    return 8 * size if size < _SCALED_FROM else 2 * (size + 4 * blocks)


def _adafactor(shape: Shape) -> int:
    """Squares: means over the rows and the columns of a matrix, all of a vector; and a count."""
    size = math.prod(shape)
    return 4 + 4 * (size if len(shape) < 2 else size // shape[-1] + size // shape[-2])


_STATES: dict[str, Callable[[Shape], int]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
}


def _step_bytes(name: str, shapes: Iterable[Shape], on_cpu: bool) -> int:
    """What an optimiser takes while it steps: beside a tensor at a time two of its size, but
    torch's AdamW goes through all of a GPU's at once.
    """
    sizes = [4 * math.prod(shape) for shape in shapes]
    return sum(sizes) if name == "adamw" and not on_cpu else 2 * max(sizes)


def _elsewhere(size: int) -> str:
    return f"{gigabytes(size)} more in main memory" if size else ""

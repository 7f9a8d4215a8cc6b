"""The fastest exact attention kernel of a shape on this machine: measured once, then remembered.

Shapes: B batch, N tokens, H heads, D head size.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AccVideoError
from .kernels import KERNELS, Kernel, Numbers, Run, ready

CANDIDATES = ("flash3", "flash2", "cudnn", "flash", "efficient", "xformers")
"""Exact kernels between which no rule decides; where none of them runs, torch picks."""
ROUNDS = 5
"""Timings of each, in turn; the shortest counts, as what disturbs can only make one longer."""
SECONDS = 2.0
"""After which no further round begins."""
OPERATIONS = 2e13
"""Multiplications and additions of a timed call at most: fewer heads are timed where N is large."""
TINY = 2**22
"""Pairs of tokens, of all heads together, below which nobody would notice which kernel it is."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_found: dict[Shape, str] = {}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a measurement holds for."""

    numbers: Numbers
    heads: int
    tokens: int

    @classmethod
    def near(cls, numbers: Numbers, heads: int, tokens: int) -> Shape:
        """With tokens rounded to 4 binary digits: prompts differ by a few, and are alike."""
        step = 1 << max(0, tokens.bit_length() - 4)
        return cls(numbers, heads, -(-tokens // step) * step)


def fastest(shape: Shape, clock: Callable[[], float] = time.perf_counter) -> Kernel:
    """The kernel for self-attention of `shape`; the same for the life of the process.

    Nothing is measured where there is no choice, as on every CPU, and for tiny sequences: torch's
    own pick answers there.
    """
    if shape.heads * shape.tokens**2 < TINY:
        return KERNELS["sdpa"]
    with _lock:
        if shape not in _found:
            runs = _candidates(shape.numbers)
            _found[shape] = _measured(shape, runs, clock) if len(runs) > 1 else "sdpa"
        return KERNELS[_found[shape]]


def _candidates(numbers: Numbers) -> dict[str, Run]:
    runs = {}
    for name in CANDIDATES:
        try:
            runs[name] = ready(KERNELS[name], numbers)
        except AccVideoError as error:
            _log.debug("%s", error)
    return runs


def _measured(shape: Shape, runs: dict[str, Run], clock: Callable[[], float]) -> str:
    tensors = _tensors(shape)
    best = dict.fromkeys(runs, float("inf"))
    start = clock()
    for round_number in range(-1, ROUNDS):  # the first is not counted: kernels prepare themselves
        if round_number > 0 and clock() - start > SECONDS:
            break
        for name, run in runs.items():
            took = _timed(run, tensors, clock)
            if round_number >= 0:
                best[name] = min(best[name], took)
    ranking = sorted(best, key=lambda name: best[name])
    _log.info(
        "attention of %d tokens, %s: %s",
        shape.tokens,
        shape.numbers,
        ", ".join(f"{name} {best[name] * 1e3:.2f} ms" for name in ranking),
    )
    return ranking[0] if best[ranking[0]] < float("inf") else "sdpa"


def _tensors(shape: Shape) -> Sequence[Tensor]:
    """Queries, keys and values [1, N, H, D] of as many heads as there is time for."""
    numbers = shape.numbers
    per_head = 4 * shape.tokens**2 * numbers.head_size
    heads = min(shape.heads, max(1, int(OPERATIONS / per_head)))
    size = (3, 1, shape.tokens, heads, numbers.head_size)
    generator = torch.Generator(numbers.device).manual_seed(0)
    x = torch.randn(size, generator=generator, device=numbers.device, dtype=numbers.dtype)
    return x.unbind()


def _timed(run: Run, tensors: Sequence[Tensor], clock: Callable[[], float]) -> float:
    """Seconds of one call; infinite for a kernel that fails at this size."""
    q, k, v = tensors
    start = clock()
    try:
        with torch.no_grad():
            run(q, k, v, None)
        _wait(q.device)
    except RuntimeError as error:
        _log.debug("a kernel failed at %s: %s", tuple(q.shape), error)
        return float("inf")
    return clock() - start


def _wait(device: torch.device) -> None:
    """Until what was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Solvers: how a sampler goes from noise to data along given times.

    euler     x_{t'} = x_t + (t' - t) v. AccVideo's own (Eq. 5), and Lightning's.
    renoise   x_0 = x_t - t v, then x_{t'} = (1 - t') x_0 + t' eps with fresh noise eps. For
              students of consistency and distribution matching (FastWan, CausVid, rCM); ComfyUI's
              `lcm`.
    unipc     UniPC, multistep of order 2 (arXiv 2302.04867, B2(h)), Wan's official solver.

Shapes: B batch, C channels, T latent frames, H, W. Everything in flow coordinates (see flow.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .errors import AccVideoError
from .flow import Velocity, euler_states, interpolate, predict_x0, validate_times
from .latents import seeded_noise

Solver = Callable[[Velocity, Tensor, Sequence[float], int], Iterator[Tensor]]
"""(velocity, state at times[0] [B, C, T, H, W], falling times, seed) -> the state at every time."""


def _euler(velocity: Velocity, x: Tensor, times: Sequence[float], _seed: int) -> Iterator[Tensor]:
    return euler_states(velocity, x, times)


def renoise_states(
    velocity: Velocity, x: Tensor, times: Sequence[float], seed: int = 0
) -> Iterator[Tensor]:
    """Yield the states at all `times`: to the clean sample and back with fresh noise, every step.

    A sample's fresh noise follows from `seed`, the step and the sample's own `x` alone, so that
    neither its place in a batch nor the batch's size changes it.
    """
    grid = validate_times(times)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    marks = _marks(x)
    yield x
    for step, (t, t_next) in enumerate(pairwise(grid)):
        x = predict_x0(x, velocity(x, t).to(x.dtype), t)
        if t_next > 0:
            eps = [seeded_noise(x.shape[1:], "renoise", seed, mark, step) for mark in marks]
            x = interpolate(x, _beside(torch.stack(eps), x), t_next)
        yield x


def _marks(x: Tensor) -> list[str]:
    """A name of every sample [C, T, H, W] that follows from its values."""
    return [hashlib.sha256(row.float().cpu().numpy().tobytes()).hexdigest() for row in x]


def _beside(host: Tensor, x: Tensor) -> Tensor:
    """`host` as numbers like `x`, where `x` is, without waiting for what computes there."""
    host = host.to(x.dtype)
    return host.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else host.to(x.device)


def unipc_states(
    velocity: Velocity, x: Tensor, times: Sequence[float], _seed: int = 0
) -> Iterator[Tensor]:
    """Yield the states at all `times`, each before its correction, as diffusers' UniPC gives them.

    diffusers has its coefficients on the device, which it waits for in every step; here they are
    numbers.
    """
    # log(1 - t) is infinite at 1, where diffusers steps back by as much.
    grid = [min(t, 1 - 1e-6) for t in validate_times(times)]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    yield x
    known: list[tuple[float, Tensor]] = []
    start = x
    for (t, t_next), asked in zip(pairwise(grid), times, strict=False):
        m = predict_x0(x, velocity(x, asked).to(x.dtype), t)
        start = _unipc_step(start, known, t, m) if known else x
        known = [*known[-1:], (t, m)]
        # The last step is of order 1, as diffusers' `lower_order_final` has it.
        x = _unipc_step(start, known if t_next > grid[-1] else known[-1:], t_next)
        yield x


def _unipc_step(
    x: Tensor,
    known: Sequence[tuple[float, Tensor]],
    t_next: float,
    m_next: Tensor | None = None,
) -> Tensor:
    """UniPC's step from x to t_next, corrected when the clean sample there is known.

    With m a clean sample that v pointed at, lambda = log((1 - t) / t) and d = e^{-h} - 1 for a
    step of h in lambda: x' = t'/t x - (1 - t') d (m + sum of weights * slopes of m).

    Args:
        known: (time, m) of one or two steps; the last is where x is.
    """
    t, m = known[-1]
    h = _log_ratio(t_next) - _log_ratio(t)
    d = math.expm1(-h)
    weighted: list[tuple[float, Tensor]] = []
    r = (_log_ratio(known[0][0]) - _log_ratio(t)) / h  # of the older one; 0 where there is none
    older, newer = 0.5, 0.5
    if r and m_next is not None:
        phi = d / -h - 1
        first, second = phi / d, (phi / -h - 0.5) * 2 / d
        # sum of weights = first, sum of weights * r = second, with r = 1 for the newer one.
        older = (first - second) / (1 - r)
        newer = first - older
    if r:
        weighted.append((older / r, known[0][1] - m))
    if m_next is not None:
        weighted.append((newer, m_next - m))
    x = t_next / t * x - (1 - t_next) * d * m
    for weight, slope in weighted:
        x = x - (1 - t_next) * d * weight * slope
    return x


def _log_ratio(t: float) -> float:
    """log((1 - t) / t), half of the log of the signal-to-noise ratio."""
    return math.log((1 - t) / t) if t > 0 else math.inf


SOLVERS: dict[str, Solver] = {"euler": _euler, "renoise": renoise_states, "unipc": unipc_states}


COMFY_SAMPLERS = {"euler": "euler", "renoise": "lcm", "unipc": "uni_pc_bh2"}
"""What ComfyUI calls them."""


def solver_named(name: str) -> Solver:
    """The solver of that name."""
    if name not in SOLVERS:
        raise AccVideoError(f"solver {name!r} is unknown; choose one of: {', '.join(SOLVERS)}")
    return SOLVERS[name]

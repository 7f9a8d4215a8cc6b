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
    marks = [hashlib.sha256(row.float().cpu().numpy().tobytes()).hexdigest() for row in x]
    yield x
    for step, (t, t_next) in enumerate(pairwise(grid)):
        x = predict_x0(x, velocity(x, t).to(x.dtype), t)
        if t_next > 0:
            eps = [seeded_noise(x.shape[1:], "renoise", seed, mark, step) for mark in marks]
            x = interpolate(x, torch.stack(eps).to(x), t_next)
        yield x


def unipc_states(
    velocity: Velocity, x: Tensor, times: Sequence[float], _seed: int = 0
) -> Iterator[Tensor]:
    """Yield the states at all `times` that diffusers' UniPC gives, before their correction."""
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    grid = validate_times(times)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(len(grid) - 1)
    # These times exactly, and never its own; log(1 - t) is infinite at 1, where diffusers steps
    # back by as much. The scheduler's integer timesteps are labels that nothing is computed from.
    scheduler.sigmas = torch.tensor([min(t, 1 - 1e-6) for t in grid], dtype=x.dtype)
    scheduler.set_begin_index(0)
    yield x
    for t, label in zip(grid, scheduler.timesteps, strict=False):
        x = scheduler.step(velocity(x, t).to(x.dtype), label, x, return_dict=False)[0]
        yield x


SOLVERS: dict[str, Solver] = {"euler": _euler, "renoise": renoise_states, "unipc": unipc_states}


def solver_named(name: str) -> Solver:
    """The solver of that name."""
    if name not in SOLVERS:
        raise AccVideoError(f"solver {name!r} is unknown; choose one of: {', '.join(SOLVERS)}")
    return SOLVERS[name]

"""Asking the teacher: trajectories from noise, and ways to the data from any point.

Shapes: N points, S Euler steps; states are [N], trajectories [S + 1, N].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..flow import Times, euler_states, euler_step, time_grid
from .network import VelocityNet


def trajectories(teacher: VelocityNet, noise: Tensor, steps: int) -> Tensor:
    """The states [S + 1, N] from `noise` at t = 1 to the data at t = 0."""
    return paths(teacher, noise, torch.ones_like(noise), steps)


@torch.no_grad()
def paths(teacher: VelocityNet, x_t: Tensor, t: Tensor, steps: int) -> Tensor:
    """The states [S + 1, N] from `x_t`, whose times `t` are on the grid; it stands until then."""
    grid = time_grid(steps)
    states = [x_t]
    for time, after in zip(grid, grid[1:], strict=False):
        moved = euler_step(x_t, teacher(x_t, torch.full_like(x_t, time)), time, after)
        x_t = torch.where(t > time - 0.5 / steps, moved, x_t)
        states.append(x_t)
    return torch.stack(states)


@torch.no_grad()
def solve(network: VelocityNet, x_t: Tensor, times: Times) -> Tensor:
    """The state [N] at the last of `times`, by Euler steps from `x_t` at the first."""
    *_, x = euler_states(lambda x, t: network(x, torch.full_like(x, t)), x_t, times)
    return x


def grid_times(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """[N] times of the grid except 0, all equally likely."""
    return torch.randint(1, steps + 1, (count,), generator=generator) / steps

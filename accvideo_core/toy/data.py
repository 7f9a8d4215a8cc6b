"""The data: two points, what a mismatched dataset makes of them, and what noise makes of both.

Shapes: N points; times and states are [N].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..flow import interpolate

DATA = (-3.0, 3.0)
"""p(x): what the teacher is trained on."""

Points = Sequence[float]


def mismatched(degree: float) -> tuple[float, float]:
    """p_d(x): a dataset for distillation of mismatch M = `degree`, both points moved inwards."""
    low, high = DATA
    return low + degree / 2, high - degree / 2


def mismatch_degree(distilled: Points, data: Points = DATA) -> float:
    """M, the distance of every distilled point to the nearest training point, summed (Eq. 4)."""
    return sum(min(abs(x_d - x) for x in data) for x_d in distilled)


def nearest(x: Tensor, points: Points = DATA) -> Tensor:
    """Distance [N] of every x to the nearest of `points`."""
    return (x[:, None] - torch.tensor(points, dtype=x.dtype)).abs().amin(1)


def draw(points: Points, count: int, generator: torch.Generator) -> Tensor:
    """[N] of `points`, each as often as the others: the paper repeats its two."""
    repeated = torch.tensor(points).repeat(-(-count // len(points)))
    return repeated[torch.randperm(len(repeated), generator=generator)[:count]]


def diffused(x_0: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """x_t [N] of the forward process: each x_0 with noise that was drawn for any of them."""
    return interpolate(x_0, torch.randn(x_0.shape, generator=generator), t)


def exact_x0(x_t: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x_t] [N] under p(x): what a perfect teacher predicts.

    For +-a with equal weights it is a tanh(a (1 - t) x_t / t^2).
    """
    a = DATA[1]
    return a * torch.tanh(a * (1 - t) * x_t / t.square())

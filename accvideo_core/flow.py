"""Time, schedules, key times and Euler steps, in flow coordinates.

Everything in the core lives here: t in [0, 1], t = 1 is noise, t = 0 is data,

    x_t = (1 - t) x_0 + t eps,    v = eps - x_0,    x_{t'} = x_t + (t' - t) v.

EDM and variance-preserving models enter these coordinates through the two maps at the end of this
file and nowhere else.

Shapes: B batch, C channels, T latent frames, H, W. Times are Python floats (float64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .errors import AccVideoError

Times = tuple[float, ...]
Velocity = Callable[[Tensor, float], Tensor]


def shift_time(u: float, shift: float) -> float:
    """Move a uniform time towards noise: t(u) = s u / (1 + (s - 1) u)."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def time_grid(steps: int, shift: float = 1.0) -> Times:
    """The `steps` + 1 times from 1 (noise) to 0 (data) of the shifted uniform grid."""
    if steps < 1:
        raise AccVideoError(f"steps is {steps}, but a time grid needs at least 1 step")
    if not shift > 0:
        raise AccVideoError(f"shift is {shift}, but it must be positive (HunyuanVideo uses 7)")
    return tuple(shift_time(1.0 - i / steps, shift) for i in range(steps + 1))


def key_indices(steps: int, m: int) -> tuple[int, ...]:
    """Indices 0, n/m, ..., n of the m + 1 key times in a grid of n = `steps` steps.

    AccVideo, Sec. 4.2: m = 5 of n = 50 keeps 0, 10, 20, 30, 40, 50.
    """
    if m < 1 or steps % m:
        divisors = [d for d in range(1, steps + 1) if steps % d == 0]
        raise AccVideoError(
            f"{m} student steps do not divide the {steps} teacher steps; choose one of {divisors}"
        )
    return tuple(range(0, steps + 1, steps // m))


def validate_times(times: Sequence[float]) -> Times:
    """`times` as a tuple, after checking that they fall strictly and lie in [0, 1]."""
    grid = tuple(float(t) for t in times)
    falling = all(a > b for a, b in zip(grid, grid[1:], strict=False))
    if len(grid) < 2 or not falling or grid[0] > 1.0 or grid[-1] < 0.0:
        raise AccVideoError(
            f"times {grid} must fall strictly from at most 1 (noise) to at least 0 (data)"
        )
    return grid


def find_times(
    grid: Sequence[float], wanted: Sequence[float], tolerance: float = 1e-6
) -> list[int]:
    """Position in `grid` of every time in `wanted`."""
    found = []
    for t in wanted:
        index = min(range(len(grid)), key=lambda i: abs(grid[i] - t))
        if abs(grid[index] - t) > tolerance:
            have = ", ".join(f"{g:.4f}" for g in grid)
            raise AccVideoError(f"key time {t:.4f} is not among the stored times ({have})")
        found.append(index)
    return found


def interpolate(x_0: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps; a tensor `t` of shape [B] broadcasts over the rest."""
    t_ = expand_time(t, x_0) if isinstance(t, Tensor) else t
    return (1 - t_) * x_0 + t_ * eps


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Shape [B] -> [B, 1, 1, ...] with as many axes as `like`."""
    return t.reshape(-1, *([1] * (like.dim() - 1)))


def euler_step(x_t: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
    """x_{t'} = x_t + (t' - t) v, in float32 or wider (AccVideo, Eq. 5)."""
    wide = torch.promote_types(x_t.dtype, torch.float32)
    return x_t.to(wide) + (t_next - t) * v.to(wide)


def euler_states(velocity: Velocity, x_1: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """Yield the states at `times[0]`, `times[1]`, ... of the Euler solution that starts at `x_1`.

    Args:
        velocity: maps (x_t [B, C, T, H, W], t) to v of the same shape.
        x_1: the state at `times[0]`.
        times: falling times, at least two.
    """
    grid = validate_times(times)
    x_t = x_1
    yield x_t
    for t, t_next in zip(grid, grid[1:], strict=False):
        x_t = euler_step(x_t, velocity(x_t, t), t, t_next)
        yield x_t


def predict_x0(x_t: Tensor, v: Tensor, t: float) -> Tensor:
    """The clean sample that a velocity points at: x_0 = x_t - t v."""
    return x_t - t * v


def edm_to_flow(x_sigma: Tensor, sigma: float) -> tuple[Tensor, float]:
    """EDM to flow coordinates: (x_t, t) from x_sigma = x_0 + sigma eps.

    t = sigma / (1 + sigma), x_t = x_sigma / (1 + sigma).
    """
    return x_sigma / (1.0 + sigma), sigma / (1.0 + sigma)


def vp_to_flow(x: Tensor, alpha: float, s: float) -> tuple[Tensor, float]:
    """Variance preserving to flow coordinates: (x_t, t) from x = alpha x_0 + s eps.

    t = s / (alpha + s), x_t = x / (alpha + s). At zero terminal SNR alpha = 0, and the map is still
    defined: t = 1, x_t = x / s.
    """
    return x / (alpha + s), s / (alpha + s)


def vp_levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, s) of the variance-preserving state at flow time t: s / alpha = t / (1 - t).

    The inverse of `vp_to_flow` in time; t = 1 is alpha = 0, zero terminal SNR.
    """
    norm = torch.hypot(t, 1 - t)
    return (1 - t) / norm, t / norm


def flow_from_vp_v(x_t: Tensor, v_vp: Tensor, t: Tensor) -> Tensor:
    """Flow velocity eps - x_0 from a variance-preserving network's v = alpha eps - s x_0.

    With x = (alpha + s) x_t: x_0 = alpha x - s v and eps = s x + alpha v.
    """
    alpha, s = (expand_time(level, x_t) for level in vp_levels(t))
    return (alpha + s) * ((s - alpha) * x_t + v_vp)

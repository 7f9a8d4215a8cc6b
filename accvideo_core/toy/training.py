"""Training of the teacher and of its students: flow matching, then regression of mean velocities.

Shapes: N points; states are [N].
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ..flow import Times, interpolate, key_indices, time_grid
from ..latents import key_generator
from ..monitor import Monitor, Progress
from .data import DATA, Points, diffused, draw
from .network import VelocityNet
from .settings import ToySettings
from .teacher import solve

Batch = tuple[Tensor, Tensor, Tensor]
"""States x_t, times t and the velocities to learn, [N] each."""

_POOL = 16_384
"""Windows that the teacher solves once for a student, which then draws its batches from them."""


def train_teacher(settings: ToySettings, monitor: Monitor) -> VelocityNet:
    """A network that has learnt the flow from noise to `DATA` (Eq. 3)."""
    teacher = VelocityNet(settings.width, settings.seed, "toy teacher")
    generator = key_generator(settings.seed, "toy flow matching")
    data = draw(DATA, settings.batch_size, generator)

    def batch() -> Batch:
        t = torch.rand(data.shape, generator=generator)
        noise = torch.randn(data.shape, generator=generator)
        return interpolate(data, noise, t), t, noise - data

    _regress(teacher, batch, settings.teacher_updates, settings.teacher_lr, settings.schedule,
             "teacher", monitor)  # fmt: skip
    return teacher


def forward_windows(
    teacher: VelocityNet, points: Points, settings: ToySettings, generator: torch.Generator
) -> Batch:
    """PeRFlow's windows: they start where noise on `points`, by the forward process, has led."""
    parts = []
    for times in _windows(settings):
        t = torch.full((_POOL // settings.windows,), times[0])
        x_t = diffused(draw(points, len(t), generator), t, generator)
        parts.append((x_t, t, _mean_velocity(x_t, solve(teacher, x_t, times), times)))
    x_t, t, v = (torch.cat(part) for part in zip(*parts, strict=True))
    return x_t, t, v


def trajectory_windows(
    teacher: VelocityNet, settings: ToySettings, generator: torch.Generator
) -> Batch:
    """AccVideo's windows: they start on the teacher's own trajectories, and need no dataset."""
    x_t = torch.randn(_POOL // settings.windows, generator=generator)
    parts = []
    for times in _windows(settings):
        end = solve(teacher, x_t, times)
        parts.append((x_t, torch.full_like(x_t, times[0]), _mean_velocity(x_t, end, times)))
        x_t = end
    x_t, t, v = (torch.cat(part) for part in zip(*parts, strict=True))
    return x_t, t, v


def _windows(settings: ToySettings) -> list[Times]:
    """The teacher's times from the start of each window to its end, the noisiest first."""
    grid = time_grid(settings.steps)
    keys = key_indices(settings.steps, settings.windows)
    return [grid[first : last + 1] for first, last in zip(keys, keys[1:], strict=False)]


def _mean_velocity(x_start: Tensor, x_end: Tensor, times: Times) -> Tensor:
    return (x_end - x_start) / (times[-1] - times[0])


def train_student(
    teacher: VelocityNet,
    windows: Batch,
    settings: ToySettings,
    generator: torch.Generator,
    stage: str,
    monitor: Monitor,
) -> VelocityNet:
    """A student that begins as the teacher and learns to cross each window in one step (Eq. 6).

    It is asked at the starts of windows alone, and learns there alone, wherever these come from;
    PeRFlow itself also trains on the straight way to the end.
    """
    student = copy.deepcopy(teacher).requires_grad_(True)

    def batch() -> Batch:
        chosen = torch.randint(len(windows[0]), (settings.batch_size,), generator=generator)
        x_t, t, v = (each[chosen] for each in windows)
        return x_t, t, v

    _regress(student, batch, settings.student_updates, settings.student_lr, settings.schedule,
             stage, monitor)  # fmt: skip
    return student


def _regress(
    network: VelocityNet,
    batch: Callable[[], Batch],
    updates: int,
    lr: float,
    schedule: str,
    stage: str,
    monitor: Monitor,
) -> None:
    """Fit `network` to the batches' velocities with Adam, and leave it ready for use."""
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for update in range(1, updates + 1):
        x_t, t, v = batch()
        loss = (network(x_t, t) - v).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule == "cosine":
            fall.step()
        monitor(Progress(stage, update, updates, {"loss": loss.item()}))
    network.eval().requires_grad_(False)

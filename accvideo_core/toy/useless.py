"""Useless points: where the teacher's answer cannot be relied on, by two named criteria.

The paper calls a point useless that does not lie on the teacher's denoising trajectories, so that
denoising from it is inaccurate; by which number it counts them is not printed. "endpoint" takes the
second half of that sentence, "envelope" the first.

Shapes: N points, S Euler steps, B = 2 branches, one for each training point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AccVideoError
from ..latents import key_generator
from .data import DATA, Points, diffused, draw, nearest
from .network import VelocityNet
from .settings import ToySettings
from .teacher import grid_times, paths, trajectories

PAPER_RATES = (0.0078, 0.0679, 0.1743, 0.2693, 0.2906)
"""Figure 2 (e) as printed, rising with M. At which M is not printed with them."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """The range [low, high] [S + 1, B] that the teacher's trajectories cover, from noise to data,
    apart for those that end at either training point. One that ends elsewhere counts for neither:
    a single stray would open the range for all."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, teacher: VelocityNet, settings: ToySettings) -> Envelope:
        """Of `settings.envelope` trajectories, whose noise follows from the seed."""
        generator = key_generator(settings.seed, "toy envelope")
        states = trajectories(
            teacher, torch.randn(settings.envelope, generator=generator), settings.steps
        )
        branches = [states[:, (states[-1] - x).abs() <= settings.tolerance] for x in DATA]
        if not all(branch.numel() for branch in branches):
            raise AccVideoError(
                "the teacher does not reach both training points; give it more teacher_updates"
            )
        return cls(
            torch.stack([branch.amin(1) for branch in branches], 1),
            torch.stack([branch.amax(1) for branch in branches], 1),
        )

    def excludes(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Whether each point [N], at a time of the grid, lies in neither branch."""
        row = ((1 - t) * (len(self.low) - 1)).round().long()
        x = x_t[:, None]
        return ~((x >= self.low[row]) & (x <= self.high[row])).any(1)


def ends_wrong(end: Tensor, tolerance: float) -> Tensor:
    """Whether each end [N] is farther than `tolerance` from every training point."""
    return nearest(end) > tolerance


@torch.no_grad()
def predicted_x0(teacher: VelocityNet, x_t: Tensor, t: Tensor) -> Tensor:
    """The x_0 [N] of one evaluation: distribution matching asks the teacher only this."""
    return x_t - t * teacher(x_t, t)


def useless_rates(
    teacher: VelocityNet, envelope: Envelope, points: Points, settings: ToySettings, *key: object
) -> dict[str, float]:
    """Share of useless points, by each criterion, among forward-diffused ones of `points`."""
    generator = key_generator(settings.seed, "toy rates", *key)
    t = grid_times(settings.points, settings.steps, generator)
    x_t = diffused(draw(points, settings.points, generator), t, generator)
    end = paths(teacher, x_t, t, settings.steps)[-1]
    return {
        "endpoint": _share(ends_wrong(end, settings.tolerance)),
        "envelope": _share(envelope.excludes(x_t, t)),
    }


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()

"""Trajectory-based few-step guidance (AccVideo, Sec. 4.2).

Shapes: B batch, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor

from .batch import KeyBatch
from .objective import Phase, Term
from .student import Student


def trajectory_loss(student: Student, batch: KeyBatch, k: int) -> Tensor:
    """Eq. 6 for one key interval, from t'_{k+1} (noisier) to t'_k.

        || s(l_{t'_{k+1}}, t'_{k+1}) - (l_{t'_k} - l_{t'_{k+1}}) / (t'_k - t'_{k+1}) ||^2

    The target is the teacher's average velocity between two key states, so one Euler step of a
    perfect student lands on the next one. The square is the mean over samples and elements, which
    differs from the paper's norm by a constant and keeps the loss comparable between sizes.
    """
    l, t = batch.latents, batch.t  # noqa: E741 - the paper's symbol
    target = (l[k] - l[k + 1]) / (t[k] - t[k + 1])
    return F.mse_loss(student.velocity(l[k + 1], t[k + 1], batch.cond).float(), target)


class TrajectoryGuidance:
    """The objective that is Eq. 6 and nothing else."""

    heads = None

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(self),)

    def __call__(self, student: Student, batch: KeyBatch, k: int) -> Iterator[Term]:
        yield Term("trajectory", trajectory_loss(student, batch, k))

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass

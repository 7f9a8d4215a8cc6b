"""Projection conditioning of a head: does what is seen fit its prompt, and its place in the clip?

Projection discriminator (Miyato and Koyama), as in SF-V's heads (Sec. 3.3) and StyleGAN-T's: the
inner product of the head's channels with an embedding is added to every logit. SF-V conditions its
spatial heads on the frame's index as well, and all heads on the noise level.

Shapes: B batch, L text tokens, P width of the prompt vector, R rows of a sample (its frames, or the
positions of its grid).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditioning import Condition

_FREQUENCIES = 8
_TIME_FREQUENCIES = 4


class Projection(nn.Module):
    """<W prompt + V frame, x> / sqrt(width) at every place of x [B R, width, ...]."""

    def __init__(self, prompt: int, width: int, frames: bool) -> None:
        """
        Args:
            prompt: P.
            frames: whether the R rows of a sample are its frames, which are then told apart.
        """
        super().__init__()
        self.prompt = nn.Linear(prompt, width, bias=False)
        self.frame = nn.Linear(2 * _FREQUENCIES, width, bias=False) if frames else None

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """x [B R, width, ...], prompt [B, P] -> [B R, 1, ...]."""
        rows = x.unflatten(0, (prompt.shape[0], -1))
        embedded = self.prompt(prompt)[:, None]
        if self.frame is not None:
            embedded = embedded + self.frame(frame_code(rows.shape[1]).to(x.device))
        fit = torch.einsum("brw...,brw->br...", rows, embedded.expand(rows.shape[:3]))
        return fit.flatten(0, 1)[:, None] / math.sqrt(x.shape[1])


def condition_vector(cond: Condition, t: Tensor | None = None) -> Tensor:
    """What heads are conditioned on [B, P]: the prompt and, with `t` [B], a noise level."""
    prompt = prompt_vector(cond)
    return prompt if t is None else torch.cat([prompt, time_code(t).to(prompt)], dim=1)


def time_code(t: Tensor) -> Tensor:
    """Sinusoids of flow times [B] -> [B, 8]; the slowest goes through half a turn from 0 to 1."""
    angles = math.pi * t[:, None] * 2.0 ** torch.arange(_TIME_FREQUENCIES, device=t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def prompt_vector(cond: Condition) -> Tensor:
    """The prompt as one vector [B, P]: pooled where there is one, else the mean of its tokens.

    Normalised, because text encoders differ by orders of magnitude.
    """
    if cond.pooled is not None:
        prompt = cond.pooled.float()
    else:
        mask = cond.full_mask()[..., None]
        prompt = (cond.text.float() * mask).sum(1) / mask.sum(1).clamp_min(1)
    return F.layer_norm(prompt, prompt.shape[1:])


def frame_code(frames: int) -> Tensor:
    """Sinusoids of the latent frames' indices [frames, 16], for clips of any length."""
    rates = 10_000.0 ** (-torch.arange(_FREQUENCIES) / _FREQUENCIES)
    angles = torch.arange(frames)[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)

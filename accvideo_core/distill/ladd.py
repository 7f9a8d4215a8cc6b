"""LADD (arXiv 2403.12015) as SF-V compares with it: the same heads, no reconstruction loss.

Real latents are meant to be the teacher's own results, the last states of its trajectories. The
student is trained at its key times and judged at logit-normal times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .renoised import Noising, RenoisedGame, build_game
from .setting import Setting
from .specs import LaddSpec


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """Uniform numbers -> times whose logit is N(mean, std^2)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def build_ladd(setting: Setting) -> RenoisedGame:
    """L_adv alone."""
    spec = setting.recipe.ladd or LaddSpec()

    def judged(_level: Tensor, u: Tensor) -> Tensor:
        return logit_normal(u, spec.mean, spec.std)

    return build_game(setting, Noising(setting.key_times[:-1], judged, spec.head_noise))

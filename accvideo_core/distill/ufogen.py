"""UFOGen (arXiv 2311.09257) as SF-V compares with it: with SF-V's heads.

A diffusion GAN on the student's key times: from the state at one of them the student predicts clean
latents, and these and the real ones are noised to the next lower key time and judged there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .renoised import Noising, RenoisedGame, build_game
from .setting import Setting
from .specs import UfogenSpec


def build_ufogen(setting: Setting) -> RenoisedGame:
    """L_adv between neighbouring key times + gamma || x^_0 - x_0 ||^2, the mean over elements."""
    spec = setting.recipe.ufogen or UfogenSpec()
    below = torch.tensor(setting.key_times[1:], dtype=torch.float64)

    def judged(level: Tensor, _u: Tensor) -> Tensor:
        return below[level]

    levels = setting.key_times[:-1]
    noising = Noising(levels, judged, spec.head_noise, F.mse_loss, spec.recon_weight)
    return build_game(setting, noising)

"""SF-V (arXiv 2406.04324): one-step generation, adversarially against real latents.

The paper writes EDM: x_sigma = x_0 + sigma eps. Here t = sigma / (1 + sigma), and its c_in, c_skip
and c_out are in the family's hands. Its discriminator says -1 to real and +1 to generated latents;
ours says the reverse, as everywhere in this package.

Shapes: B batch, C channels, T latent frames, H, W latent size; N levels.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from .renoised import Noising, RenoisedGame, build_game
from .setting import Setting
from .specs import SfvSpec


def sigma_grid(spec: SfvSpec, count: int) -> Tensor:
    """Eq. 5: `count` rising levels from sigma_min to sigma_max [N], float64."""
    low, high = (level ** (1 / spec.rho) for level in (spec.sigma_min, spec.sigma_max))
    return torch.linspace(low, high, count, dtype=torch.float64) ** spec.rho


def level_weights(spec: SfvSpec) -> Tensor:
    """Eq. 7: probabilities [N] of the levels sigma' at which the heads judge, float64.

    erf((log sigma'_{i-1} - P_mean) / (sqrt(2) P_std)) - erf((log sigma'_i - P_mean) / ...), over
    its sum: the mass of a log-normal below each level down to the one before. The lowest level has
    none before it, and no mass.
    """
    log_sigma = sigma_grid(spec, spec.judged_levels).log()
    reached = torch.erf((log_sigma - spec.p_mean) / (math.sqrt(2) * spec.p_std))
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), reached[:-1] - reached[1:]])
    return mass / mass.sum()


def judged_times(spec: SfvSpec) -> Tensor:
    """The levels as flow times t' [N], float64."""
    sigma = sigma_grid(spec, spec.judged_levels)
    return sigma / (1 + sigma)


def training_times(spec: SfvSpec) -> tuple[float, ...]:
    """The levels at which the student is trained, rising: all of the T_g but the lowest.

    The highest is t = 1, noise alone, from which the student is sampled; x_0 would be one part in
    701 of the state at sigma = 700.
    """
    sigmas = sigma_grid(spec, spec.levels)[1:].tolist()
    return (*(sigma / (1 + sigma) for sigma in sigmas[:-1]), 1.0)


def pseudo_huber(made: Tensor, real: Tensor, c: float, norm: str = "mean") -> Tensor:
    """Eq. 9, sqrt(|| made - real ||^2 + c^2) - c, averaged over samples.

    The square is the mean over a sample's elements, or with the norm "sum" their sum.
    """
    square = (made - real).square().flatten(1)
    distance = square.mean(1) if norm == "mean" else square.sum(1)
    return ((distance + c**2).sqrt() - c).mean()


def build_sf_v(setting: Setting) -> RenoisedGame:
    """L_adv (Eq. 8 and 11) + lambda L_recon (Eq. 9 and 10)."""
    spec = setting.recipe.sf_v or SfvSpec()
    reached, times = level_weights(spec).cumsum(0), judged_times(spec)

    def judged(_level: Tensor, u: Tensor) -> Tensor:
        return times[torch.searchsorted(reached, u).clamp_max(len(times) - 1)]

    reconstruction = partial(pseudo_huber, c=spec.huber_c, norm=spec.recon_norm)
    levels = training_times(spec)
    noising = Noising(levels, judged, spec.head_noise, reconstruction, spec.recon_weight)
    return build_game(setting, noising)

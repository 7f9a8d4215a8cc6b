"""A SAMPLER for variance-preserving models (CogVideoX) in ComfyUI's own graphs.

ComfyUI's samplers take the state for x_0 + sigma eps. Its CogVideoX hands the network's own state,
alpha x_0 + s eps with sigma = s / alpha, on as it is, so they do not fit.
"""

from __future__ import annotations

from typing import Any

import comfy.samplers
import torch
from torch import Tensor


class VarianceSampler(comfy.samplers.Sampler):
    """The deterministic DDIM step, which is Euler's in flow coordinates."""

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """From noise [B, C, T, H, W] along falling `sigmas` to the sample at the last one."""
        asked = {name: extra_args.get(name) for name in ("model_options", "seed")}
        asked["model_options"] = asked["model_options"] or {}
        x, steps = noise.float(), len(sigmas) - 1
        for step in range(steps):
            denoised = model_wrap(x, sigmas[step] * x.new_ones(len(x)), **asked)
            alpha, s = _levels(sigmas[step])
            eps = (x - alpha * denoised) / s
            alpha, s = _levels(sigmas[step + 1])
            x = alpha * denoised + s * eps
            if callback is not None:
                callback(step, denoised, x, steps)
        return x


def _levels(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, s) with alpha^2 + s^2 = 1 and s / alpha = sigma."""
    norm = torch.sqrt(1 + sigma**2)
    return 1 / norm, sigma / norm

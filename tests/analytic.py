"""Video models whose velocity and whose exact solution are known in closed form.

Both are real `VideoModel`s with a test-only family, so recorder, sampler, objectives and trainer
run on them unchanged and can be checked against mathematics.

Gaussian: data N(mean, std^2) per element. With s_t^2 = (1-t)^2 std^2 + t^2,

    v(x, t) = (t - (1-t) std^2) / s_t^2 (x - (1-t) mean) - mean,    x_t = (1-t) mean + s_t x_1.

Two-point mixture: every element is +a or -a with equal probability,

    E[x_0 | x] = a tanh(a (1-t) x / t^2),    v = (x - E[x_0 | x]) / t,

and the flow keeps quantiles: Phi(x_1) = (Phi((x_t - (1-t) a) / t) + Phi((x_t + (1-t) a) / t)) / 2.

Shapes: B batch, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.special import ndtr

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.latents import LatentSpec
from accvideo_core.models.video_model import Family, VideoModel

SPEC = LatentSpec(channels=2, stride_t=4, stride_hw=8, scale=(0.5,), shift=(0.1,))
"""5 frames of 16 x 16 pixels are latents of shape (2, 2, 2, 2)."""


class _Flow(nn.Module):
    """Two pass-through blocks, so that features and hooks have something to hold on to."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.tail = nn.Identity()

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.flow(self.tail(x), t.to(x.dtype).reshape(-1, 1, 1, 1, 1), cond)

    def flow(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        raise NotImplementedError


class GaussianFlow(_Flow):
    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def flow(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        mean = self.mean
        if cond.pooled is not None:
            mean = mean + cond.pooled[:, 0].reshape(-1, 1, 1, 1, 1)
        variance = ((1 - t) * self.std) ** 2 + t**2
        return (t - (1 - t) * self.std**2) / variance * (x - (1 - t) * mean) - mean


class MixtureFlow(_Flow):
    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def flow(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return (x - self.a * torch.tanh(self.a * (1 - t) * x / t**2)) / t


def _no_text(*_args: object) -> Condition:
    raise NotImplementedError("analytic models have no text encoder; use tests.analytic.condition")


ANALYTIC = Family(
    name="analytic",
    transformer_class="GaussianFlow",
    pipeline_class="",
    shift=3.0,
    steps=20,
    guidance=None,
    latent_spec=lambda _transformer, _vae: SPEC,
    forward=lambda module, x, t, cond: module(x, t, cond),
    blocks=lambda module: list(module.get_submodule("blocks").children()),
    tail=lambda module: module.get_submodule("tail"),
    tokens=lambda _module, output, _shape: output.movedim(1, -1),
    lora_targets=(),
    encode=_no_text,
    from_native=_no_text,
)


def analytic_model(module: nn.Module, dtype: torch.dtype = torch.float64) -> VideoModel:
    """Any module with `_Flow`'s call as a frozen VideoModel of the analytic family."""
    module = module.to(dtype).eval().requires_grad_(False)
    return VideoModel(module, ANALYTIC, SPEC, source="analytic")


def gaussian_model(
    mean: float = 0.5, std: float = 0.25, dtype: torch.dtype = torch.float64
) -> VideoModel:
    """Data N(mean + offset, std^2), where a prompt's offset is its condition's `pooled` [B, 1]."""
    return analytic_model(GaussianFlow(mean, std), dtype)


def mixture_model(a: float = 1.0, dtype: torch.dtype = torch.float64) -> VideoModel:
    """Data +a or -a per element."""
    return analytic_model(MixtureFlow(a), dtype)


def exact_gaussian_state(x_1: Tensor, t: float, mean: float = 0.5, std: float = 0.25) -> Tensor:
    """The exact solution at time t of the flow that starts at x_1."""
    return (1 - t) * mean + math.sqrt(((1 - t) * std) ** 2 + t**2) * x_1


def exact_mixture_state(x_1: Tensor, t: float, a: float = 1.0) -> Tensor:
    """The exact solution at time t (float64, by bisection of the quantile equation)."""
    x_1 = x_1.double()
    if t == 0:
        return a * torch.sign(x_1)
    quantile = ndtr(x_1)
    high = x_1.abs() + a + 1
    low = -high
    for _ in range(80):
        x = (low + high) / 2
        reached = (ndtr((x - (1 - t) * a) / t) + ndtr((x + (1 - t) * a) / t)) / 2
        below = reached < quantile
        low, high = torch.where(below, x, low), torch.where(below, high, x)
    return (low + high) / 2


def condition(batch: int = 1, offset: float | None = None, length: int = 3) -> Condition:
    """A dummy Condition of `batch` samples; `offset` moves the Gaussian model's mean."""
    text = torch.linspace(-1, 1, batch * length * 2).reshape(batch, length, 2)
    pooled = None if offset is None else torch.full((batch, 1), float(offset))
    return Condition(text, torch.ones(batch, length, dtype=torch.bool), pooled)


def prompts(count: int, offsets: bool = False) -> list[Prompt]:
    """Prompts "clip 0", "clip 1", ...; with `offsets`, prompt i moves the mean by i."""
    return [
        Prompt.of(f"clip {i}", condition(offset=float(i) if offsets else None))
        for i in range(count)
    ]

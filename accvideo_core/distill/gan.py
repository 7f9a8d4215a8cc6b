"""The game between the student and the discriminator's heads: losses, regulariser, figures.

Shapes: B batch, T latent frames, h, w token grid, D token width, P patch logits of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditioning import Condition
from .head import Head
from .heads import Heads, over_heads
from .objective import Term
from .recipes import Recipe


@dataclass(frozen=True, slots=True)
class Judge:
    """The heads of one key time, told what they judge: features of the blocks -> patch logits."""

    heads: Heads
    k: int
    cond: Condition
    t: Tensor | None = None
    """Time [B] of the features, for heads that are told."""

    def __call__(self, features: Sequence[Tensor]) -> list[Tensor]:
        return self.heads(self.k, features, self.cond, self.t)

    @property
    def asked(self) -> list[Head]:
        return self.heads.of(self.k)


@dataclass(frozen=True, slots=True)
class GanLoss:
    """The two sides of the game over one head's patch logits; a positive logit says "real"."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    """(logits of real, logits of fake) -> scalar."""
    generator: Callable[[Tensor], Tensor]
    """Logits of fake -> scalar."""


GAN_LOSSES = {
    # -log D(real) - log(1 - D(fake)) as in Eq. 7 of AccVideo. The student minimises -log D(fake),
    # which has the same fixed point as Eq. 7's log(1 - D(fake)) but a gradient where D is sure.
    "logistic": GanLoss(
        lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
        lambda fake: F.softplus(-fake).mean(),
    ),
    "hinge": GanLoss(
        lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
        lambda fake: -fake.mean(),
    ),
}


def discriminator_term(
    recipe: Recipe,
    judge: Judge,
    real: Sequence[Tensor],
    fake: Sequence[Tensor],
    smoothness: Callable[[Sequence[Tensor]], Tensor],
) -> Term:
    """The heads' loss on features of real and of generated latents, with its regulariser.

    Args:
        real, fake: features of the blocks; no gradient goes into them.
        smoothness: how far the logits of real latents move with these (approximate R1).
    """
    if penalised := recipe.r1_weight > 0 and recipe.r1 == "features":
        real = [x.detach().float().requires_grad_() for x in real]
    d_real = judge(real)
    d_fake = judge([x.detach() for x in fake])
    loss = over_heads(GAN_LOSSES[recipe.gan_loss].discriminator, d_real, d_fake)
    if penalised:
        penalty = gradient_penalty(judge.asked, judge.heads.inputs(real), d_real)
        loss = loss + recipe.r1_weight * penalty
    elif recipe.r1_weight:
        loss = loss + recipe.r1_weight * smoothness(d_real)
    figures = {
        "real_accuracy": over_heads(lambda real: (real > 0).float().mean(), d_real),
        "fake_accuracy": over_heads(lambda fake: (fake < 0).float().mean(), d_fake),
    }
    return Term("discriminator", loss, trains_heads=True, figures=figures)


def gradient_penalty(
    heads: Sequence[Head], features: Sequence[Tensor], logits: Sequence[Tensor]
) -> Tensor:
    """R1 on the heads' inputs: the squared gradient norm of a patch logit, averaged over patches.

    || grad_x D ||^2 with respect to the standardised features, so that one weight suits every
    backbone, block and size of clip. `features` are leaves that `logits` were computed from. The
    backbone lies outside: nothing is differentiated twice but the heads.
    """
    penalties = []
    for head, x, d in zip(heads, features, logits, strict=True):
        (gradient,) = torch.autograd.grad(d.sum(), x, create_graph=True)
        penalties.append((gradient * head.std).square().sum() / d.numel())
    return torch.stack(penalties).mean()

"""Adversarial training at every key time (AccVideo, Sec. 4.3, Eq. 7-8 and Algorithm 1).

Real samples are the recorded latents l_{t'_k}, fake ones the student's own latents at the same key
time, rolled from fresh noise. Both already lie at noise level t'_k, so neither is noised again.

Shapes: B batch, C channels, T latent frames, H, W latent size; h, w token grid; D token width;
P patch logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flow import euler_states, shift_time
from ..models.video_model import VideoModel
from .batch import KeyBatch
from .heads import TimestepHeads
from .objective import Term
from .recipes import Recipe
from .student import Student
from .trajectory import trajectory_loss


def generate(student: Student, batch: KeyBatch, k: int) -> Tensor:
    """The student's latent l^gen_{t'_k} [B, C, T, H, W], rolled from the fresh noise `batch.z`.

    Algorithm 1, lines 15-18. The paper's queues spread one rollout over m updates; here every
    update rolls afresh. Either way the gradient goes through the last Euler step only.
    """
    falling = batch.t[::-1]
    states = euler_states(lambda x, t: student.velocity(x, t, batch.cond), batch.z, falling)
    with torch.no_grad():
        for _ in range(batch.steps - k):
            next(states)  # z, ..., l^gen_{t'_{k+1}}
    return next(states)


@dataclass(frozen=True, slots=True)
class GanLoss:
    """The two sides of the game over patch logits; a positive logit says "real"."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    """(logits of real, logits of fake) -> scalar."""
    generator: Callable[[Tensor], Tensor]
    """Logits of fake -> scalar."""


GAN_LOSSES = {
    # -log D(real) - log(1 - D(fake)) as in Eq. 7. The student minimises -log D(fake), which has the
    # same fixed point as Eq. 7's log(1 - D(fake)) but a gradient where D is sure.
    "logistic": GanLoss(
        lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
        lambda fake: F.softplus(-fake).mean(),
    ),
    "hinge": GanLoss(
        lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
        lambda fake: -fake.mean(),
    ),
}


@dataclass(frozen=True, slots=True)
class Adversarial:
    """The objective L_traj + lambda L_adv for the student, and L_adv's other side for the heads.

    The paper weighs the heads' loss with lambda too; AdamW is blind to such a factor.
    """

    recipe: Recipe
    teacher: VideoModel
    """Frozen v_theta of Eq. 8."""
    heads: TimestepHeads

    def __call__(self, student: Student, batch: KeyBatch, k: int) -> Iterator[Term]:
        gan = GAN_LOSSES[self.recipe.gan_loss]
        yield Term("trajectory", trajectory_loss(student, batch, k), self.recipe.trajectory_weight)

        fake = self.features(generate(student, batch, k), batch, k)
        yield Term("generator", gan.generator(self.heads(k, fake)), self.recipe.adv_weight)

        with torch.no_grad():
            real = self.features(batch.latents[k], batch, k)
        d_real = self.heads(k, real)
        d_fake = self.heads(k, [x.detach() for x in fake])
        loss = gan.discriminator(d_real, d_fake)
        if self.recipe.r1_weight:
            loss = loss + self.recipe.r1_weight * self.smoothness(d_real, batch, k)
        figures = {
            "real_accuracy": (d_real > 0).float().mean(),
            "fake_accuracy": (d_fake < 0).float().mean(),
        }
        yield Term("discriminator", loss, trains_heads=True, figures=figures)

    def features(self, l: Tensor, batch: KeyBatch, k: int) -> list[Tensor]:  # noqa: E741
        """The frozen teacher's features of latents at t'_k, each [B, T, h, w, D] (Eq. 8)."""
        return self.teacher.features(
            l, self.feature_time(batch, k), batch.cond, self.heads.blocks[k]
        )

    def feature_time(self, batch: KeyBatch, k: int) -> float | Tensor:
        """t'_k itself, or for clean latents a drawn time [B] where the recipe says so."""
        shift = self.recipe.clean_time_shift
        if k > 0 or shift is None:
            return batch.t[k]
        return torch.tensor([shift_time(u, shift) for u in batch.u.tolist()])

    def smoothness(self, d_real: Tensor, batch: KeyBatch, k: int) -> Tensor:
        """Approximate R1 (Seaweed-APT): how far D moves when real latents move by sigma noise.

        `batch.z` has nothing to do with the real latents and serves as that noise.
        """
        with torch.no_grad():
            near = batch.latents[k] + self.recipe.r1_sigma * batch.z
            features = self.features(near, batch, k)
        return F.mse_loss(self.heads(k, features), d_real)


def feature_blocks(
    recipe: Recipe, teacher: VideoModel, rising: tuple[float, ...]
) -> list[tuple[int, ...]]:
    """The feature blocks of every key time k = 0 ... m - 1: the recipe's, or the paper's choice."""
    if recipe.feature_blocks is not None:
        return [recipe.feature_blocks] * (len(rising) - 1)
    return [(teacher.feature_block(t),) for t in rising[:-1]]


@torch.no_grad()
def build_adversarial(recipe: Recipe, teacher: VideoModel, batch: KeyBatch) -> Adversarial:
    """The objective with fresh heads, whose geometry and scale follow from the real `batch`.

    The teacher sees one sample at a time, so that any batch fits.
    """
    samples = list(batch.split(batch.z.shape[0]))
    blocks = feature_blocks(recipe, teacher, batch.t)
    wanted = sorted({block for per_time in blocks for block in per_time})
    found = teacher.features(samples[0].latents[0], batch.t[0], samples[0].cond, wanted)
    shapes = {block: tuple(x.shape[2:]) for block, x in zip(wanted, found, strict=True)}
    heads = TimestepHeads(blocks, shapes, recipe.head_width, recipe.seed)  # type: ignore[arg-type]
    game = Adversarial(recipe, teacher, heads.to(teacher.device))
    for k in range(batch.steps):
        real = [game.features(sample.latents[k], sample, k) for sample in samples]
        for head, features in zip(heads.of(k), zip(*real, strict=True), strict=True):
            head.calibrate(features)
    return game

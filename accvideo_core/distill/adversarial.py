"""Adversarial training at every key time (AccVideo, Sec. 4.3, Eq. 7-8 and Algorithm 1).

Real samples are the recorded latents l_{t'_k}, fake ones the student's own latents at the same key
time, rolled from fresh noise. Both already lie at noise level t'_k, so neither is noised again.

Shapes: B batch, C channels, T latent frames, H, W latent size; h, w token grid; D token width;
P patch logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AccVideoError
from ..flow import shift_time
from ..models.video_model import VideoModel
from .batch import KeyBatch
from .head import Head
from .heads import Heads, over_heads
from .objective import Phase, Term
from .projection import prompt_vector
from .recipes import Recipe
from .rollout import DirectRollout, Rollout
from .student import Student
from .trajectory import trajectory_loss

CALIBRATION_SAMPLES = 8
"""Recorded samples that set the scale of the heads' inputs."""


@dataclass(frozen=True, slots=True)
class GanLoss:
    """The two sides of the game over one head's patch logits; a positive logit says "real"."""

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
    heads: Heads
    rollout: Rollout

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Further updates of the heads, each on a batch of its own; then the student's."""
        more = [Phase(self.heads_alone, f"heads/{i}") for i in range(1, self.recipe.head_updates)]
        if self.recipe.updates == "separate":
            return (*more, Phase(self.guidance), Phase(self.game))
        return (*more, Phase(self))

    def __call__(self, student: Student, batch: KeyBatch, k: int) -> Iterator[Term]:
        yield from self.guidance(student, batch, k)
        yield from self.game(student, batch, k)

    def guidance(self, student: Student, batch: KeyBatch, k: int) -> Iterator[Term]:
        """L_traj, Eq. 6."""
        yield Term("trajectory", trajectory_loss(student, batch, k), self.recipe.trajectory_weight)

    def game(self, student: Student, batch: KeyBatch, k: int) -> Iterator[Term]:
        """L_adv, Eq. 7: the student's side and the heads'."""
        fakes = self.rollout(student, batch, k)
        fake = self.features(fakes.latents, fakes.batch, k)
        judged = self.heads(k, fake, fakes.batch.cond)
        loss = over_heads(GAN_LOSSES[self.recipe.gan_loss].generator, judged)
        yield Term("generator", loss, self.recipe.adv_weight)
        yield self.discriminator(fake, fakes.batch, k)

    @torch.no_grad()
    def unseen(self, student: Student, batch: KeyBatch, k: int) -> tuple[list[Tensor], KeyBatch]:
        """Features of fakes that the student does not learn from, and the batch they belong to."""
        fakes = self.rollout(student, batch, k, advance=False)
        return self.features(fakes.latents, fakes.batch, k), fakes.batch

    def heads_alone(self, student: Student, batch: KeyBatch, k: int) -> Iterator[Term]:
        """The heads' side of L_adv."""
        yield self.discriminator(*self.unseen(student, batch, k), k)

    def discriminator(self, fake: Sequence[Tensor], batch: KeyBatch, k: int) -> Term:
        """The heads' loss on features of fakes and of the batch's real latents."""
        recipe = self.recipe
        with torch.no_grad():
            real = self.features(batch.latents[k], batch, k)
        if penalised := recipe.r1_weight > 0 and recipe.r1 == "features":
            real = [x.detach().float().requires_grad_() for x in real]
        d_real = self.heads(k, real, batch.cond)
        d_fake = self.heads(k, [x.detach() for x in fake], batch.cond)
        loss = over_heads(GAN_LOSSES[recipe.gan_loss].discriminator, d_real, d_fake)
        if penalised:
            penalty = gradient_penalty(self.heads.of(k), self.heads.inputs(real), d_real)
            loss = loss + recipe.r1_weight * penalty
        elif recipe.r1_weight:
            loss = loss + recipe.r1_weight * self.smoothness(d_real, batch, k)
        figures = {
            "real_accuracy": over_heads(lambda real: (real > 0).float().mean(), d_real),
            "fake_accuracy": over_heads(lambda fake: (fake < 0).float().mean(), d_fake),
        }
        return Term("discriminator", loss, trains_heads=True, figures=figures)

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

    def smoothness(self, d_real: Sequence[Tensor], batch: KeyBatch, k: int) -> Tensor:
        """Approximate R1 (Seaweed-APT): how far D moves when real latents move by sigma noise.

        `batch.z` has nothing to do with the real latents and serves as that noise.
        """
        with torch.no_grad():
            near = batch.latents[k] + self.recipe.r1_sigma * batch.z
            features = self.features(near, batch, k)
        return over_heads(F.mse_loss, self.heads(k, features, batch.cond), d_real)

    def state_dict(self) -> dict[str, Tensor]:
        return self.rollout.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.rollout.load_state_dict(state)


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


def feature_blocks(
    recipe: Recipe, teacher: VideoModel, rising: tuple[float, ...]
) -> list[tuple[int, ...]]:
    """The feature blocks of every key time k = 0 ... m - 1: the recipe's, or the paper's choice."""
    if recipe.feature_blocks is not None:
        return [recipe.feature_blocks] * (len(rising) - 1)
    return [(teacher.feature_block(t),) for t in rising[:-1]]


def check_features(recipe: Recipe, teacher: VideoModel) -> None:
    """
    Raises:
        AccVideoError: the teacher cannot give the features that the recipe asks for.
    """
    blocks, last = recipe.feature_blocks or (), teacher.num_blocks - 1
    if wrong := [block for block in blocks if block > last]:
        raise AccVideoError(
            f"recipe.feature_blocks holds {wrong[0]}, but this network's blocks are 0 to {last}; "
            "name some of those, or use None"
        )
    if recipe.clean_time_shift is not None and teacher.family.experts > 1:
        raise AccVideoError(
            f"recipe.clean_time_shift is {recipe.clean_time_shift}, whose times fall to both of "
            "this model's experts, which have features of their own; set it to None"
        )


@torch.no_grad()
def build_adversarial(
    recipe: Recipe, teacher: VideoModel, batch: KeyBatch, rollout: Rollout | None = None
) -> Adversarial:
    """The objective with fresh heads, whose widths and scales follow from the real `batch`.

    The teacher sees one sample at a time, so that any batch fits.
    """
    samples = list(batch.split(batch.z.shape[0]))
    blocks = feature_blocks(recipe, teacher, batch.t)
    wanted = sorted({block for per_time in blocks for block in per_time})
    found = teacher.features(samples[0].latents[0], batch.t[0], samples[0].cond, wanted)
    widths = {block: x.shape[-1] for block, x in zip(wanted, found, strict=True)}
    prompt = prompt_vector(batch.cond).shape[1] if recipe.head_conditioning else None
    heads = Heads(blocks, widths, recipe, prompt).to(teacher.device)
    game = Adversarial(recipe, teacher, heads, rollout or DirectRollout())
    heads.calibrate(
        (k, game.features(sample.latents[k], sample, k))
        for k in range(batch.steps)
        for sample in samples
    )
    return game

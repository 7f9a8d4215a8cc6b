"""Adversarial training at every key time (AccVideo, Sec. 4.3, Eq. 7-8 and Algorithm 1).

Real samples are the recorded latents l_{t'_k}, fake ones the student's own latents at the same key
time, rolled from fresh noise. Both already lie at noise level t'_k, so neither is noised again.

Shapes: B batch, C channels, T latent frames, H, W latent size; h, w token grid; D token width;
P patch logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AccVideoError
from ..flow import shift_time
from ..models.video_model import VideoModel
from .batch import KeyBatch
from .gan import GAN_LOSSES, Judge, discriminator_term
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
        with torch.no_grad():
            real = self.features(batch.latents[k], batch, k)
        smoothness = partial(self.smoothness, batch=batch, k=k)
        judge = Judge(self.heads, k, batch.cond)
        return discriminator_term(self.recipe, judge, real, fake, smoothness)

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

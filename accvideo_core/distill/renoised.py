"""Adversarial training on clean latents that are noised again (SF-V, LADD, UFOGen).

From x_t = (1 - t) x_0 + t eps of real latents the student predicts x^_0 = x_t - t v. Real and
predicted latents are then noised to one level t' with noise of their own, and heads on the frozen
teacher's features at t' tell them apart. A method is a choice of t, of t' and of what else the
student minimises.

Shapes: B batch, C channels, T latent frames, H, W latent size; h, w token grid; D token width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AccVideoError
from ..flow import Times, expand_time, interpolate
from ..models.video_model import VideoModel
from .batch import KeyBatch
from .gan import GAN_LOSSES, Judge, discriminator_term
from .heads import Heads, over_heads
from .objective import Phase, Term
from .projection import condition_vector
from .recipes import Recipe
from .setting import Setting
from .student import Student

CALIBRATION_SAMPLES = 8
"""Recorded samples that set the scale of the heads' inputs."""
FEATURE_BLOCKS = 4
"""Blocks that heads look at unless the recipe names them: the encoder of SF-V's network has four,
others give as many, evenly spaced and the last among them."""

Reconstruction = Callable[[Tensor, Tensor], Tensor]
"""(predicted, real clean latents, each [B, C, T, H, W]) -> scalar."""


def nothing(_made: Tensor, real: Tensor) -> Tensor:
    """The reconstruction loss of a method without one."""
    return real.new_zeros(())


@dataclass(frozen=True, slots=True)
class Noising:
    """What tells one method from another."""

    levels: Times
    """Times t at which the student is trained, each equally often."""
    judged: Callable[[Tensor, Tensor], Tensor]
    """(numbers of the samples' levels [B], uniform numbers [B] float64) -> t' [B]."""
    head_noise: bool
    """Whether the heads are told t'."""
    reconstruction: Reconstruction = nothing
    recon_weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is drawn for one batch."""

    t: Tensor
    """[B] float32: how noisy the student's input is."""
    judged: Tensor
    """[B] float32: t'."""


@dataclass(frozen=True, slots=True)
class RenoisedGame:
    """The student's loss L_adv + lambda L_recon, and the heads' side of L_adv."""

    recipe: Recipe
    teacher: VideoModel
    """Frozen; gives the features."""
    heads: Heads
    noising: Noising = field(repr=False)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Further updates of the heads, each on a batch of its own; then the student's."""
        more = [Phase(self.heads_alone, f"heads/{i}") for i in range(1, self.recipe.head_updates)]
        return (*more, Phase(self))

    def __call__(self, student: Student, batch: KeyBatch, k: int) -> Iterator[Term]:
        recipe, noising, drawn = self.recipe, self.noising, self.draw(batch)
        made = self.predict(student, batch, drawn.t)
        fake = self.features(made, "fake", drawn.judged, batch)
        adversarial = over_heads(
            GAN_LOSSES[recipe.gan_loss].generator, self.judge(batch, drawn)(fake)
        )
        reconstruction = noising.reconstruction(made, batch.latents[0])
        # One term, because both go back through the same pass of the student.
        loss = recipe.adv_weight * adversarial + noising.recon_weight * reconstruction
        figures = {"generator": adversarial.detach(), "reconstruction": reconstruction.detach()}
        yield Term("student", loss, figures=figures)
        yield self.discriminator(fake, batch, drawn)

    @torch.no_grad()
    def unseen(self, student: Student, batch: KeyBatch, drawn: Drawn) -> list[Tensor]:
        """Features of predictions that the student does not learn from."""
        made = self.predict(student, batch, drawn.t)
        return self.features(made, "fake", drawn.judged, batch)

    def heads_alone(self, student: Student, batch: KeyBatch, k: int) -> Iterator[Term]:
        """The heads' side of L_adv."""
        drawn = self.draw(batch)
        yield self.discriminator(self.unseen(student, batch, drawn), batch, drawn)

    def draw(self, batch: KeyBatch) -> Drawn:
        """t and t' of every sample, the same whenever the batch is asked for them."""
        levels = torch.tensor(self.noising.levels, device=batch.z.device)
        number = (batch.uniform("level") * len(levels)).long()
        judged = self.noising.judged(number, batch.uniform("judged"))
        return Drawn(levels[number.to(levels.device)], judged.float().to(levels.device))

    def predict(self, student: Student, batch: KeyBatch, t: Tensor) -> Tensor:
        """The student's clean latents x^_0 [B, C, T, H, W] from x_t; at t = 1 from noise alone."""
        x_t = interpolate(batch.latents[0], batch.z, t)
        return x_t - expand_time(t, x_t) * student.velocity(x_t, t, batch.cond).float()

    def features(self, x_0: Tensor, name: str, t: Tensor, batch: KeyBatch) -> list[Tensor]:
        """The frozen teacher's features of clean latents that are noised to t' [B].

        `name` chooses the noise: real and fake latents get their own at the same level.
        """
        noised = interpolate(x_0, batch.noise(name), t)
        return self.teacher.features(noised, t, batch.cond, self.heads.blocks[0])

    def judge(self, batch: KeyBatch, drawn: Drawn) -> Judge:
        told = drawn.judged if self.noising.head_noise else None
        return Judge(self.heads, 0, batch.cond, told)

    def discriminator(self, fake: Sequence[Tensor], batch: KeyBatch, drawn: Drawn) -> Term:
        """The heads' loss on features of fakes and of the batch's real latents."""
        with torch.no_grad():
            real = self.features(batch.latents[0], "real", drawn.judged, batch)
        smoothness = partial(self.smoothness, batch=batch, drawn=drawn)
        return discriminator_term(self.recipe, self.judge(batch, drawn), real, fake, smoothness)

    def smoothness(self, d_real: Sequence[Tensor], batch: KeyBatch, drawn: Drawn) -> Tensor:
        """Approximate R1 (Seaweed-APT): how far D moves when real latents move by sigma noise."""
        with torch.no_grad():
            near = batch.latents[0] + self.recipe.r1_sigma * batch.noise("r1")
            features = self.features(near, "real", drawn.judged, batch)
        return over_heads(F.mse_loss, self.judge(batch, drawn)(features), d_real)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass


@torch.no_grad()
def build_game(setting: Setting, noising: Noising) -> RenoisedGame:
    """The objective with fresh heads, whose widths and scales follow from real latents.

    The teacher sees one sample at a time, so that any number fits.

    Raises:
        AccVideoError: the teacher is two networks, whose features differ from time to time.
    """
    recipe, teacher = setting.recipe, setting.teacher
    if teacher.family.experts > 1:
        raise AccVideoError(
            f"{recipe.title} judges at times that fall to both of this model's experts, which "
            "have features of their own; choose a model of one network, or the recipe adversarial"
        )
    batch = setting.real(CALIBRATION_SAMPLES)
    samples = list(batch.split(len(batch.z)))
    blocks = recipe.feature_blocks or even_blocks(teacher.num_blocks)
    found = teacher.features(samples[0].latents[0], 0.5, samples[0].cond, blocks)
    widths = {block: x.shape[-1] for block, x in zip(blocks, found, strict=True)}
    told = torch.zeros(1) if noising.head_noise else None
    prompt = None
    if recipe.head_conditioning:
        prompt = condition_vector(samples[0].cond, told).shape[1]
    heads = Heads((blocks,), widths, recipe, prompt).to(teacher.device)
    game = RenoisedGame(recipe, teacher, heads, noising)
    heads.calibrate(
        (0, game.features(sample.latents[0], "real", game.draw(sample).judged, sample))
        for sample in samples
    )
    return game


def even_blocks(count: int, wanted: int = FEATURE_BLOCKS) -> tuple[int, ...]:
    """`wanted` of `count` blocks, evenly spaced, the last one among them; all of fewer."""
    wanted = min(count, wanted)
    return tuple(round((i + 1) * count / wanted) - 1 for i in range(wanted))

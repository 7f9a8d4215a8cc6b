"""Adversarial LoRA distillation as one would write it by hand: separate copies, no tricks.

The mathematics is that of a recipe with its defaults (Eq. 6, Eq. 7 with lambda, direct rollouts,
one head per key time), and feature passes stop early as ours do, so that what is compared is what
the trainer adds: its loop on the side of time, its one copy of the weights on that of memory.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from accvideo_core.distill.adversarial import build_adversarial
from accvideo_core.distill.batch import KeyBatch
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.student import Student, StudentInfo
from accvideo_core.models import VideoModel
from accvideo_core.trajectories.store import TrajectoryDataset
from benchmarks.training_cases import Samples


def own_copy(model: VideoModel) -> VideoModel:
    """The same network in memory of its own."""
    return replace(model, module=copy.deepcopy(model.module))


class PlainAdversarial:
    """Student, frozen backbone of the discriminator and, of three copies, a teacher at rest."""

    def __init__(
        self, model: VideoModel, dataset: TrajectoryDataset, recipe: Recipe, copies: int = 3
    ) -> None:
        """
        Args:
            copies: of the base weights, `model` among them. Two are needed; the third is the
                teacher that such loops hold beside the student and the backbone.
        """
        info, self.recipe = dataset.info, recipe
        self.samples = Samples(dataset, recipe.student_steps, model.device)
        known = StudentInfo(
            family=model.family.name,
            base=model.fingerprint,
            key_times=self.samples.times,
            guidance=info.guidance,
            lora=recipe.lora,
            latent_spec=model.latent_spec,
            frames=info.frames,
            height=info.height,
            width=info.width,
        )
        self.held = [own_copy(model) for _ in range(copies - 2)]
        self.student = Student.create(own_copy(model), known, recipe.seed).model
        self.backbone = model
        self.heads: nn.Module | None = None
        parameters = [p for p in self.student.module.parameters() if p.requires_grad]
        self.players = [(parameters, self.optimizer(parameters, recipe.lr, recipe.betas))]
        self.step = 0

    def optimizer(
        self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float]
    ) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr, betas, weight_decay=self.recipe.weight_decay)

    def build_heads(self, real: KeyBatch) -> None:
        """Heads as the trainer builds them, calibrated on `real`."""
        recipe = self.recipe
        self.game = build_adversarial(recipe, self.backbone, real)
        self.heads = heads = self.game.heads
        parameters = list(heads.parameters())
        lr = recipe.head_lr or recipe.lr
        self.players.append((parameters, self.optimizer(parameters, lr, recipe.head_betas)))

    def update(self, batch: KeyBatch | None = None) -> dict[str, float]:
        """One update of the student and of the heads; its losses."""
        if batch is None:
            batch = self.samples.draw(self.recipe.batch_size)
        if self.heads is None:
            self.build_heads(self.samples.draw(8))
        assert self.heads is not None
        m = self.recipe.student_steps
        k = m - 1 - self.step % m
        l, t, cond = batch.latents, batch.t, batch.cond  # noqa: E741 - the paper's symbol

        v = self.student.velocity(l[k + 1], t[k + 1], cond).float()
        trajectory = F.mse_loss(v, (l[k] - l[k + 1]) / (t[k] - t[k + 1]))
        x = batch.z
        for i in range(m, k, -1):
            with torch.set_grad_enabled(i == k + 1):
                x = x + (t[i - 1] - t[i]) * self.student.velocity(x, t[i], cond).float()
        fake = self.backbone.features(x, t[k], cond, self.game.heads.blocks[k])
        self.heads.requires_grad_(False)
        (logits,) = self.heads(k, fake, cond)  # of the one feature block
        generator = F.softplus(-logits).mean()
        (trajectory + self.recipe.adv_weight * generator).backward()
        self.heads.requires_grad_(True)

        with torch.no_grad():
            real = self.backbone.features(l[k], t[k], cond, self.game.heads.blocks[k])
        (d_real,), (d_fake,) = (
            self.heads(k, features, cond) for features in (real, [one.detach() for one in fake])
        )
        discriminator = F.softplus(-d_real).mean() + F.softplus(d_fake).mean()
        discriminator.backward()

        for parameters, optimizer in self.players:
            nn.utils.clip_grad_norm_(parameters, self.recipe.clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        losses = {"trajectory": trajectory, "generator": generator, "discriminator": discriminator}
        return {name: float(loss.detach()) for name, loss in losses.items()}

"""The gradients of one adversarial update: with whatever saves memory, and by plain copies.

Shapes: B batch, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from accvideo_core.distill.adversarial import Adversarial, build_adversarial
from accvideo_core.distill.batch import KeyBatch
from accvideo_core.distill.memory import savings
from accvideo_core.distill.optimiser import Role
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.models import VideoModel
from accvideo_core.models.quantised import PackedLinear
from accvideo_core.models.swapping import Transfer
from tests.tiny_families import Case

TIMES = (0.0, 0.6, 1.0)
RECIPE = Recipe(adversarial=True, student_steps=2, lora=LoraSpec(rank=2), head_width=16)
CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing": True}
ALL: dict[str, Any] = {**CHECKPOINTING, "offload_activations": True, "swap_blocks": 3}
"""All but compile."""
Gradients = dict[str, Tensor]


class FarAway(Transfer):
    """A device whose slots hold NaN until their transfer has been waited for."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.started = 0
        self.slots: list[Tensor] = []

    def slot(self, size: int) -> Tensor:
        self.slots.append(super().slot(size))
        return self.slots[-1]

    def start(self, host: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        self.started += 1
        slot.fill_(255)  # NaN in every format that weights and scales have
        return host, slot

    def finish(self, ticket: tuple[Tensor, Tensor]) -> None:
        host, slot = ticket
        slot.copy_(host)


def batch_of(case: Case) -> KeyBatch:
    """Random key states and noise for the case's conditions."""
    generator = torch.Generator().manual_seed(8)
    return KeyBatch(
        latents=torch.randn(len(TIMES), *case.x.shape, generator=generator),
        t=TIMES,
        cond=case.condition,
        z=torch.randn(case.x.shape, generator=generator),
        u=torch.rand(len(case.x), generator=generator),
    )


def student_of(teacher: VideoModel, lora: LoraSpec | None = RECIPE.lora) -> Student:
    """A student that is no longer its teacher."""
    info = StudentInfo(
        family=teacher.family.name,
        base=teacher.fingerprint,
        key_times=TIMES[::-1],
        guidance=teacher.family.guidance,
        lora=lora,
        latent_spec=teacher.latent_spec,
        frames=5,
        height=16,
        width=16,
    )
    student = Student.create(teacher, info)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in student.trainable().values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return student


class Update:
    """An objective with its roles, for a student and the frozen teacher that it is shown to."""

    def __init__(
        self, student: Student, teacher: VideoModel, batch: KeyBatch, recipe: Recipe = RECIPE
    ) -> None:
        self.student, self.batch = student, batch
        self.game: Adversarial = build_adversarial(recipe, teacher, batch)
        heads = dict(self.game.heads.named_parameters())
        self.roles = {
            "student": Role(student.trainable(), recipe.lr, recipe.betas, recipe),
            "heads": Role(heads, recipe.lr, recipe.head_betas, recipe),
        }

    def backward(self) -> None:
        """Every term at every key time, as the trainer does."""
        for k in range(self.batch.steps):
            for term in self.game(self.student, self.batch, k):
                role = self.roles["heads" if term.trains_heads else "student"]
                role.backward(term.loss * term.weight)

    def gradients(self) -> Gradients:
        """Of every parameter of every role."""
        self.backward()
        return {
            f"{role}.{name}": p.grad.clone()
            for role, trained in self.roles.items()
            for name, p in trained.parameters.items()
            if p.grad is not None
        }


def unpacked(model: VideoModel) -> VideoModel:
    """A deep copy with the numbers that packed weights stand for, in plain layers."""
    module = copy.deepcopy(model.module)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, PackedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight.data = layer.dense(torch.float32)
            if layer.bias is not None:
                plain.bias.data = layer.bias.data
            path, _, last = name.rpartition(".")
            setattr(module.get_submodule(path), last, plain.requires_grad_(False))
    return replace(model, module=module)


def reference(
    teacher: VideoModel, batch: KeyBatch, lora: LoraSpec | None = RECIPE.lora
) -> Gradients:
    """By a student and a teacher that share nothing, and no tricks."""
    return Update(student_of(unpacked(teacher), lora), unpacked(teacher), batch).gradients()


def saving(
    teacher: VideoModel,
    batch: KeyBatch,
    options: Mapping[str, Any],
    transfer: Transfer,
    lora: LoraSpec | None = RECIPE.lora,
    backend: str | Callable[..., Any] = "inductor",
) -> Gradients:
    """By a student and a teacher that share all they can, under the options of a recipe."""
    student, recipe = student_of(teacher, lora), replace(RECIPE, lora=lora, **options)
    with savings(student, recipe, transfer, backend) as frozen:
        return Update(student, frozen, batch, recipe).gradients()


def difference(found: Gradients, expected: Gradients) -> float:
    """The largest error of any parameter's gradient, relative to its largest number."""
    assert found.keys() == expected.keys()
    largest = {name: float(x.abs().max()) for name, x in expected.items()}
    assert all(size > 0 for size in largest.values())
    return max(float((found[name] - x).abs().max()) / largest[name] for name, x in expected.items())

"""Latent consistency distillation against closed forms."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import analytic
import numpy as np
import pytest
import tiny
import torch

from accvideo_core.distill.batch import KeyBatch
from accvideo_core.distill.consistency import Consistency, build_consistency, distance
from accvideo_core.distill.optimiser import Average, Role
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.setting import Setting
from accvideo_core.distill.specs import ConsistencySpec
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.errors import AccVideoError
from accvideo_core.flow import time_grid
from accvideo_core.guidance import Cfg, Guided
from accvideo_core.models import VideoModel

RECIPE = Recipe(consistency=ConsistencySpec(steps=20, skip=5), student_steps=2)


def student_of(teacher: VideoModel, lora: LoraSpec | None) -> Student:
    info = StudentInfo(
        *(teacher.family.name, teacher.fingerprint, (1.0, 0.0), teacher.family.guidance, lora),
        *(teacher.latent_spec, 5, 16, 16),
    )
    return Student.create(teacher, info)


def gaussian_batch(size: int = 6) -> KeyBatch:
    x = torch.randn(2, size, 2, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    return KeyBatch(
        (0.5 + 0.25 * x[:1]), (0.0,), analytic.condition(size), x[1], torch.zeros(size), key="0/0"
    )


def test_distance_against_numpy() -> None:
    a, b = tiny.latents(2, seed=1), tiny.latents(2, seed=2)
    for c in (1e-3, 0.3):
        expected = np.mean(np.sqrt((a.numpy() - b.numpy()) ** 2 + c**2) - c)
        assert distance(a, b, c).item() == pytest.approx(expected, rel=1e-5)
    leaf = a.clone().requires_grad_()
    distance(leaf, b, 1e-3).backward()
    assert leaf.grad is not None and (leaf.grad * (a - b)).min() >= 0


def test_the_term_is_a_teacher_step_and_both_ends_predictions() -> None:
    """One sample at a time, by the analytic velocity of teacher and of a shifted student."""
    teacher = analytic.gaussian_model(dtype=torch.float32)
    student, batch = student_of(teacher, None), gaussian_batch()
    with torch.no_grad():
        student.trainable()["mean"].add_(0.2)
    objective = build_consistency(Setting(RECIPE, teacher, (1.0, 0.0), lambda _count: batch))
    assert objective.grid == time_grid(20, analytic.ANALYTIC.shift)
    start, t, below = objective.draw(batch)
    assert all(objective.grid[i] == pytest.approx(float(x)) for i, x in zip(start, t, strict=True))
    assert [objective.grid[i + 5] for i in start] == pytest.approx(below.tolist())
    (term,) = objective(student, batch, 0)
    total = 0.0
    for i in range(6):
        a, b, cond = float(t[i]), float(below[i]), batch.cond.select(i)
        x = ((1 - a) * batch.latents[0] + a * batch.z)[i : i + 1]
        lower = x + (b - a) * teacher.velocity(x, a, cond)
        made = x - a * student.velocity(x, a, cond)
        target = lower - b * student.velocity(lower, b, cond)
        total += (((made - target) ** 2 + 1e-6).sqrt() - 1e-3).mean().item() / 6
    assert term.loss.item() == pytest.approx(total, rel=1e-4)
    assert not term.trains_heads and term.name == "consistency"


def test_drawn_places_reach_both_ends_of_the_grid() -> None:
    teacher = analytic.gaussian_model(dtype=torch.float32)
    objective = build_consistency(Setting(RECIPE, teacher, (1.0, 0.0), lambda _count: batch))
    batch = replace(gaussian_batch(400), cond=analytic.condition(400))
    start, t, below = objective.draw(batch)
    assert (min(start), max(start)) == (0, 15)
    assert t.max() == 1.0 and below.min() == 0.0


def test_the_target_has_averaged_weights_and_no_gradient() -> None:
    teacher = tiny.video_model()
    student = student_of(teacher, LoraSpec(rank=2))
    recipe = replace(RECIPE, ema=0.9)
    average = Average(Role(student.trainable(), 1e-3, (0.9, 0.999), recipe), 0.9)
    with torch.no_grad():
        for name, p in student.trainable().items():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    batch = KeyBatch(tiny.latents(2, 1)[None], (0.0,), tiny.condition(2), tiny.latents(2, 2),
                     torch.zeros(2), key="3")  # fmt: skip
    real = lambda _count: batch  # noqa: E731
    plain = build_consistency(Setting(recipe, teacher, (1.0, 0.0), real))
    averaged = build_consistency(Setting(recipe, teacher, (1.0, 0.0), real, average=average))
    before = student.state_dict()
    x, t = batch.z, torch.full((2,), 0.4)
    target = averaged.target(student, x, t, batch)
    # The average is still the untrained student, whose adapters give the teacher.
    by_teacher = x - 0.4 * teacher.velocity(x, 0.4, batch.cond)
    torch.testing.assert_close(target, by_teacher, rtol=1e-4, atol=1e-5)
    assert not target.requires_grad
    assert not torch.allclose(plain.target(student, x, t, batch), target, atol=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in student.state_dict().items())
    (term,) = averaged(student, batch, 0)
    term.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.trainable().values())
    assert all(p.grad is None for p in teacher.module.parameters())


def dataset(cfg: Cfg | None, negative: str | None) -> Any:
    prompt = SimpleNamespace(condition=analytic.condition(1, offset=-1.0))
    info = SimpleNamespace(cfg=cfg, negative=negative, cutting=None)
    known = SimpleNamespace(
        info=info, folder=SimpleNamespace(name="clips"), prompt=lambda _: prompt
    )  # noqa: E501
    return SimpleNamespace(dataset=known)


def test_the_teacher_steps_under_the_datasets_guidance_or_the_recipes() -> None:
    """The Gaussian's velocity is affine in its mean, and so is guidance: 3 (v - v_neg) + v_neg."""
    teacher = analytic.gaussian_model(dtype=torch.float32)
    batch = replace(gaussian_batch(), cond=analytic.condition(6, offset=0.0))

    def built(spec: ConsistencySpec, states: Any) -> Consistency:
        recipe = replace(RECIPE, consistency=spec)
        return build_consistency(Setting(recipe, teacher, (1.0, 0.0), lambda _count: batch, states))

    spec = ConsistencySpec(steps=20, skip=5)
    assert isinstance(built(spec, dataset(None, None)).asked, VideoModel)
    own = built(spec, dataset(Cfg(3.0), "none"))
    other = built(replace(spec, cfg=2.0), dataset(Cfg(3.0), "none"))
    assert isinstance(own.asked, Guided) and own.asked.cfg.scale == 3
    assert isinstance(other.asked, Guided) and other.asked.cfg.scale == 2
    start, t, below = own.draw(batch)
    x_t = batch.z
    found = own.step(x_t, start, t, below, batch.cond)
    for i in range(6):
        rows, a, b = slice(i, i + 1), float(t[i]), float(below[i])
        v, v_neg = (teacher.velocity(x_t[rows], a, analytic.condition(1, offset=offset)) for offset in (0.0, -1.0))  # fmt: skip  # noqa: E501
        expected = x_t[rows] + (b - a) * (v_neg + 3 * (v - v_neg))
        torch.testing.assert_close(found[rows], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AccVideoError, match="guidance 2 needs a negative prompt, which dataset"):
        built(replace(spec, cfg=2.0), dataset(None, None))


def test_on_real_videos_the_family_guides_away_from_no_image() -> None:
    plain, batch = analytic.gaussian_model(dtype=torch.float32), gaussian_batch()
    family = replace(plain.family, guides_image=True, cfg=Cfg(3.0, first=1.0))
    prompt = SimpleNamespace(condition=analytic.condition(1))
    videos: Any = SimpleNamespace(
        info=SimpleNamespace(cfg=None, negative=None, cutting="as cut"),
        header=lambda _id: SimpleNamespace(prompt_id="p"),
        prompt=lambda _id: prompt,
    )
    states: Any = SimpleNamespace(dataset=videos, ids=["a"])
    setting = Setting(RECIPE, replace(plain, family=family), (1.0, 0.0), lambda _: batch, states)
    asked = build_consistency(setting).asked
    assert isinstance(asked, Guided) and asked.cfg == Cfg(3.0, first=1.0)
    assert not asked.negative.text.any() and asked.negative.text.shape == (1, 3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip": 2000}, "recipe.consistency.skip is 2000, more than its 1000 steps"),
        ({"skip": 0}, "recipe.consistency.skip is 0; it must be at least 1"),
        ({"cfg": 0.5}, "recipe.consistency.cfg is 0.5; it must be at least 1"),
        ({"huber_c": 0.0}, "recipe.consistency.huber_c is 0.0; it must be positive"),
    ],
)
def test_values_out_of_range_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AccVideoError, match=message):
        ConsistencySpec(**change)

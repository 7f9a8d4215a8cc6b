"""Recipes: validation, presets, JSON."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from accvideo_core.distill.recipes import PRESETS, Recipe, preset
from accvideo_core.distill.specs import SPECS, LaddSpec, SfvSpec
from accvideo_core.distill.student import LoraSpec
from accvideo_core.errors import AccVideoError
from accvideo_core.flow import time_grid


@pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS.keys())
def test_presets_survive_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe
    assert PRESETS[recipe.name] is recipe


def test_everything_survives_json() -> None:
    recipe = Recipe(
        student_steps=2,
        key_times=(1.0, 0.75, 0.0),
        lora=LoraSpec(rank=4, alpha=2.0, targets=("to_q",)),
        feature_blocks=(1, 3),
        ema=0.9,
        clean_time_shift=12.0,
    )
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


def test_the_papers_numbers() -> None:
    paper = preset("paper")
    published = (paper.lr, paper.head_lr or paper.lr, paper.batch_size, paper.train_steps)
    assert published == (5e-6, 5e-6, 32, 1200)
    assert (paper.student_steps, paper.adv_weight, paper.adversarial) == (5, 0.1, True)
    times = paper.times(time_grid(50, shift=7.0))
    assert [round(t, 6) for t in times] == [1.0, 0.965517, 0.913043, 0.823529, 0.636364, 0.0]


def test_chosen_key_times_win_over_the_grid() -> None:
    recipe = Recipe(student_steps=1, key_times=(0.9, 0.1))
    assert recipe.times(time_grid(50)) == (0.9, 0.1)
    with pytest.raises(AccVideoError, match="3 student steps do not divide the 50"):
        Recipe(student_steps=3).times(time_grid(50))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_steps": 0}, "recipe.student_steps is 0; it must be at least 1"),
        ({"train_steps": 0}, "recipe.train_steps is 0"),
        ({"lr": 0.0}, "recipe.lr is 0.0; it must be positive"),
        ({"lr": float("nan")}, "recipe.lr is nan"),
        ({"head_lr": -1.0}, "recipe.head_lr is -1.0"),
        ({"clip": 0.0}, "recipe.clip is 0.0"),
        ({"ema": 1.0}, "recipe.ema is 1.0; it must be at least 0 and below 1"),
        ({"adv_weight": -0.1}, "recipe.adv_weight is -0.1"),
        ({"weight_decay": float("nan")}, "recipe.weight_decay is nan"),
        ({"betas": (0.9, 1.0)}, r"recipe.betas is \(0.9, 1.0\)"),
        ({"gan_loss": "wasserstein"}, "'wasserstein'; choose one of logistic, hinge"),
        ({"schedule": "step"}, "'step'; choose one of constant, cosine, linear"),
        ({"batch_size": 6, "accumulate": 4}, "does not divide recipe.batch_size 6"),
        ({"key_times": (1.0, 0.0)}, "holds 2 times; 5 student steps need 6"),
        ({"key_times": (0.0, 1.0), "student_steps": 1}, "must fall strictly"),
        ({"keep_checkpoints": 0}, "recipe.keep_checkpoints is 0"),
        ({"clean_time_shift": 0.0}, "recipe.clean_time_shift is 0.0"),
        ({"feature_blocks": ()}, "recipe.feature_blocks is empty"),
        ({"feature_blocks": (3, -1)}, r"feature_blocks is \(3, -1\); name every block once"),
        ({"feature_blocks": (3, 3)}, r"feature_blocks is \(3, 3\); name every block once"),
        ({"head_updates": 0}, "recipe.head_updates is 0; it must be at least 1"),
        ({"betas": (0.9,)}, r"recipe.betas is \(0.9,\); it holds two numbers"),
        ({"lr": float("inf")}, "recipe.lr is inf; it must be finite"),
        ({"rollout": "lazy"}, "'lazy'; choose one of direct, queued"),
        ({"best_by": "beauty", "validate_every": 5}, "'beauty'; choose one of latent_mse, motion"),
        ({"swap_blocks": 4, "lora": None}, "weights that are trained cannot wait in main memory"),
        ({"swap_blocks": 4}, "needs gradient_checkpointing"),
        ({"best_by": "motion"}, "but nothing is looked at; set validate_every"),
        ({"patience": 2, "validate_every": 5}, "without a figure to go by; set best_by"),
    ],
)
def test_values_out_of_range_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AccVideoError, match=message):
        replace(Recipe(), **change)


RANGED = [
    f.name
    for f in fields(Recipe)
    if f.name not in ("name", "lora", "seed", *SPECS) and not isinstance(f.default, bool)
]


@pytest.mark.parametrize("name", RANGED)
def test_every_field_with_a_range_is_checked(name: str) -> None:
    value = getattr(Recipe(), name)
    wrong: dict[str, Any] = {
        "key_times": (1.0, 2.0),
        "feature_blocks": (-1,),
        "betas": (1.0, 0.5),
        "head_betas": (-0.1, 0.5),
    }
    bad = wrong.get(name, "nonsense" if isinstance(value, str) or name == "best_by" else -1)
    with pytest.raises(AccVideoError, match=f"recipe.{name} |times") as caught:
        replace(Recipe(student_steps=1), **{name: bad})
    assert str(caught.value).count(". ") == 0  # one sentence


def test_a_recipe_has_one_method_and_old_ones_accvideos() -> None:
    old = {"lr": 1e-4, "adversarial": True, "lora": {"rank": 8}}
    recipe = Recipe.from_dict(old)
    assert (recipe.method, recipe.spec, recipe.has_heads) == ("accvideo", None, True)
    assert {name: preset(name).method for name in ("sf-v", "ladd", "ufogen", "consistency")} == {
        "sf-v": "sf_v",
        "ladd": "ladd",
        "ufogen": "ufogen",
        "consistency": "consistency",
    }
    assert preset("sf-v").has_heads and not preset("consistency").has_heads
    with pytest.raises(AccVideoError, match="recipe.sf_v and recipe.ladd are two methods"):
        replace(preset("sf-v"), ladd=LaddSpec())
    with pytest.raises(AccVideoError, match="adversarial is a term of AccVideo's method, but"):
        replace(preset("sf-v"), adversarial=True)
    with pytest.raises(AccVideoError, match="recipe.sf_v has no field 'mean'; its fields are lev"):
        Recipe.from_dict({"sf_v": {"mean": 1}})
    with pytest.raises(AccVideoError, match="recipe.sf_v.p_mean is 'low'; it must be a number"):
        Recipe.from_dict({"sf_v": {"p_mean": "low"}})


def test_sf_vs_numbers() -> None:
    sf_v = preset("sf-v")
    assert (sf_v.lr, sf_v.head_lr, sf_v.ema, sf_v.student_steps) == (1e-5, 1e-4, 0.95, 1)
    assert (sf_v.batch_size, sf_v.accumulate, sf_v.train_steps) == (32, 4, 50_000)
    assert (sf_v.betas, sf_v.gan_loss, sf_v.adv_weight) == ((0.5, 0.999), "hinge", 1.0)
    assert (sf_v.head_kind, sf_v.head_conditioning) == ("spatial_temporal", True)
    spec = sf_v.spec
    assert isinstance(spec, SfvSpec)
    assert (spec.levels, spec.judged_levels, spec.p_mean, spec.p_std) == (4, 1000, -1.0, -1.0)
    assert (spec.recon_weight, spec.recon_norm) == (0.1, "mean")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AccVideoError, match="no field 'learning_rate'; its fields are name,"):
        Recipe.from_dict({"learning_rate": 1.0})
    with pytest.raises(AccVideoError, match="no recipe 'fast'; choose one of paper,"):
        preset("fast")

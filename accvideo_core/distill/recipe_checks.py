"""What a recipe may hold: names to choose from, ranges, and fields that need one another."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING

from ..errors import AccVideoError
from ..flow import validate_times
from .specs import SPECS

if TYPE_CHECKING:
    from .recipes import Recipe

SCHEDULES = ("constant", "cosine", "linear")
GAN_NAMES = ("logistic", "hinge")
CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": SCHEDULES,
    "gan_loss": GAN_NAMES,
    "iteration": ("interval", "sweep"),
    "updates": ("summed", "separate"),
    "rollout": ("direct", "queued"),
    "heads": ("timestep", "shared"),
    "head_kind": ("spatial", "spatial_temporal", "temporal"),
    "r1": ("approximate", "features"),
    "optimizer": ("adamw", "adamw_8bit", "adafactor"),
    "best_by": ("latent_mse", "motion", "saturation", "diversity"),
}
"""What the fields that hold a name may be."""


def check_recipe(recipe: Recipe) -> None:
    """
    Raises:
        AccVideoError: names the first field that does not fit, and what would.
    """
    for check in (_check_numbers, _check_names, _check_shapes, _check_together, _check_method):
        check(recipe)


def _check_numbers(recipe: Recipe) -> None:
    rules = [
        (1, None, ("student_steps", "train_steps", "batch_size", "accumulate", "head_width")),
        (1, None, ("checkpoint_every", "keep_checkpoints", "trajectories", "head_updates")),
        (1, None, ("validation_clips", "patience")),
        (0, None, ("warmup", "weight_decay", "trajectory_weight", "adv_weight", "r1_weight")),
        (0, None, ("swap_blocks", "validate_every")),
        (0, 1, ("ema",)),
    ]
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, float) and math.isinf(value):
            raise AccVideoError(f"recipe.{field.name} is {value}; it must be finite")
    for low, high, names in rules:
        for name in names:
            value = getattr(recipe, name)
            if value is not None and not (value >= low and (high is None or value < high)):
                bound = f"at least {low}" + ("" if high is None else f" and below {high}")
                raise AccVideoError(f"recipe.{name} is {value}; it must be {bound}")
    for name in ("lr", "head_lr", "clip", "clean_time_shift", "r1_sigma"):
        value = getattr(recipe, name)
        if value is not None and not value > 0:
            raise AccVideoError(f"recipe.{name} is {value}; it must be positive")
    for name in ("betas", "head_betas"):
        betas = getattr(recipe, name)
        if len(betas) != 2 or any(not 0 <= beta < 1 for beta in betas):
            raise AccVideoError(
                f"recipe.{name} is {betas}; it holds two numbers of at least 0 and below 1"
            )


def _check_names(recipe: Recipe) -> None:
    for name, choices in CHOICES.items():
        value = getattr(recipe, name)
        if value not in choices and not (value is None and name == "best_by"):
            raise AccVideoError(f"recipe.{name} is {value!r}; choose one of {', '.join(choices)}")


def _check_shapes(recipe: Recipe) -> None:
    if recipe.feature_blocks == ():
        raise AccVideoError("recipe.feature_blocks is empty; name a block, or use None")
    blocks = recipe.feature_blocks or ()
    if any(block < 0 for block in blocks) or len(set(blocks)) < len(blocks):
        raise AccVideoError(
            f"recipe.feature_blocks is {blocks}; name every block once, counted from 0"
        )
    if recipe.batch_size % recipe.accumulate:
        raise AccVideoError(
            f"recipe.accumulate is {recipe.accumulate}, which does not divide "
            f"recipe.batch_size {recipe.batch_size}; choose a divisor"
        )
    if recipe.key_times is None:
        return
    if len(validate_times(recipe.key_times)) != recipe.student_steps + 1:
        raise AccVideoError(
            f"recipe.key_times holds {len(recipe.key_times)} times; {recipe.student_steps} "
            f"student steps need {recipe.student_steps + 1}"
        )


def _check_together(recipe: Recipe) -> None:
    """Fields that need one another."""
    if recipe.swap_blocks and recipe.lora is None:
        raise AccVideoError(
            f"recipe.swap_blocks is {recipe.swap_blocks}, but weights that are trained cannot wait "
            "in main memory; train a LoRA, or set it to 0"
        )
    if recipe.swap_blocks and not recipe.gradient_checkpointing:
        raise AccVideoError(
            f"recipe.swap_blocks is {recipe.swap_blocks}, which needs gradient_checkpointing; "
            "switch that on, or set swap_blocks to 0"
        )
    for name in ("best_by", "patience"):
        if getattr(recipe, name) is not None and not recipe.validate_every:
            raise AccVideoError(
                f"recipe.{name} is {getattr(recipe, name)}, but nothing is looked at; "
                "set validate_every, such as 100"
            )
    if recipe.patience is not None and recipe.best_by is None:
        raise AccVideoError(
            f"recipe.patience is {recipe.patience} without a figure to go by; "
            f"set best_by to one of {', '.join(CHOICES['best_by'])}"
        )


def _check_method(recipe: Recipe) -> None:
    """One method at most."""
    chosen = [name for name in SPECS if getattr(recipe, name) is not None]
    if len(chosen) > 1:
        raise AccVideoError(
            f"recipe.{chosen[0]} and recipe.{chosen[1]} are two methods; set one of them to null"
        )
    if chosen and recipe.adversarial:
        raise AccVideoError(
            f"recipe.adversarial is a term of AccVideo's method, but recipe.{chosen[0]} names "
            "another; set one of them to null or false"
        )

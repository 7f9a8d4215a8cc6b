"""Widgets of the training nodes, and the recipe that they make with a preset."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from comfy_api.latest import io

from ..accvideo_core.distill.recipes import CHOICES, PRESETS, Recipe
from ..accvideo_core.distill.recipes import preset as preset_recipe
from ..accvideo_core.errors import AccVideoError
from ..accvideo_core.fields import check_fields

PRESET = "preset"
"""Choice that leaves a field to the preset; so do 0 and a switch that is off."""

NEVER = -1
"""Validate never, where 0 is the preset's."""


def recipe_of(preset: str, own: Mapping[str, Any], **widgets: Any) -> Recipe:
    """The preset, with every widget over it that says something, and `own` fields over these.

    Raises:
        AccVideoError: a value is out of range, or does not go with another.
    """
    base = preset_recipe(preset).as_dict()
    said = {name: value for name, value in widgets.items() if value and value != PRESET}
    if said.get("validate_every") == NEVER:
        said["validate_every"] = 0
    return Recipe.from_dict({**base, **said, **own})


def parsed(settings: str, taken: Collection[str] = ()) -> dict[str, Any]:
    """Fields of a recipe from the JSON in a node's `settings`.

    Raises:
        AccVideoError: it is no JSON object, or a field is unknown, `taken` or of another type.
    """
    try:
        values = json.loads(settings) if settings.strip() else {}
    except ValueError as error:
        raise AccVideoError(f"settings are not JSON ({error}); {_EXAMPLE}") from error
    if not isinstance(values, dict):
        raise AccVideoError(f"settings are not a JSON object; {_EXAMPLE}")
    check_fields(Recipe, values, "settings")
    for name in taken:
        if name in values:
            raise AccVideoError(
                f"settings name {name}, which the student to start from decides; leave it out"
            )
    return values


_EXAMPLE = 'write recipe fields such as {"clip": 0.5, "updates": "separate"}, or nothing'


def run_name(default: str) -> io.Input:
    return io.String.Input(
        "run",
        default=default,
        tooltip="Name of the run, a folder in output/accvideo/runs that holds its checkpoints and "
        "metrics. The same name goes on with the same run.",
    )


def preset_choice(default: str) -> io.Input:
    return io.Combo.Input(
        "preset",
        options=list(PRESETS),
        default=default,
        tooltip="Where every setting comes from that is left at 0. tiny ones are for the embedded "
        "teacher, paper is what AccVideo published; sf-v, ladd, ufogen and consistency are other "
        "methods, which learn from clean latents alone.",
    )


def length_widgets() -> list[io.Input]:
    return [
        io.Int.Input(
            "train_steps",
            default=0,
            min=0,
            max=1_000_000,
            tooltip="Optimiser updates. 0 is the preset's number. A larger number goes on with a "
            "finished run, where the learning rate does not depend on it (constant schedule).",
        ),
        io.Int.Input(
            "batch_size",
            default=0,
            min=0,
            max=4096,
            tooltip="Trajectories per update. 0 is the preset's number.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-6,
            tooltip="Learning rate of the student. 0 is the preset's.",
        ),
    ]


def seed_widget() -> io.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**63 - 1,
        control_after_generate=False,
        tooltip="Seed of everything random in the run.",
    )


def memory_widgets() -> list[io.Input]:
    return [
        _count(
            "accumulate",
            "Parts that a batch is computed in: more parts need less memory and more time.",
            default=1,
            top=4096,
        ),
        _switch(
            "gradient_checkpointing",
            "Recompute activations in the backward pass: less memory, a third more time.",
        ),
        _count(
            "checkpoint_every",
            "Updates between checkpoints. Cancelling writes one at once.",
            default=100,
            top=1_000_000,
        ),
    ]


def more_widgets(*between: io.Input) -> list[io.Input]:
    """What came after the first release: memory, looks at the student, and all the rest."""
    return [
        recipe_choice("optimizer", "adamw_8bit and adafactor need less memory than adamw."),
        _count(
            "swap_blocks",
            "Blocks of the network whose weights wait in main memory until they are needed: a lora "
            "student on a small card. Needs gradient_checkpointing.",
        ),
        _switch(
            "offload_activations",
            "Keep what the backward pass needs in main memory meanwhile: less memory on the card, "
            "more time.",
        ),
        _switch("compile", "Compile the network's blocks: minutes at the start, then faster."),
        _count(
            "validate_every",
            "Updates between looks at fixed clips, student beside teacher, with warnings in words. "
            f"0 is the preset's number, {NEVER} never looks.",
            low=NEVER,
            top=1_000_000,
        ),
        recipe_choice(
            "best_by", "Figure of those looks by which the best student is kept and handed out."
        ),
        *between,
        io.String.Input(
            "settings",
            default="",
            optional=True,
            advanced=True,
            tooltip="More fields of the recipe as JSON, over the preset and the widgets, such as "
            '{"clip": 0.5, "updates": "separate"}.',
        ),
    ]


def recipe_choice(name: str, tooltip: str) -> io.Input:
    """One of a recipe field's names, or the preset's."""
    return io.Combo.Input(
        name,
        options=[PRESET, *CHOICES[name]],
        default=PRESET,
        optional=True,
        advanced=True,
        tooltip=tooltip,
    )


def _count(
    name: str, tooltip: str, default: int = 0, low: int | None = None, top: int = 1000
) -> io.Input:
    return io.Int.Input(
        name,
        default=default,
        min=min(default, 1) if low is None else low,
        max=top,
        optional=True,
        advanced=True,
        tooltip=tooltip,
    )


def _switch(name: str, tooltip: str) -> io.Input:
    return io.Boolean.Input(
        name, default=False, optional=True, advanced=True, tooltip=tooltip
    )

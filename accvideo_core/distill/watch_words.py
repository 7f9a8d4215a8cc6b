"""What is wrong with a run, in words: what it means for the videos, and what helps.

A warning is said once, when it begins, and again when it is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .recipes import Recipe
from .watch_window import accuracies, window

Row = Mapping[str, float]
"""Figures of one look; see `watch.py`."""

MOTION_KEPT = 0.9
"""Motion below this share of the teacher's is seen: slow motion is what users of few-step students
complain about most."""

SATURATION_DRIFT = 0.05
"""Saturation further than this from the teacher's shows beside it: burnt or washed-out colours."""

WINS = 0.95
"""Accuracy on recorded and on generated latents above which the heads have won: a discriminator
that sure pushes the student anywhere but towards the teacher (docs/quality.md)."""

LOSES = 0.52
"""Mean accuracy below which the heads have lost: guessing gives 0.5, and the rest is noise."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """One thing that can be wrong."""

    kind: str
    wrong: Callable[[Row, Recipe], bool | None]
    """None where this look cannot tell."""
    warning: Callable[[Row, Row, Recipe], str]
    """(this look, the one before training, recipe) -> sentence."""
    over: Callable[[Row], str]


def told(
    row: Row, first: Row, standing: Iterable[str], recipe: Recipe
) -> tuple[list[str], list[str]]:
    """(sentences worth saying at this look, kinds of the warnings that stand after it).

    Args:
        first: the look before training.
        standing: kinds that stood after the last look.
    """
    before, now, notes = set(standing), [], []
    for rule in _RULES:
        wrong = rule.wrong(row, recipe)
        if wrong is None:
            wrong = rule.kind in before
        elif wrong and rule.kind not in before:
            notes.append(rule.warning(row, first, recipe))
        elif not wrong and rule.kind in before:
            notes.append(rule.over(row))
        if wrong:
            now.append(rule.kind)
    return notes, now


def broken(names: Sequence[str], recipe: Recipe) -> tuple[str, str]:
    """(the one to blame, what helps), of an update's figures that are not finite.

    The sum "loss" breaks with any of its terms, and a gradient with its loss.
    """
    causes = ("trajectory", "discriminator", "generator", "student_grad_norm", "heads_grad_norm")
    name = next((cause for cause in causes if cause in names), names[0])
    if name in ("discriminator", "heads_grad_norm"):
        lr = recipe.head_lr or recipe.lr
        return name, f"start a new run with head_lr below {lr:g} or a larger r1_weight"
    lower = "start a new run with a learning rate below"
    if name == "generator":
        return name, f"{lower} {recipe.lr:g} or an adv_weight below {recipe.adv_weight:g}"
    return name, f"{lower} {recipe.lr:g} or a float32 teacher"


def _percent(value: float) -> str:
    return f"{round(100 * value, 1):g} %"


def _untrained(first: Row, name: str) -> str:
    return f" ({_percent(first[name])} before training)" if name in first else ""


def _motion_wrong(row: Row, recipe: Recipe) -> bool | None:
    return row["motion"] < MOTION_KEPT if "motion" in row else None


def _motion_warning(row: Row, first: Row, recipe: Recipe) -> str:
    if recipe.has_heads:
        remedy = "lower adv_weight or lr, or set head_kind to spatial_temporal"
    else:
        remedy = "take more student_steps, or tune adversarially with head_kind spatial_temporal"
    return (
        f"motion is {_percent(row['motion'])} of the teacher's{_untrained(first, 'motion')}: clips "
        f"look like slow motion or stills; train on while it rises, else {remedy}"
    )


def _saturation_wrong(row: Row, recipe: Recipe) -> bool | None:
    return abs(row["saturation"] - 1) > SATURATION_DRIFT if "saturation" in row else None


def _saturation_warning(row: Row, first: Row, recipe: Recipe) -> str:
    look = "burnt" if row["saturation"] > 1 else "washed out"
    remedy = "lower adv_weight or lr" if recipe.has_heads else "lower lr or average with ema"
    return (
        f"saturation is {_percent(row['saturation'])} of the teacher's"
        f"{_untrained(first, 'saturation')}: colours look {look}; train on while it comes closer, "
        f"else {remedy}"
    )


def _won(row: Row) -> list[int]:
    return [k for k, both in accuracies(row).items() if min(both) > WINS]


def _lost(row: Row) -> list[int]:
    return [k for k, both in accuracies(row).items() if sum(both) / 2 < LOSES]


def _heads_won(row: Row, recipe: Recipe) -> bool | None:
    return bool(_won(row)) if accuracies(row) and row["step"] >= window(recipe) else None


def _heads_lost(row: Row, recipe: Recipe) -> bool | None:
    # Fresh heads guess, so their first window says nothing; no more do those that hardly learn yet.
    settled = row["step"] - window(recipe) >= max(window(recipe), recipe.warmup)
    return bool(_lost(row)) if accuracies(row) and settled else None


def _at(places: list[int]) -> str:
    return f"at k = {', '.join(map(str, places))}"


def _won_warning(row: Row, first: Row, recipe: Recipe) -> str:
    weight = recipe.r1_weight
    smoother = f"raise r1_weight above {weight:g}" if weight else "set r1_weight to 10"
    return (
        f"the discriminator is right in over {_percent(WINS)} of recorded and of generated latents "
        f"{_at(_won(row))}: one so sure costs the student detail and diversity; {smoother}, or "
        "lower head_lr or adv_weight"
    )


def _lost_warning(row: Row, first: Row, recipe: Recipe) -> str:
    places = _lost(row)
    worst = min(sum(accuracies(row)[k]) / 2 for k in places)
    remedy = "raise head_lr or head_updates" + (", or lower r1_weight" if recipe.r1_weight else "")
    return (
        f"the discriminator is right in {_percent(worst)} of latents {_at(places)}, which is "
        f"guessing: the adversarial term teaches the student nothing; {remedy}"
    )


_RULES = (
    _Rule(
        "motion",
        _motion_wrong,
        _motion_warning,
        lambda row: f"motion is back at {_percent(row['motion'])} of the teacher's",
    ),
    _Rule(
        "saturation",
        _saturation_wrong,
        _saturation_warning,
        lambda row: f"saturation is back at {_percent(row['saturation'])} of the teacher's",
    ),
    _Rule(
        "heads_win",
        _heads_won,
        _won_warning,
        lambda row: "the discriminator no longer wins at any key time",
    ),
    _Rule(
        "heads_lose",
        _heads_lost,
        _lost_warning,
        lambda row: "the discriminator no longer guesses at any key time",
    ),
)

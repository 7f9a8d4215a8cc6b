"""What the updates before a look tell: the discriminator's accuracy at every key time, and the
gradients' norms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .recipes import Recipe

SWEEPS = 10
"""Updates of every key time, at least, over which their figures are taken."""

_ACCURACIES = ("real_accuracy", "fake_accuracy")
_KEPT = re.compile(r"(real|fake)_accuracy_k\d+|\w+_grad_norm")


def window(recipe: Recipe) -> int:
    """Updates before a look that it takes accuracies and gradient norms of."""
    return max(recipe.validate_every, SWEEPS * recipe.student_steps)


def window_figures(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Means over rows of `metrics.jsonl`: "real_accuracy_k0" and so on, and all gradient norms.

    An update of one key interval says which, one of all of them has a figure for each.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name in _ACCURACIES and "k" in row:
                name = f"{name}_k{row['k']:.0f}"
            if _KEPT.fullmatch(name):
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def accuracies(row: Mapping[str, float]) -> dict[int, tuple[float, float]]:
    """Key time k -> accuracy on (recorded, generated) latents, of the figures of a look."""
    real, fake = _ACCURACIES
    places = [name.rpartition("_k")[2] for name in row if name.startswith(f"{real}_k")]
    return {int(k): (row[f"{real}_k{k}"], row[f"{fake}_k{k}"]) for k in places}

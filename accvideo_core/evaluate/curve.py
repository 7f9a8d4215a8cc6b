"""LossCurve: the losses of a run so far, thinned to what a picture can show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from ..distill.metrics import METRICS_FILE, read_metrics
from .pictures import TERMS, Line

TOTAL = "loss"


class LossCurve:
    """Losses by update: each term of the objective, or the total of an objective without terms."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, dict[str, float]]] = []

    @classmethod
    def of_run(cls, folder: Path) -> LossCurve:
        """What the run in `folder` has written down; empty where there is no run."""
        curve = cls()
        for row in read_metrics(folder / METRICS_FILE):
            curve.add(int(row["step"]), row)
        return curve

    @property
    def step(self) -> int:
        """Updates done; 0 before the first."""
        return self._rows[-1][0] if self._rows else 0

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Book an update. One that is done again, and all after it, make room."""
        losses = {name: figures[name] for name in TERMS if name in figures}
        if not losses and TOTAL in figures:
            losses = {TOTAL: figures[TOTAL]}
        finite = {name: float(x) for name, x in losses.items() if math.isfinite(x)}
        if not finite:
            return
        while self._rows and self._rows[-1][0] >= step:
            self._rows.pop()
        self._rows.append((step, finite))

    def lines(self, points: int) -> dict[str, Line]:
        """Term -> (step, loss) from the first update to the last, at most `points` of them.

        A point of a longer run is the mean of equally many updates, at the last of these.
        """
        size = max(1, math.ceil(len(self._rows) / points))
        lines: dict[str, Line] = {}
        for start in range(0, len(self._rows), size):
            group = self._rows[start : start + size]
            for name in dict.fromkeys(name for _, losses in group for name in losses):
                values = [losses[name] for _, losses in group if name in losses]
                lines.setdefault(name, []).append((group[-1][0], sum(values) / len(values)))
        return lines

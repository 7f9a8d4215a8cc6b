"""The figures of an update, and metrics.jsonl: a line of them each, only ever appended to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..files import append_lines

METRICS_FILE = "metrics.jsonl"


class Means:
    """Means of figures over the parts of a batch and the key intervals of an update.

    Where there are several intervals, each one's figures are kept as well: "generator_k3" and so
    on. Numbers stay on the device until they are read.
    """

    def __init__(self, ks: Sequence[int], parts: int) -> None:
        self.ks, self.parts = ks, parts
        self.sums: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, Tensor], k: int) -> None:
        """Take in the figures of one part at key interval k."""
        for name, value in figures.items():
            self._add(name, value / (self.parts * len(self.ks)))
            if len(self.ks) > 1 and name != "loss":
                self._add(f"{name}_k{k}", value / self.parts)

    def as_dict(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.sums.items()}

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def append_metrics(path: Path, row: Mapping[str, float]) -> None:
    """Append one line; it is on the disk when this returns."""
    append_lines(path, json.dumps(dict(row)) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """One row per update, in order.

    A run that was killed and resumed has done some updates twice; the last time counts. Lines that
    a kill cut short are left out.
    """
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            continue
    return [rows[step] for step in sorted(rows)]

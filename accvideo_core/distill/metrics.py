"""metrics.jsonl: one line of figures per update, only ever appended to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..files import append_lines

METRICS_FILE = "metrics.jsonl"


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

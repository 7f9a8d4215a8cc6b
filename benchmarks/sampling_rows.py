"""Rows of the benchmarks of sampling: two sides in turn, their results compared, and an aim."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.bench import Seconds, compare, timed

NO_AIM = math.inf
SAME = 1e-3
"""Largest difference, as a part of the largest value, of results that are called equal."""


@dataclass(frozen=True)
class Result:
    """A line of the table. `figure` is ours / theirs where there are two sides."""

    name: str
    figure: float
    aim: float = NO_AIM
    ours: float | None = None
    theirs: float | None = None
    unit: str = "s"
    cpu_figure: float | None = None
    difference: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        same = self.difference is None or self.difference <= SAME
        return same and self.figure <= self.aim


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    quick: bool
    repeats: int
    official: Path | None = None


def against(
    name: str,
    aim: float,
    repeats: int,
    ours: Callable[[], Tensor | None],
    theirs: Callable[[], Tensor | None],
    **facts: Any,
) -> Result:
    """Both sides in turn; their last results are compared."""
    found: dict[str, Tensor | None] = {}

    def side(name: str, work: Callable[[], Tensor | None]) -> Seconds:
        return timed(lambda: found.update({name: work()}))

    row = compare(name, aim, repeats, partial(side, "ours", ours), partial(side, "theirs", theirs))
    apart = difference(found["ours"], found["theirs"])
    sides = {"ours": row.ours, "theirs": row.plain, "cpu_figure": row.cpu_figure}
    return Result(name, row.figure, aim, **sides, difference=apart, facts=facts)


def difference(a: Tensor | None, b: Tensor | None) -> float | None:
    """The largest, as a part of the largest value; infinite for results of different shapes."""
    if a is None or b is None:
        return None
    if a.shape != b.shape:
        return math.inf
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


HEADER = f"{'':52}{'ours':>10}{'theirs':>10}{'ratio':>8}{'(CPU)':>8}{'aim':>7}{'apart':>9}"


def line(row: Result) -> str:
    """A row of the printed table."""
    sides = "".join(f"{'' if x is None else f'{x:.4g}':>10}" for x in (row.ours, row.theirs))
    cpu = "" if row.cpu_figure is None else f"{row.cpu_figure:.3f}"
    aim = "" if row.aim == NO_AIM else f"{row.aim:.3f}"
    told = row.difference if row.difference is not None else row.facts.get("error")
    apart = "" if told is None else f"{told:.1e}"
    stated = row.aim != NO_AIM or not row.passed
    verdict = ("PASS" if row.passed else "FAIL") if stated else ""
    name = row.name if row.unit == "s" else f"{row.name} ({row.unit})"
    return f"{name:52}{sides}{row.figure:8.3f}{cpu:>8}{aim:>7}{apart:>9}  {verdict}".rstrip()


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def write(path: Path, rows: list[Result]) -> None:
    """All rows so far, as JSON without infinities."""
    told = []
    for row in rows:
        known = {**asdict(row), "passed": row.passed}
        told.append({k: None if v in (math.inf, -math.inf) else v for k, v in known.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "rows": told}
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")

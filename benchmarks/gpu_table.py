"""The table of the benchmark for a GPU: its lines, its file, and what is aimed at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
Table = dict[str, dict[str, Figures]]
"""Model -> row -> figures."""
Target = tuple[str, float | None, bool | None]
"""(what is aimed at, what was measured, whether it is met), None where it is not known."""

HEADER = (
    f"{'':42}{'text s':>8}{'step s':>9}{'denoise s':>11}{'VAE s':>8}{'total s':>9}{'GB':>7}"
    f"{'share':>8}{'speed-up':>10}  "
)


def line(name: str, row: Figures, teacher: Figures | None) -> str:
    """A row of the printed table."""
    if "failed" in row:
        return f"{name:42}  {row['failed']}"
    memory = "" if row["memory"] is None else f"{row['memory'] / 1e9:.1f}"
    gain = "" if teacher is None else f"{teacher['total_s'] / row['total_s']:.1f} x"
    notes = [row.get("note") or ""]
    title = f"{name}, {row['steps']} steps"
    if "error" in row:
        notes.append(f"error {row['error']:.1e}")
    if "cfg_step_s" in row:
        notes.append(f"cfg step {row['cfg_step_s']:.3g} s")
    return (
        f"{title:42}{row['text_s']:8.2f}{row['step_s']:9.3f}{row['denoise_s']:11.2f}"
        f"{row['vae_s']:8.2f}{row['total_s']:9.2f}{memory:>7}{row['share']:8.1%}{gain:>10}  "
        f"{', '.join(note for note in notes if note)}"
    ).rstrip()


def figure(table: Table, model: str, row: str, name: str) -> float | None:
    """None where it was not measured."""
    found = [rows.get(row, {}) for label, rows in table.items() if label.startswith(model)]
    return next((x[name] for x in found if x.get(name) is not None), None)


def best_total(table: Table, model: str) -> float | None:
    """Seconds of a whole clip by the fastest exact row of ours."""
    exact = ("ours", "ours + compile")
    totals = [figure(table, model, row, "total_s") for row in exact]
    return min((x for x in totals if x is not None), default=None)


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def targets(table: Table) -> list[Target]:
    """All of them, the large model's first."""
    large = "HunyuanVideo 13B 720"
    teacher, student = (
        ratio(figure(table, large, f"diffusers, {row}", "total_s"), best_total(table, large))
        for row in ("teacher", "student")
    )
    steps = [figure(table, "Wan I2V 14B", row, "cfg_step_s") for row in ("ours", "ours + compile")]
    step = min((x for x in steps if x is not None), default=None)
    found: list[tuple[str, float | None, Callable[[float], bool]]] = [
        (f"{large}: 20 x diffusers' 50 steps", teacher, lambda x: x >= 20),
        (f"{large}: 2 x diffusers' 5 steps", student, lambda x: x >= 2),
        ("Wan I2V 14B: at most 5.2 s for a step with guidance", step, lambda x: x <= 5.2),
    ]
    for label in table:
        share = figure(table, label, "ours", "share")
        found.append((f"{label}: 60 % of the card's rate, dense", share, lambda x: x >= 0.6))
    return [(text, x, None if x is None else met(x)) for text, x, met in found]


def told(target: Target) -> str:
    text, value, met = target
    if met is None:
        return f"  ----  {text}: not measured"
    return f"  {'PASS' if met else 'FAIL'}  {text}: {value:.3g}"


def read(path: Path) -> Figures:
    """What earlier calls measured."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"models": {}}


def write(path: Path, report: Figures) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)

"""RunRecord: what training runs have left in their folders, finished or not, side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distill.metrics import METRICS_FILE, read_metrics
from ..distill.run import CONFIG_FILE, flat_settings
from ..distill.watch import LOOKS_FILE, SAMPLES
from ..errors import AccVideoError
from ..files import read_json
from .pictures import TERMS, Line

Panels = dict[str, dict[str, Line]]
"""Heading -> label of a run -> its line."""

_PLACE = ("step", "k", "t")
"""Where a row of figures belongs; no figures themselves."""
_AT_KEY_TIME = re.compile(r"_k(\d+)$")
"""End of a figure's name that tells the key time, where an update trains several of them."""
_OF_TEACHER = ("motion", "saturation", "contrast", "diversity")
"""Figures of a look at fixed clips that are shares of the teacher's."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run's settings and figures as they lie on the disk."""

    label: str
    folder: Path
    settings: Mapping[str, Any]
    """Flat, such as "recipe.lr"."""
    rows: Sequence[Mapping[str, float]]
    """Figures of every update."""
    looks: Sequence[Mapping[str, Any]]
    """Figures of every look at the same fixed clips, with "notes" in words."""
    sheet: Path | None
    """The last contact sheet."""

    def facts(self) -> dict[str, str]:
        """How far the run is, in words."""
        total = self.settings.get("recipe.train_steps", "?")
        if not self.rows:
            return {"updates": f"none yet of {total}"}
        seconds = sorted(row["seconds"] for row in self.rows if "seconds" in row)
        losses = [row["loss"] for row in self.rows[-50:] if "loss" in row]
        facts = {"updates": f"{int(self.rows[-1]['step'])} of {total}"}
        if losses:
            facts["loss"] = f"{sum(losses) / len(losses):.4g} (mean of the last {len(losses)})"
        if seconds:
            facts["seconds an update"] = f"{seconds[len(seconds) // 2]:.3g} (median)"
        best = self.looks[-1].get("best_step") if self.looks else None
        if best is not None:
            facts["best student"] = f"of update {best}, by {self.settings.get('recipe.best_by')}"
        return facts

    def notes(self) -> list[tuple[int, str]]:
        """(update, sentence) of everything that was said at looks: warnings, and their end."""
        return [(int(x["step"]), str(text)) for x in self.looks for text in x.get("notes", ())]


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in `folders`, called by their folder's name, or by their path where names clash.

    Raises:
        AccVideoError: a folder holds no run.
    """
    names = [folder.resolve().name for folder in folders]
    return [
        _read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def _read_run(folder: Path, label: str) -> RunRecord:
    if not (folder / CONFIG_FILE).is_file():
        raise AccVideoError(f"{folder} is no training run (no {CONFIG_FILE}); choose its folder")
    looks = read_metrics(folder / LOOKS_FILE)
    sheets = [path for path in (folder / SAMPLES).glob("*.png") if path.stem.isdecimal()]
    return RunRecord(
        label,
        folder,
        flat_settings(read_json(folder / CONFIG_FILE)),
        read_metrics(folder / METRICS_FILE),
        [look for look in looks if look.get("clips") == looks[-1].get("clips")],
        max(sheets, key=lambda path: int(path.stem), default=None),
    )


def compared_settings(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Setting -> its value in each run, None where a run has it not.

    What a student took over unchanged from its recipe is listed once.
    """
    names = sorted({name for run in runs for name in run.settings})
    table = {name: [run.settings.get(name) for run in runs] for name in names}
    return {
        name: values
        for name, values in table.items()
        if not name.startswith("student.")
        or values != table.get(name.replace("student.", "recipe.", 1))
    }


def differs(values: Sequence[Any]) -> bool:
    """Whether the runs of a setting have not all the same value."""
    return any(value != values[0] for value in values)


def training_panels(runs: Sequence[RunRecord]) -> dict[str, Panels]:
    """Section -> panels of everything that was measured at updates.

    Accuracies are drawn for every key time on its own, because each has heads of its own; of an
    update that trains several key times, other figures are drawn as their mean.
    """
    sections: dict[str, Panels] = {
        "Losses": {},
        "Accuracy of the heads": {},
        "Gradient norms": {},
        "Learning rate, time and the rest": {},
    }
    for label, row, name, value in _figures(runs, "rows"):
        found = _AT_KEY_TIME.search(name)
        figure, at = (name[: found.start()], found[1]) if found else (name, "")
        heading = figure.replace("_", " ")
        if "accuracy" in figure:
            section, at = "Accuracy of the heads", at or row.get("k", "")
            heading += f" at k = {at}" if at != "" else ""
        elif at:
            continue
        elif name in TERMS or "loss" in name:
            section, heading = "Losses", heading if "loss" in name else f"{heading} loss"
        elif name.endswith("grad_norm"):
            section = "Gradient norms"
        else:
            section = "Learning rate, time and the rest"
        line = sections[section].setdefault(heading, {}).setdefault(label, [])
        line.append((row["step"], value))
    return {name: panels for name, panels in sections.items() if panels}


def validation_panels(runs: Sequence[RunRecord]) -> Panels:
    """Panels of the figures of looks at fixed clips."""
    panels: Panels = {}
    for label, look, name, value in _figures(runs, "looks"):
        if name not in ("latent_mse", *_OF_TEACHER):  # means of what is drawn update by update
            continue
        heading = name.replace("_", " ") + (" (teacher = 1)" if name in _OF_TEACHER else "")
        panels.setdefault(heading, {}).setdefault(label, []).append((look["step"], value))
    return panels


def _figures(
    runs: Sequence[RunRecord], kind: str
) -> Iterator[tuple[str, Mapping[str, Any], str, float]]:
    """(label, row, name, value) of every finite figure of every run."""
    for run in runs:
        for row in getattr(run, kind):
            for name, value in row.items():
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if name not in _PLACE and number and math.isfinite(value):
                    yield run.label, row, name, float(value)

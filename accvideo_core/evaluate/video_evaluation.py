"""What the evaluation of videos found: figures of two sets of videos, and of their pairs.

Shapes: T frames; N videos; D features of I3D.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..latents import key_generator
from . import metrics
from .clips import Clip
from .fvd import fvd
from .measure import ClipFigures
from .metrics import Interval
from .yardsticks import CLIP_YARDSTICKS, PairYardstick

DIVERSITY = "diversity"
_DIVERSITY_TEXT = "RMS distance between the videos of one prompt (every 8th frame, 32 x 32 pixels)"
FVD_TEXT = "Frechet video distance of I3D's features of the first 16 frames"


@dataclass(frozen=True, eq=False)
class Side:
    """One set of videos; those that could not be measured are not in it."""

    label: str
    clips: dict[str, Clip]
    figures: dict[str, ClipFigures]
    features: dict[str, Tensor] = field(default_factory=dict)
    """Name -> what FVD compares [D]."""

    def values(self, figure: str) -> dict[str, float]:
        """Name -> a video's figure, where it is long enough to have one; of diversity, the name
        is a prompt."""
        if figure == DIVERSITY:
            return self._diversity()
        found = {name: one.mean(figure) for name, one in self.figures.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _diversity(self) -> dict[str, float]:
        found = {}
        for prompt, names in sample_groups(list(self.figures)).items():
            thumbs = [self.figures[name].thumbs.float() / 255 for name in names]
            length = min(map(len, thumbs))
            samples = torch.stack([x[:length] for x in thumbs])
            found[prompt] = float(metrics.diversity(samples, len(names)))
        return found


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of both sides; an error that is unknown, of fewer than 2 videos, is NaN."""

    name: str
    text: str
    reference: Interval
    judged: Interval
    ratio: Interval | None
    """Of the judged side to the reference; None where that is 0."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Every figure of both sides and of their pairs."""

    reference: Side
    judged: Side
    yardsticks: Mapping[str, PairYardstick]
    pairs: dict[str, dict[str, Tensor]]
    """Name -> yardstick -> its value for every frame [T]."""
    detector: str | None = None
    """SHA-256 of the file of I3D, where FVD was asked for."""
    left_out: list[str] = field(default_factory=list)
    """What was not measured, and why, one sentence each."""
    notes: list[str] = field(default_factory=list)

    @cached_property
    def fvd(self) -> float | None:
        """None where it was not asked for, or a side has fewer than 2 videos."""
        sides = [list(side.features.values()) for side in (self.reference, self.judged)]
        if not all(sides):
            return None
        return fvd(*(torch.stack(features) for features in sides))

    def rows(self) -> list[Row]:
        """The figures that need no partner."""
        texts = {name: one.text for name, one in CLIP_YARDSTICKS.items()}
        texts[DIVERSITY] = _DIVERSITY_TEXT
        rows = []
        for name, text in texts.items():
            one, other = self.reference.values(name), self.judged.values(name)
            if one and other:
                means = _mean(one.values()), _mean(other.values())
                rows.append(Row(name, text, *means, _ratio(name, one, other)))
        return rows

    def pair_means(self) -> dict[str, dict[str, float]]:
        """Yardstick -> name of a pair -> mean over its frames."""
        return {
            yardstick: {
                name: float(values[yardstick].mean())
                for name, values in self.pairs.items()
                if yardstick in values
            }
            for yardstick in self.yardsticks
        }

    def pair_rows(self) -> dict[str, tuple[str, Interval]]:
        """Yardstick -> what it is, and its mean over pairs."""
        return {
            name: (self.yardsticks[name].text, _mean(values.values()))
            for name, values in self.pair_means().items()
            if values
        }

    def table(self) -> str:
        """The figures as text."""
        lines = [self.head()]
        cells = [["", "reference", "judged", "judged / reference"]]
        for row in self.rows():
            cells.append([row.name, shown(row.reference), shown(row.judged), shown(row.ratio)])
        cells.append(["", "", "judged to reference", ""])
        cells += [[name, "", shown(mean), ""] for name, (_, mean) in self.pair_rows().items()]
        if self.fvd is not None:
            cells.append(["FVD", "", f"{self.fvd:.4g}", ""])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            padded = (text.ljust(width) for text, width in zip(row, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
        lines += [f"left out: {text}" for text in self.left_out]
        return "\n".join([*lines, *(f"note: {text}" for text in self.notes)])

    def head(self) -> str:
        """What was evaluated, in words."""
        sides = {"judged": self.judged, "reference": self.reference}
        told = [
            f"{name}: {side.label}, {_counted(len(side.figures), 'video')}"
            for name, side in sides.items()
        ]
        return "; ".join([*told, f"{_counted(len(self.pairs), 'pair')} frame by frame"])

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form; an error that is unknown is null."""
        means = self.pair_means()
        return {
            "format": 1,
            "reference": self.reference.label,
            "judged": self.judged.label,
            "figures": {
                row.name: {
                    "text": row.text,
                    "reference": _as_dict(row.reference),
                    "judged": _as_dict(row.judged),
                    "ratio": _as_dict(row.ratio),
                }
                for row in self.rows()
            },
            "pairs": {
                name: {"text": text, **(_as_dict(mean) or {}), "of_each": means[name]}
                for name, (text, mean) in self.pair_rows().items()
            },
            "fvd": {
                "text": FVD_TEXT,
                "value": self.fvd,
                "reference_videos": len(self.reference.features),
                "judged_videos": len(self.judged.features),
                "detector_sha256": self.detector,
            },
            "videos": {
                kind: {name: _clip_dict(one) for name, one in side.figures.items()}
                for kind, side in (("reference", self.reference), ("judged", self.judged))
            },
            "left_out": self.left_out,
            "notes": self.notes,
        }


def sample_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Prompt -> the names of its samples, by the number that a name ends with: "a dog-0"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        prompt = name.rstrip("0123456789")
        # Longer numbers count what one workflow has written, of whatever prompt.
        if prompt[-1:] in ("-", "_") and 1 <= len(name) - len(prompt) <= 2:
            groups.setdefault(prompt[:-1], []).append(name)
    return {prompt: samples for prompt, samples in groups.items() if len(samples) > 1}


def shown(figure: Interval | None) -> str:
    """A figure with its 95 % interval, where there is one."""
    if figure is None:
        return "-"
    return f"{figure.value:.4g}" if math.isnan(figure.error) else str(figure)


def _mean(values: Iterable[float]) -> Interval:
    x = torch.tensor(list(values), dtype=torch.float64)
    error = float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return Interval(float(x.mean()), error)


def _ratio(figure: str, one: Mapping[str, float], other: Mapping[str, float]) -> Interval | None:
    """Ratio of the means, with its error by pairs where all have a partner."""
    a, b = (torch.tensor(list(x.values()), dtype=torch.float64) for x in (one, other))
    if not float(a.mean()) > 0:
        return None
    if list(one) != list(other) or len(a) < 2:
        return Interval(float(b.mean() / a.mean()), math.nan)

    def ratio(rows: Tensor) -> float:
        return float(b[rows].mean() / a[rows].mean().clamp(min=1e-12))

    return metrics.bootstrap(ratio, len(a), key_generator("evaluate", figure))


def _as_dict(figure: Interval | None) -> dict[str, float | None] | None:
    if figure is None:
        return None
    return {"value": figure.value, "error": None if math.isnan(figure.error) else figure.error}


def _clip_dict(one: ClipFigures) -> dict[str, Any]:
    facts = {"frames": one.frames, "height": one.height, "width": one.width, "fps": one.fps}
    return {**facts, **{name: one.mean(name) for name in one.figures}}


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"

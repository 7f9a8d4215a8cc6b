"""Report: what a comparison found, with intervals and paired differences on demand.

Clips lie prompt by prompt: clip p * S + s is sample s of prompt p, S samples of each prompt.

Shapes: N clips, C, T, H, W latents; frames [N, T, H, W, 3] in [0, 1]; D feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import AccVideoError
from ..latents import key_generator
from ..sampling import SamplePlan
from . import metrics

FIGURES: dict[str, str] = {
    "shape": "clips whose shape is the prompt's",
    "colour": "clips whose colour is the prompt's",
    "motion": "clips whose motion is the prompt's",
    "background": "clips whose background is the prompt's",
    "all": "clips that show all of the prompt",
    "first_frame": "dB of the first frame to the picture that the clip continues",
    "fd_real": "tiny FVD (not FVD) to real clips: Frechet distance on the tiny world's classifier",
    "fd_teacher": "tiny FVD (not FVD) to the reference's clips of the same noise",
    "patch_distance": "sliced Wasserstein distance of 7 x 7 patches to the reference's",
    "psnr": "dB to the reference's clip of the same noise",
    "latent_mse": "squared distance to the reference's latents of the same noise",
    "sharpness": "brightness step of the strongest 5 % of edges",
    "detail": "local contrast of the still background",
    "motion_energy": "mean change from frame to frame",
    "diversity": "RMS distance between latents of the same prompt's samples",
}
_HEADINGS = {
    "shape": "shape",
    "colour": "colour",
    "motion": "motion",
    "background": "backgr",
    "all": "all",
    "first_frame": "1st frame",
    "fd_real": "FD real",
    "gap_closed": "gap closed",
    "fd_teacher": "FD ref",
    "patch_distance": "patches",
    "psnr": "PSNR",
    "latent_mse": "lat.MSE",
    "sharpness": "sharp",
    "detail": "detail",
    "motion_energy": "motion E",
    "diversity": "divers.",
    "seconds_per_clip": "s/clip",
}
_SHARES = ("shape", "colour", "motion", "background", "all", "gap_closed")


@dataclass(eq=False)
class Measured:
    """What is kept of one contender's N clips."""

    name: str
    steps: int | None
    """None for real clips."""
    clips: dict[str, Tensor]
    """Figure -> one value for each clip [N]."""
    latents: Tensor
    """Model space, float32 [N, C, T, H, W]."""
    patches: Tensor
    """[N, patches of a clip, pixels]."""
    features: Tensor | None = None
    """The classifier's [N, D], in the procedural world."""
    shown: Tensor | None = None
    """Frames of the first samples of the first prompts, for pictures."""
    seconds: float | None = None
    """Median over batches, sampling only, for one clip."""


@dataclass(eq=False)
class Report:
    """Every figure of every contender, with intervals and paired differences on demand."""

    measured: dict[str, Measured]
    reference: str
    prompts: list[str]
    per_prompt: int
    seed: int
    plan: SamplePlan
    real_features: Tensor | None = None
    notes: list[str] = field(default_factory=list)

    def figure(self, name: str, figure: str, clips: Tensor | None = None) -> float | None:
        """One of `FIGURES` for a contender, over some clips (indices) or all.

        None where it is not defined: real clips have no noise in common with the reference, one
        sample per prompt has no diversity, other worlds have no classifier.
        """
        one = self.measured[name]
        rows = torch.arange(len(one.latents)) if clips is None else clips
        if figure in one.clips:
            return float(one.clips[figure][rows].mean())
        if figure == "diversity" and self.per_prompt > 1:
            return float(metrics.diversity(one.latents[rows], self.per_prompt).mean())
        target = self.measured[self.reference]
        if figure == "patch_distance":
            mine, theirs = one.patches[rows].flatten(0, 1), target.patches[rows].flatten(0, 1)
            return metrics.patch_distance(mine, theirs)
        if one.features is None or target.features is None or len(rows) < 2:
            return None
        if figure == "fd_teacher":
            return metrics.frechet_distance(one.features[rows], target.features[rows])
        if figure == "fd_real" and self.real_features is not None:
            return metrics.frechet_distance(one.features[rows], self.real_features)
        return None

    def interval(self, name: str, figure: str, draws: int = 500) -> metrics.Interval:
        """A figure with its bootstrap error over prompts."""
        return self._bootstrap(lambda rows: self._known(name, figure, rows), figure, draws)

    def difference(self, a: str, b: str, figure: str, draws: int = 500) -> metrics.Interval:
        """Figure of `a` minus figure of `b` with its paired bootstrap error over prompts."""

        def statistic(rows: Tensor) -> float:
            return self._known(a, figure, rows) - self._known(b, figure, rows)

        return self._bootstrap(statistic, figure, draws)

    def gap_closed(self, student: str, figure: str = "fd_real") -> float | None:
        """Share of the gap teacher@few -> reference that a student closes at its own steps."""
        few = f"teacher@{self.measured[student].steps}"
        if few not in self.measured or student == few:
            return None
        values = [self.figure(name, figure) for name in (student, few, self.reference)]
        known = [value for value in values if value is not None]
        return metrics.gap_closed(*known) if len(known) == 3 else None

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a contender: name, steps, every figure (or None), seconds per clip."""
        return [
            {
                "name": name,
                "steps": one.steps,
                "nfe": one.steps,
                **{figure: self.figure(name, figure) for figure in FIGURES},
                "gap_closed": self.gap_closed(name) if one.steps else None,
                "seconds_per_clip": one.seconds,
            }
            for name, one in self.measured.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "format": 1,
            "reference": self.reference,
            "clips": len(self.measured[self.reference].latents),
            "prompts": self.prompts,
            "samples_per_prompt": self.per_prompt,
            "seed": self.seed,
            "frames": self.plan.frames,
            "height": self.plan.height,
            "width": self.plan.width,
            "figures": FIGURES,
            "rows": self.rows(),
            "notes": self.notes,
        }

    def table(self) -> str:
        """The figures as text, without columns that nobody has."""
        columns = {"name": "", "steps": "steps", **_HEADINGS}
        rows = self.rows()
        kept = [key for key in columns if any(row[key] is not None for row in rows)]
        cells = [[columns[key] for key in kept]]
        cells += [[_cell(key, row[key]) for key in kept] for row in rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(kept))]
        lines = [
            "  ".join(
                text.ljust(width) if i == 0 else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        head = f"{len(self.measured[self.reference].latents)} clips, seed {self.seed}"
        return "\n".join([head, *lines, *(f"note: {note}" for note in self.notes)])

    def _known(self, name: str, figure: str, rows: Tensor) -> float:
        value = self.figure(name, figure, rows)
        if value is None:
            raise AccVideoError(f"{name} has no figure {figure!r} in this comparison")
        return value

    def _bootstrap(
        self, statistic: Callable[[Tensor], float], figure: str, draws: int
    ) -> metrics.Interval:
        generator = key_generator(self.seed, "bootstrap", figure)
        units = len(self.prompts)
        return metrics.bootstrap(
            statistic, units, generator, per_unit=self.per_prompt, draws=draws
        )


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{100 * value:.1f}%" if key in _SHARES else f"{value:.3g}"
    return str(value)

"""The figures of one arm beside the teacher's own result from the same prompts and noise.

Shapes: N clips, C, T, H, W latents; F frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..evaluate.compare import Bench, Contender
from ..evaluate.judge import Judge
from ..evaluate.report import Measured, Report
from ..files import read_safetensors, write_safetensors
from ..models.loading import Teacher
from ..monitor import Monitor
from .study import NOISE_SEED, PER_PROMPT, Study

FIGURES = (
    *("all", "first_frame", "fd_real", "fd_teacher", "latent_mse", "psnr"),
    *("sharpness", "motion_energy", "diversity"),
)
"""Figures of `evaluate.report` that are kept of every arm."""
SHOWN = 6
"""Prompts whose first clip is on the contact sheets."""
_BATCH = 32
_DRAWS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Gauged:
    """What is kept of one arm of one seed."""

    figures: dict[str, float | None]
    """By name; None where it is not defined."""
    errors: dict[str, float]
    """Bootstrap standard errors over prompts, where they were asked for."""
    seconds: float | None
    """Of sampling one clip."""
    shown: Tensor
    """uint8 [SHOWN, F, H, W, 3]."""


class Gauge:
    """The prompts, the noise and the reference that all arms are measured with."""

    def __init__(self, teacher: Teacher, full: Contender, study: Study, folder: Path) -> None:
        """
        Args:
            full: the teacher on its own grid, beside which all others are set.
            folder: keeps its latents, so that no later run samples them again.
        """
        self.teacher, self.full, self.study, self.folder = teacher, full, study, folder
        self._reference: Measured | None = None

    def measure(self, contender: Contender, monitor: Monitor, errors: bool = False) -> Gauged:
        """All figures of a contender; with `errors`, also how they vary with the prompts."""
        if self._reference is None:
            self._reference = self._measured_reference(monitor)
        if contender is self.full:
            return self._gauged(self._reference, self._reference, errors)
        return self._gauged(self._bench.measure(contender, monitor), self._reference, errors)

    def _measured_reference(self, monitor: Monitor) -> Measured:
        path = self.folder / "reference.safetensors"
        if path.exists():
            tensors, about = read_safetensors(path)
            known = self._bench.measure(self.full, monitor, tensors["latents"])
            known.seconds = float(about["seconds"])
            return known
        made = self._bench.measure(self.full, monitor)
        write_safetensors(path, {"latents": made.latents}, {"seconds": str(made.seconds)})
        return made

    @cached_property
    def _judge(self) -> Judge:
        return self.study.judge()

    @cached_property
    def _bench(self) -> Bench:
        prompts = self.study.prompts(self.teacher)
        given = (self._judge.plan, self._judge, SHOWN)
        return Bench(self.teacher, prompts, PER_PROMPT, NOISE_SEED, _BATCH, *given)

    @cached_property
    def _real(self) -> Tensor:
        """Features of real clips [N, D]."""
        return self._judge.real_features(self.study.setting.real_clips, _BATCH)

    def _gauged(self, one: Measured, reference: Measured, errors: bool) -> Gauged:
        report = Report(
            {reference.name: reference, one.name: one},
            reference.name,
            self.study.texts(),
            PER_PROMPT,
            NOISE_SEED,
            self._judge.plan,
            self._real,
        )
        figures = {name: report.figure(one.name, name) for name in FIGURES}
        found = [name for name, value in figures.items() if errors and value is not None]
        assert one.shown is not None
        return Gauged(
            figures,
            {name: report.interval(one.name, name, _DRAWS).error for name in found},
            one.seconds,
            (one.shown * 255).round().to(torch.uint8),
        )

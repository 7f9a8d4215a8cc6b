"""The experiment in a folder: a stage is written when it is done, and a rerun goes on from there.

    settings.json      what the numbers follow from
    weights/           the teacher and the students
    panels/            what each panel shows: teacher, a to f
    numbers.json       the figures alone
    figure.png, .svg   all six panels
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import AccVideoError
from ..files import read_json, read_safetensors, write_json, write_safetensors
from ..latents import key_generator
from ..monitor import Monitor, Progress
from . import figure
from .data import mismatched
from .network import VelocityNet
from .panels import (
    Panel,
    knowledge_panel,
    matching_panel,
    numbers,
    rates_row,
    student_row,
    teacher_panel,
)
from .settings import ToySettings
from .training import forward_windows, train_student, train_teacher, trajectory_windows
from .useless import PAPER_RATES, Envelope

SETTINGS_FILE = "settings.json"
NUMBERS_FILE = "numbers.json"
FIGURE = "figure"

FORWARD, TRAJECTORY = "forward", "trajectory"
"""Where a student's start points come from: the forward process, or the teacher's trajectories."""


def run_toy(folder: Path, settings: ToySettings, monitor: Monitor) -> dict[str, Any]:
    """Run the experiment in `folder`, or what is left of it, and return its numbers.

    Raises:
        AccVideoError: the folder holds an experiment with other settings, files are damaged, or
            matplotlib is missing.
    """
    figure.check_matplotlib()
    _open(folder, settings)
    # ComfyUI runs its nodes in inference mode, where nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad():
        panels = _Experiment(folder, settings, monitor).panels()
    found = {"settings": settings.as_dict(), **numbers(panels), "paper": {"e": PAPER_RATES}}
    figure.draw_figure(panels, settings, folder / FIGURE)
    write_json(folder / NUMBERS_FILE, found)
    return read_json(folder / NUMBERS_FILE)


def _open(folder: Path, settings: ToySettings) -> None:
    path, wants = folder / SETTINGS_FILE, settings.as_dict()
    if not path.exists():
        write_json(path, wants)
    had = read_json(path)
    for name, value in wants.items():
        old = had.get(name) if isinstance(had, dict) else None
        if old != value:
            raise AccVideoError(
                f"experiment {folder.name!r} was started with {name} {old} and cannot go on with "
                f"{value}; choose another name, or the old setting"
            )


class _Experiment:
    """The stages in order; what is on the disk is read, not made again."""

    def __init__(self, folder: Path, settings: ToySettings, monitor: Monitor) -> None:
        self.folder, self.settings, self.monitor = folder, settings, monitor
        self.teacher = self._network("teacher", lambda: train_teacher(settings, monitor))
        self.envelope = Envelope.of(self.teacher, settings)

    def panels(self) -> dict[str, Any]:
        """Everything that the figure shows, by panel."""
        settings, teacher, envelope = self.settings, self.teacher, self.envelope
        degrees = settings.student_mismatches
        last, first = degrees[-1], degrees[0]
        kept = self._panel
        return {
            "teacher": kept("teacher", lambda: teacher_panel(teacher, settings)),
            "a": kept("a", lambda: knowledge_panel(teacher, envelope, last, settings)),
            "b": kept("b", lambda: knowledge_panel(teacher, envelope, first, settings)),
            "e": kept("e", self._rates),
            "f": kept("f", self._students),
            "c": kept("c", lambda: self._matching(last)),
            "d": kept("d", lambda: self._matching(first)),
        }

    def _rates(self) -> list[Panel]:
        rows, degrees = [], self.settings.mismatches
        for number, degree in enumerate(degrees, 1):
            rows.append(rates_row(self.teacher, self.envelope, degree, self.settings))
            self.monitor(Progress("useless points", number, len(degrees)))
        return rows

    def _students(self) -> list[Panel]:
        return [
            student_row(self._student(kind, degree), self.teacher, kind, degree, self.settings)
            for kind in (FORWARD, TRAJECTORY)
            for degree in self.settings.student_mismatches
        ]

    def _matching(self, degree: float) -> Panel:
        student = self._student(FORWARD, degree)
        return matching_panel(self.teacher, student, self.envelope, degree, self.settings)

    def _student(self, kind: str, degree: float) -> VelocityNet:
        """Distilled at this degree; a trajectory student meets no dataset, only its own noise."""
        settings, teacher = self.settings, self.teacher
        stage = f"{kind} student, M = {degree:g}"

        def train() -> VelocityNet:
            generator = key_generator(settings.seed, "toy student", kind, degree)
            if kind == FORWARD:
                windows = forward_windows(teacher, mismatched(degree), settings, generator)
            else:
                windows = trajectory_windows(teacher, settings, generator)
            return train_student(teacher, windows, settings, generator, stage, self.monitor)

        return self._network(f"{kind}_{degree:g}", train)

    def _network(self, name: str, train: Callable[[], VelocityNet]) -> VelocityNet:
        path = self.folder / "weights" / f"{name}.safetensors"
        if not path.exists():
            write_safetensors(path, train().state_dict())
        network = VelocityNet(self.settings.width).eval().requires_grad_(False)
        network.load_state_dict(read_safetensors(path)[0])
        return network

    def _panel(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.folder / "panels" / f"{name}.json"
        if not path.exists():
            write_json(path, make())
        return read_json(path)

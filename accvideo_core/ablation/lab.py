"""Every arm of every seed, once: what was done is never done again, what was cut goes on.

    <folder>/setting.json          what all arms have in common
    <folder>/dataset               what students learn from
    <folder>/reference.safetensors its own clips
    <folder>/arms/<arm>/seed<n>    run, student.safetensors, shown.safetensors, result.json

result.json is written last. Several processes may work on seeds of their own in one folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..distill.metrics import METRICS_FILE, read_metrics
from ..distill.recipes import Recipe
from ..distill.run import flat_settings
from ..distill.student import Student
from ..distill.trainer import distill
from ..errors import AccVideoError
from ..evaluate.compare import Contender
from ..export import load_student, save_student
from ..files import read_json, write_json, write_safetensors
from ..flow import Times
from ..models.loading import Teacher
from ..monitor import Monitor, Progress, silent
from ..trajectories.store import TrajectoryDataset
from .arms import FULL_TEACHER, Arm
from .gauge import Gauge, Gauged
from .study import Study

RESULT, STUDENT, SHOWN = "result.json", "student.safetensors", "shown.safetensors"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Job:
    """One arm of one training seed; the teacher's arms have none."""

    arm: Arm
    seed: int | None

    def folder(self, out: Path) -> Path:
        arm = out / "arms" / self.arm.name
        return arm if self.seed is None else arm / f"seed{self.seed}"

    def __str__(self) -> str:
        return self.arm.title if self.seed is None else f"seed {self.seed}, {self.arm.title}"


def jobs_of(arms: Sequence[Arm], seeds: Sequence[int]) -> list[Job]:
    """What there is to do: the teacher's arms, then seed by seed."""
    teachers = [Job(arm, None) for arm in arms if not arm.seeded]
    return teachers + [Job(arm, seed) for seed in seeds for arm in arms if arm.seeded]


class Lab:
    """The teacher, the study and the folder."""

    def __init__(self, teacher: Teacher, study: Study, folder: Path) -> None:
        self.teacher, self.study, self.folder = teacher, study, folder
        self._datasets: dict[str, TrajectoryDataset] = {}

    def arms(self) -> dict[str, Arm]:
        return self.study.arms(self.teacher.model)

    @cached_property
    def full(self) -> Contender:
        """The teacher on its own grid."""
        return self._contender(self.arms()[FULL_TEACHER])

    @cached_property
    def _gauge(self) -> Gauge:
        return Gauge(self.teacher, self.full, self.study, self.folder)

    def times(self, arm: Arm) -> Times:
        """The falling times that an arm is sampled at."""
        return self.study.times(arm, self.teacher.model.family)

    def run(self, arms: Sequence[Arm], seeds: Sequence[int], monitor: Monitor = silent) -> None:
        """Do what is not done yet.

        Args:
            monitor: called at every step of whatever runs, and with the stage "ablation" before
                each job; when it raises, the job goes on from there the next time.

        Raises:
            AccVideoError: the folder holds results of another setting or teacher.
        """
        self.open()
        jobs = jobs_of(arms, seeds)
        waiting = [job for job in jobs if not self.done(job)]
        if not waiting:
            return
        for number, job in enumerate(jobs):
            if job not in waiting:
                continue
            note = f"[{number + 1}/{len(jobs)}] {job}"
            monitor(Progress("ablation", number, len(jobs), notes=(note,)))
            self._do(job, monitor)

    def open(self) -> None:
        """Claim the folder for this setting and teacher, or check that it is theirs."""
        path = self.folder / "setting.json"
        about = {
            "format": FORMAT,
            "setting": self.study.setting.as_dict(),
            "teacher": self.teacher.model.fingerprint,
        }
        if path.exists():
            had, wants = flat_settings(read_json(path)), flat_settings(about)
            for name in sorted(had.keys() | wants.keys()):
                if had.get(name) != wants.get(name):
                    raise AccVideoError(
                        f"{self.folder} holds results with {name} {had.get(name)} and not "
                        f"{wants.get(name)}; choose another folder, or the old preset"
                    )
        write_json(path, about)

    def seeds_done(self) -> list[int]:
        """Seeds that some arm has a result of."""
        found = (self.folder / "arms").glob(f"*/seed*/{RESULT}")
        return sorted({int(path.parent.name.removeprefix("seed")) for path in found})

    def done(self, job: Job) -> bool:
        """Whether the job's result is there.

        Raises:
            AccVideoError: it is, and is one of another recipe.
        """
        path = job.folder(self.folder) / RESULT
        if not path.exists():
            return False
        told = read_json(path)["recipe"]
        if self._recipe(job) != (None if told is None else Recipe.from_dict(told)):
            raise AccVideoError(
                f"{path} is the result of another recipe, by another version of this package; "
                "choose another folder, or delete that arm's"
            )
        return True

    def _do(self, job: Job, monitor: Monitor) -> None:
        arm, trained = job.arm, dict[str, Any]()
        if job.seed is None:
            contender = self.full if arm.name == FULL_TEACHER else self._contender(arm)
        elif arm.recipe is None:
            contender = self._contender(arm, self._student(arm.student, job.seed))
        else:
            contender = self._contender(arm, self._train(job, monitor))
            rows = read_metrics(job.folder(self.folder) / "run" / METRICS_FILE)
            trained = {"updates": len(rows), "train_seconds": sum(row["seconds"] for row in rows)}
        gauged = self._gauge.measure(contender, monitor, errors=job.seed is None)
        self._write(job, gauged, trained)
        # What is done needs no checkpoints; result.json says that it is.
        shutil.rmtree(job.folder(self.folder) / "run" / "checkpoints", ignore_errors=True)

    def _train(self, job: Job, monitor: Monitor) -> Student:
        arm, seed, folder = job.arm, job.seed, job.folder(self.folder)
        assert seed is not None
        start = None if arm.start is None else self._student(arm.start, seed)
        dataset, recipe = self._dataset(arm.dataset, monitor), self._recipe(job)
        assert recipe is not None
        model = self.teacher.model
        result = distill(model, dataset, recipe, folder / "run", start=start, monitor=monitor)
        save_student(result.student, folder / STUDENT)
        return result.student

    def _student(self, arm: str | None, seed: int) -> Student:
        """What another arm's training gave."""
        assert arm is not None
        path = Job(self.arms()[arm], seed).folder(self.folder) / STUDENT
        return load_student(path, self.teacher.model)

    def _dataset(self, name: str, monitor: Monitor) -> TrajectoryDataset:
        """Complete, and looked through once."""
        if name not in self._datasets:
            folder = self.folder / name
            self._datasets[name] = self.study.dataset(name, self.teacher, folder, monitor)
        return self._datasets[name]

    def _write(self, job: Job, gauged: Gauged, trained: dict[str, Any]) -> None:
        folder = job.folder(self.folder)
        write_safetensors(folder / SHOWN, {"frames": gauged.shown})
        recipe = self._recipe(job)
        write_json(
            folder / RESULT,
            {
                "recipe": recipe and recipe.as_dict(),
                "figures": {**gauged.figures, "seconds_per_clip": gauged.seconds, **trained},
                "errors": gauged.errors,
            },
        )

    def _recipe(self, job: Job) -> Recipe | None:
        """How the job's arm is trained; None where it is not."""
        if job.seed is None or job.arm.recipe is None:
            return None
        return self.study.recipe(job.arm, job.seed, self.times(job.arm))

    def _contender(self, arm: Arm, student: Student | None = None) -> Contender:
        asked = self.study.asked(self.teacher) if student is None else student
        return Contender(arm.name, asked, self.times(arm))

"""Every arm of every seed, once: what was done is never done again, what was cut goes on.

    <folder>/setting.json          what all arms have in common
    <folder>/dataset               the teacher's trajectories
    <folder>/reference.safetensors its own clips
    <folder>/arms/<arm>/seed<n>    run, student.safetensors, shown.safetensors, result.json

result.json is written last. Several processes may work on seeds of their own in one folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conditioning import Prompt
from ..distill.metrics import METRICS_FILE, read_metrics
from ..distill.run import flat_settings
from ..distill.student import Student
from ..distill.trainer import distill
from ..errors import AccVideoError
from ..evaluate import world
from ..evaluate.compare import Contender
from ..export import load_student, save_student
from ..files import read_json, write_json, write_safetensors
from ..flow import Times
from ..latents import key_generator
from ..models.loading import Teacher
from ..monitor import Monitor, Progress, silent
from ..trajectories.record import RecordSpec, record
from ..trajectories.store import TrajectoryDataset
from .arms import FULL_TEACHER, Arm, all_arms
from .gauge import Gauge, Gauged
from .setting import Setting

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
    """The teacher, the setting and the folder."""

    def __init__(self, teacher: Teacher, setting: Setting, folder: Path) -> None:
        self.teacher, self.setting, self.folder = teacher, setting, folder
        self.grid: Times = teacher.model.family.time_grid(size=(world.SIZE, world.SIZE))
        self.full = self._contender(self.arms()[FULL_TEACHER])
        self._gauge = Gauge(teacher, self.full, setting, folder)

    def arms(self) -> dict[str, Arm]:
        return all_arms(self.setting, self.teacher.model.num_blocks, len(self.grid) - 1)

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
        dataset = self._record(monitor)
        for number, job in enumerate(jobs):
            if job not in waiting:
                continue
            note = f"[{number + 1}/{len(jobs)}] {job}"
            monitor(Progress("ablation", number, len(jobs), notes=(note,)))
            self._do(job, dataset, monitor)

    def open(self) -> None:
        """Claim the folder for this setting and teacher, or check that it is theirs."""
        path = self.folder / "setting.json"
        about = {
            "format": FORMAT,
            "setting": self.setting.as_dict(),
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
        if read_json(path)["recipe"] != self._told(job):
            raise AccVideoError(
                f"{path} is the result of another recipe, by another version of this package; "
                "choose another folder, or delete that arm's"
            )
        return True

    def _record(self, monitor: Monitor) -> TrajectoryDataset:
        setting = self.setting
        spec = RecordSpec(
            frames=world.FRAMES,
            height=world.SIZE,
            width=world.SIZE,
            samples_per_prompt=setting.samples,
            seed=0,
            kept=setting.kept(len(self.grid) - 1),
            batch_size=min(32, setting.recorded // setting.samples),
            dtype="float32",
        )
        return record(self.teacher.model, self._prompts(), spec, self.folder / "dataset", monitor)

    def _prompts(self) -> list[Prompt]:
        count = self.setting.recorded // self.setting.samples
        texts = world.sample_prompts(count, key_generator("ablation", "train", "prompts"))
        return self.teacher.encode_prompts(texts)

    def _do(self, job: Job, dataset: TrajectoryDataset, monitor: Monitor) -> None:
        arm, trained = job.arm, dict[str, Any]()
        if job.seed is None:
            contender = self.full if arm.name == FULL_TEACHER else self._contender(arm)
        else:
            student = self._train(arm, job.seed, dataset, monitor)
            contender = self._contender(arm, student)
            rows = read_metrics(job.folder(self.folder) / "run" / METRICS_FILE)
            trained = {"updates": len(rows), "train_seconds": sum(row["seconds"] for row in rows)}
        gauged = self._gauge.measure(contender, monitor, errors=job.seed is None)
        self._write(job, gauged, trained)
        # What is done needs no checkpoints; result.json says that it is.
        shutil.rmtree(job.folder(self.folder) / "run" / "checkpoints", ignore_errors=True)

    def _train(
        self, arm: Arm, seed: int, dataset: TrajectoryDataset, monitor: Monitor
    ) -> Student:
        folder, model = Job(arm, seed).folder(self.folder), self.teacher.model
        start = None
        if arm.start is not None:
            first = Job(self.arms()[arm.start], seed).folder(self.folder) / STUDENT
            start = load_student(first, model)
        recipe = arm.recipe(self.setting, seed, self.grid)
        result = distill(model, dataset, recipe, folder / "run", start=start, monitor=monitor)
        save_student(result.student, folder / STUDENT)
        return result.student

    def _write(self, job: Job, gauged: Gauged, trained: dict[str, Any]) -> None:
        folder = job.folder(self.folder)
        write_safetensors(folder / SHOWN, {"frames": gauged.shown})
        write_json(
            folder / RESULT,
            {
                "recipe": self._told(job),
                "figures": {**gauged.figures, "seconds_per_clip": gauged.seconds, **trained},
                "errors": gauged.errors,
            },
        )

    def _told(self, job: Job) -> dict[str, Any] | None:
        """The recipe as JSON has it; the teacher has none."""
        if job.seed is None:
            return None
        return plain(job.arm.recipe(self.setting, job.seed, self.grid).as_dict())

    def _contender(self, arm: Arm, student: Student | None = None) -> Contender:
        return Contender(arm.name, student or self.teacher.model, arm.times(self.grid))


def plain(data: Any) -> Any:
    """Settings as they are read back from JSON."""
    return json.loads(json.dumps(data))

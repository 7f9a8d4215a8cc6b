"""The run folder: what a run was started with, whether it may go on, and its student so far."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import AccVideoError
from ..files import read_json, write_json
from ..models.video_model import VideoModel
from ..student_file import load_student
from ..trajectories.store import TrajectoryDataset
from .checkpoint import load_checkpoint
from .optimiser import Role
from .recipes import Recipe
from .student import Student, StudentInfo

CONFIG_FILE = "config.json"
BEST_FILE = "best.safetensors"
"""The best student so far, where the recipe says by which figure."""

FORMAT = 1
_FREE = (
    *("recipe.name", "recipe.checkpoint_every", "recipe.keep_checkpoints", "dataset.name"),
    *("recipe.validate_every", "recipe.validation_clips", "recipe.best_by", "recipe.patience"),
    # Where things lie meanwhile: a run that ran out of memory may go on with less of it.
    *("recipe.gradient_checkpointing", "recipe.swap_blocks", "recipe.offload_activations"),
)


def open_run(
    folder: Path,
    recipe: Recipe,
    info: StudentInfo,
    dataset: TrajectoryDataset,
    ids: list[str],
    start: Student | None,
    write: bool = True,
) -> None:
    """Start the run in `folder`, or check that it was started with the same settings.

    `info` describes the student before its first update, `ids` the trajectories it learns from.
    Of several processes one writes.

    What changes no update may change; that includes `train_steps` under a constant schedule, so
    that a finished run can be continued.

    Raises:
        AccVideoError: another setting differs; the message names it. Nothing was touched.
    """
    config = {
        "format": FORMAT,
        "recipe": recipe.as_dict(),
        "student": replace(info, recipe={}).as_dict(),
        "dataset": _identity(dataset, ids),
        "start": None if start is None else _digest(start),
    }
    path = folder / CONFIG_FILE
    if path.exists():
        free = _FREE + (("recipe.train_steps",) if recipe.schedule == "constant" else ())
        _check_same(folder.name, flat_settings(_known(path)), flat_settings(config), free)
    if write:
        write_json(path, config)


def _known(path: Path) -> dict[str, Any]:
    """What a run was started with; settings that came later stand at their defaults."""
    known = read_json(path)
    if not isinstance(known, dict) or not {"recipe", "student"} <= known.keys():
        raise AccVideoError(f"{path} describes no training run; choose another run name")
    recipe = {**Recipe().as_dict(), **known["recipe"]}
    return {**known, "recipe": recipe, "student": {"solver": "euler", **known["student"]}}


def student_of_run(folder: Path, teacher: VideoModel) -> Student:
    """The best student of a run that keeps one, or the one at its last checkpoint, with averaged
    weights if the run keeps them.

    Raises:
        AccVideoError: no run there, no checkpoint yet, or `teacher` is not the run's.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise AccVideoError(f"{folder} is no training run (no {CONFIG_FILE}); choose its folder")
    config = read_json(folder / CONFIG_FILE)
    info = StudentInfo.from_dict(config["student"])
    if info.base != teacher.fingerprint:
        raise AccVideoError(
            f"run {folder.name!r} trains a student of another teacher ({info.base}) than "
            f"{teacher.source or 'this one'} ({teacher.fingerprint}); load its own teacher"
        )
    if config["recipe"].get("best_by") and (folder / BEST_FILE).is_file():
        return load_student(folder / BEST_FILE, teacher)
    found = load_checkpoint(folder)
    if found is None:
        raise AccVideoError(f"run {folder.name!r} has no checkpoint yet; train it first")
    step, parts = found
    info = replace(info, recipe=config["recipe"], steps_trained=info.steps_trained + step)
    student = Student.create(teacher, info)
    student.load_state_dict(parts.get("average") or Role.values(parts["student"]))
    return student


def _identity(dataset: TrajectoryDataset, ids: list[str]) -> dict[str, Any]:
    return {
        "name": dataset.folder.name,
        "teacher": dataset.info.teacher,
        "seed": dataset.info.seed,
        "trajectories": len(ids),
        "ids": hashlib.sha256("".join(ids).encode()).hexdigest()[:16],
        "guidance": dataset.info.guidance,
        "dtype": dataset.info.dtype,
    }


def _digest(student: Student) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(student.state_dict().items()):
        digest.update(name.encode() + x.numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_same(
    run: str, had: dict[str, Any], wants: dict[str, Any], free: tuple[str, ...]
) -> None:
    for name in sorted(had.keys() | wants.keys()):
        old, new = had.get(name), wants.get(name)
        if old != new and name not in free:
            raise AccVideoError(
                f"run {run!r} was started with {name} {old} and cannot go on with {new}; "
                "choose another run name, or the old setting"
            )


def flat_settings(data: Any, prefix: str = "") -> dict[str, Any]:
    """A config's nested dictionaries as one, "recipe.lr" and so on; tuples as JSON's lists."""
    if not isinstance(data, dict):
        return {prefix: list(data) if isinstance(data, tuple) else data}
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= flat_settings(value, f"{prefix}.{name}" if prefix else name)
    return flat

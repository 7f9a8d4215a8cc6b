"""The run folder's config.json: what a run was started with, and whether it may go on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..errors import AccVideoError
from ..files import read_json, write_json
from ..trajectories.store import TrajectoryDataset
from .recipes import Recipe
from .student import Student

FORMAT = 1
_FREE = ("recipe.name", "recipe.checkpoint_every", "recipe.keep_checkpoints", "dataset.name")


def open_run(
    folder: Path, recipe: Recipe, dataset: TrajectoryDataset, ids: list[str], start: Student | None
) -> None:
    """Start the run in `folder`, or check that it was started with the same settings.

    What changes no update may change; that includes `train_steps` under a constant schedule, so
    that a finished run can be continued.

    Raises:
        AccVideoError: another setting differs; the message names it. Nothing was touched.
    """
    config = _config(recipe, dataset, ids, start)
    path = folder / "config.json"
    if path.exists():
        free = _FREE + (("recipe.train_steps",) if recipe.schedule == "constant" else ())
        _check_same(folder.name, _flat(read_json(path)), _flat(config), free)
    write_json(path, config)


def _config(
    recipe: Recipe, dataset: TrajectoryDataset, ids: list[str], start: Student | None
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "recipe": recipe.as_dict(),
        "dataset": {
            "name": dataset.folder.name,
            "teacher": dataset.info.teacher,
            "seed": dataset.info.seed,
            "trajectories": len(ids),
            "ids": hashlib.sha256("".join(ids).encode()).hexdigest()[:16],
            "guidance": dataset.info.guidance,
            "dtype": dataset.info.dtype,
        },
        "start": None if start is None else _digest(start),
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


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, "recipe.lr" and so on; tuples as JSON's lists."""
    if not isinstance(data, dict):
        return {prefix: list(data) if isinstance(data, tuple) else data}
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat

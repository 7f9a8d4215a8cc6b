"""Checkpoints of a run: one safetensors file each, whole or not at all.

    <run>/checkpoints/<step>.safetensors      tensors named "<part>/<name>"

Where several processes hold parts of the weights, a folder <step> takes the file's place; adapters
are whole in every process, and the first writes the file. Either goes on in any number of
processes.

Only safetensors: a checkpoint holds no code and no generator state, because all randomness of a run
follows from its seed and the step.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import AccVideoError
from ..files import read_safetensors, remove_leftovers, write_safetensors
from ..ranks import ALONE, Ranks
from .sharded_checkpoint import load_sharded, save_sharded
from .sharded_tensors import is_sharded

Parts = dict[str, dict[str, Tensor]]
_log = logging.getLogger(__name__)


def save_checkpoint(
    run: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    keep: int,
    ranks: Ranks = ALONE,
) -> None:
    """Write the state after `step` updates, then delete all but the last `keep` checkpoints.

    Of several processes all must call this.
    """
    flat = {f"{part}/{name}": x for part, state in parts.items() for name, x in state.items()}
    if any(is_sharded(x) for x in flat.values()):
        save_sharded(_folder(run) / f"{step:08d}", flat, ranks)
    elif ranks.first:
        write_safetensors(_folder(run) / f"{step:08d}.safetensors", flat)
    if ranks.first:
        for old in _saved(run)[:-keep]:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


def load_checkpoint(
    run: Path, like: Mapping[str, Tensor] | None = None
) -> tuple[int, Parts] | None:
    """(updates done, state) of the last whole checkpoint, or None; damaged ones are passed over.

    Args:
        like: parameters by name; where they are sharded, what is read of a folder is, too.
    """
    remove_leftovers(run)
    for path in reversed(_saved(run)):
        try:
            flat = load_sharded(path, like or {}) if path.is_dir() else read_safetensors(path)[0]
        except AccVideoError as error:
            _log.warning("passed over a checkpoint: %s", error)
            continue
        parts: Parts = {}
        for full_name, x in flat.items():
            part, name = full_name.split("/", 1)
            parts.setdefault(part, {})[name] = x
        return int(path.stem), parts
    return None


def last_step(run: Path) -> int:
    """Updates done at the last checkpoint, 0 when there is none."""
    return max((int(path.stem) for path in _saved(run)), default=0)


def kept(run: Path) -> str:
    """Which checkpoint a run that cannot go on still has, in words."""
    if not _saved(run):
        return "this run has no checkpoint yet"
    return f"this run keeps its checkpoint of update {last_step(run)}"


def _folder(run: Path) -> Path:
    return run / "checkpoints"


def _saved(run: Path) -> list[Path]:
    found = [p for p in _folder(run).glob("*") if p.suffix in ("", ".safetensors")]
    return sorted((p for p in found if p.stem.isdigit()), key=lambda p: int(p.stem))

"""Everything that can be wrong with a finished dataset, planted, found, mended and made again."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from accvideo_core.trajectories import TrajectoryDataset
from accvideo_core.trajectories.verify import Fault
from tests.faults.recorder import snapshot, work

Planted = tuple[str, str]
"""Kind and id of the fault that must be found."""


def flipped(path: Path, chance: random.Random) -> None:
    """One bit of a file is another."""
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def truncated(path: Path, chance: random.Random) -> None:
    """A file lacks its end."""
    os.truncate(path, chance.randrange(path.stat().st_size))


def foreign(path: Path, chance: random.Random) -> None:
    """A file holds something else."""
    path.write_bytes(chance.randbytes(chance.randrange(1, 5000)))


def line_lost(dataset: TrajectoryDataset, chance: random.Random) -> Planted:
    """A line of prompts.jsonl is gone."""
    path = dataset.folder / "prompts.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    ids = [prompt.id for prompt in dataset.prompts()]
    number = chance.randrange(len(ids))
    path.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
    return "line", ids[number]


def plant(dataset: TrajectoryDataset, chance: random.Random) -> list[Planted]:
    """Plant one of each; what must be found."""
    ids = chance.sample(dataset.ids(), 8)
    ways: list[Callable[[Path, random.Random], None]] = [flipped, truncated, foreign] * 2
    for id, way in zip(ids, ways, strict=False):
        way(dataset.record_path(id), chance)
    other = dataset.record_path(ids[7]).read_bytes()
    dataset.record_path(ids[6]).write_bytes(other)  # a record under another's name
    prompts = chance.sample([prompt.id for prompt in dataset.prompts()], 3)
    for prompt_id, way in zip(prompts, [flipped, truncated], strict=False):
        way(dataset.prompt_path(prompt_id), chance)
    dataset.prompt_path(prompts[2]).unlink()
    lost = {("record", id) for id in ids[:7]} | {("prompt", id) for id in prompts}
    (dataset.folder / "records" / ids[0][:2] / f".{ids[0]}.safetensors.0a1b2c3d.tmp").touch()
    return sorted(lost)


def rot(folder: Path, seed: int = 0) -> str:
    """Plant every fault; exactly these are found, removed, and recorded again alike."""
    chance = random.Random(seed)
    clips = work(folder / "clips").folder
    whole = snapshot(clips)
    dataset = TrajectoryDataset.open(clips)
    line = line_lost(dataset, chance)
    expected = sorted([*plant(dataset, chance), line])
    faults = dataset.verify()
    assert sorted({(fault.kind, fault.id) for fault in faults}) == expected, names(faults)
    assert len(faults) == len(expected)
    before = snapshot(clips)
    dataset.repair(faults)
    after = snapshot(clips)
    gone = {str(fault.path.relative_to(clips)) for fault in faults if fault.kind != "line"}
    assert before.keys() - after.keys() == gone & before.keys(), "not exactly these were removed"
    changed = {name for name in after if after[name] != before[name]}
    assert changed <= {"prompts.jsonl"}
    kept = {path: path.stat().st_mtime_ns for path in clips.rglob("*.safetensors")}
    work(clips)
    assert snapshot(clips) == whole and dataset.verify() == []
    assert all(path.stat().st_mtime_ns == kept[path] for path in kept), "more was made than lost"
    return f"{len(faults)} faults found, mended and recorded again, same bytes"


def names(faults: list[Fault]) -> str:
    """The faults, a line each."""
    return "\n".join(f"{fault.kind} {fault.id}: {fault}" for fault in faults)

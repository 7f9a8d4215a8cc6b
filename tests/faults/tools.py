"""Merging, cutting out and exporting datasets, killed at random moments and started again.

    python -m tests.faults.tools FOLDER --times 50     every job, SIGKILL at random moments

Each job ends with one line that says what was seen, or with a failed assertion. The tests run them
shortly; `python -m tests.faults.long` runs them at length.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import signal
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from accvideo_core import files
from accvideo_core.monitor import Progress
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record
from accvideo_core.trajectories.tools import Choice, merge, subset
from accvideo_core.trajectories.webdataset import Export, export_webdataset
from tests.analytic import gaussian_model, prompts
from tests.faults.recorder import SlowFile, joined, slow_open, snapshot, start

Job = Callable[[Sequence[TrajectoryDataset], Path], object]


def slow_step(_progress: Progress) -> None:
    """A monitor that makes a record take its time."""
    time.sleep(0.004)


def slow_copy(source: Path, target: Path) -> None:
    """`shutil.copyfile`, with its target half written for a while."""
    with SlowFile(target, "w") as file:
        file.write(source.read_bytes())


def denied(_source: object, _target: object) -> None:
    """`os.link` from one disk to another."""
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def by_copy(sources: Sequence[TrajectoryDataset], out: Path) -> object:
    """A merge where there are no hard links."""
    vars(os)["link"] = denied
    return merge(sources, out, slow_step)


JOBS: Mapping[str, Job] = {
    "merge": lambda sources, out: merge(sources, out, slow_step),
    "copy": by_copy,
    "subset": lambda sources, out: subset(sources[0], out, Choice(kept=(0, 4)), slow_step),
    "safetensors": lambda sources, out: export_webdataset(
        sources[0], out, Export(40_000, conditions=True), slow_step
    ),
    "npy": lambda sources, out: export_webdataset(
        sources[0], out, Export(60_000, "npy", conditions=True), slow_step
    ),
}
"""What is killed. Merge and subset are seen whole or not at all, an export tar by tar."""


def recorded(folder: Path, first: int, last: int) -> TrajectoryDataset:
    """Prompts `first` to `last` of many, two samples of each."""
    spec = RecordSpec(5, 32, 32, 2, seed=1, steps=4, kept=4, batch_size=2)
    return record(gaussian_model(), prompts(20, offsets=True)[first:last], spec, folder)


def everything(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kill(job: str, times: int, folder: Path, seed: int) -> str:
    """Kill a job at random moments; what can be seen is right, grows, and ends as it should."""
    # The second has some of the first's records again.
    sources = [recorded(folder / "one", 0, 8), recorded(folder / "two", 6, 12)]
    before = everything(folder)
    _slow()
    begun = time.perf_counter()
    assert joined([start(lambda: JOBS[job](sources, folder / "whole"))]) == [0]
    duration = time.perf_counter() - begun
    whole = snapshot(folder / "whole")
    _whole_as_expected(job, folder / "whole", sources)
    chance = random.Random(seed)
    torn, seen, killed, finished = folder / "torn", set[str](), 0, 0
    while killed < times:
        child = start(lambda: JOBS[job](sources, torn))
        time.sleep(chance.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        (end,) = joined([child])
        assert end in (0, -signal.SIGKILL), f"{job} failed"
        killed += end == -signal.SIGKILL
        visible = _visible(job, torn, whole)
        assert seen <= visible.keys(), "something is lost"
        seen = set(visible)
        if visible.keys() == whole.keys() and end == 0:  # so that there is work again
            shutil.rmtree(torn)
            seen, finished = set(), finished + 1
    assert joined([start(lambda: JOBS[job](sources, torn))]) == [0]
    assert snapshot(torn) == whole, "interrupted and uninterrupted results differ"
    shutil.rmtree(folder / "whole")
    left = [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".part"))]
    assert left == [], "temporary files are left"
    shutil.rmtree(torn)
    assert everything(folder) == before, "a source was touched"
    return f"killed {killed} times, finished {finished + 1} times, {len(whole)} files, same bytes"


def _slow() -> None:
    """Give every write a middle in which it can be killed."""
    vars(files)["open"] = slow_open
    vars(tarfile)["bltn_open"] = slow_open
    vars(shutil)["copyfile"] = slow_copy


def _visible(job: str, torn: Path, whole: Mapping[str, bytes]) -> dict[str, bytes]:
    """What can be seen of the result, or is kept for it, by now; all of it has to be right."""
    parts = [torn] if torn.exists() else list(torn.parent.glob(f".{torn.name}.*.part"))
    assert len(parts) <= 1, "more than one beginning is kept"
    found = snapshot(parts[0]) if parts else {}
    for name, data in found.items():
        assert data == whole.get(name), f"{name} is wrong"
    if torn.exists() and (job not in ("safetensors", "npy") or "shards.json" in found):
        assert found.keys() == whole.keys(), "a part is seen as the whole"
    return found


def _whole_as_expected(job: str, out: Path, sources: Sequence[TrajectoryDataset]) -> None:
    """Whether the result without any kill has every record, once."""
    expected = sources[0].ids()
    if job in ("safetensors", "npy"):
        names: list[str] = []
        for path in sorted(out.glob("*.tar")):
            with tarfile.open(path) as tar:
                names += tar.getnames()
        assert len(names) == len(set(names)) and len(list(out.glob("*.tar"))) > 2
        assert sorted({name.partition(".")[0] for name in names}) == expected
        return
    if job != "subset":
        expected = sorted({id for source in sources for id in source.ids()})
    made = TrajectoryDataset.open(out)
    assert made.ids() == expected and made.verify() == []


def main() -> None:
    """Kill every job."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for job in JOBS:
        print(f"{job}: {kill(job, given.times, given.folder / job, given.seed)}", flush=True)


if __name__ == "__main__":
    main()

"""Ingestions that are killed, run side by side, or meet a full disk.

    python -m tests.faults.ingester kill FOLDER --times 50     SIGKILL at random moments
    python -m tests.faults.ingester race FOLDER                several in one folder
    python -m tests.faults.ingester limit FOLDER               files may not grow beyond a limit

Each ends with one line that says what was seen, or with a failed assertion. The tests run each of
them shortly; `python -m tests.faults.long` runs all of them at length.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from accvideo_core import files
from accvideo_core.errors import AccVideoError
from accvideo_core.monitor import Progress
from accvideo_core.trajectories import TrajectoryDataset
from accvideo_core.trajectories.ingest import Ingester
from accvideo_core.trajectories.record import Batch
from tests.faults.recorder import hidden, joined, slow_open, start
from tests.known_teacher import footage, snapshot, work

VIDEOS = 6


def slow_step(_progress: Progress) -> None:
    """A monitor that makes a clip take its time."""
    time.sleep(0.004)


def _whole(folder: Path) -> dict[str, bytes]:
    """The videos in `folder`/in, and what comes of them without any fault.

    Made in a process of its own: one that has decoded cannot be forked.
    """

    def make() -> None:
        work(footage(folder / "in", VIDEOS), folder / "whole")

    assert joined([start(make)]) == [0]
    return snapshot(folder / "whole")


def kill(folder: Path, times: int, seed: int) -> str:
    """Kill one or two at random moments; what exists is whole, grows, and ends alike."""
    videos, chance = folder / "in", random.Random(seed)
    whole = _whole(folder)
    vars(files)["open"] = slow_open
    begun = time.perf_counter()
    assert joined([start(lambda: work(videos, folder / "timed", monitor=slow_step))]) == [0]
    duration = time.perf_counter() - begun
    torn, seen, killed = folder / "torn", set[str](), 0
    while killed < times:
        count = chance.choice((1, 2))
        children = [start(lambda: work(videos, torn, monitor=slow_step)) for _ in range(count)]
        for child in children:
            time.sleep(chance.uniform(0, duration / 2))
            os.kill(child, signal.SIGKILL)
        ends = joined(children)
        killed += ends.count(-signal.SIGKILL)
        assert set(ends) <= {0, -signal.SIGKILL}, "ingesting failed"
        if not (torn / "dataset.json").exists():
            continue
        dataset = TrajectoryDataset.open(torn)
        faults, ids = dataset.verify(), set(dataset.ids())
        assert {fault.kind for fault in faults} <= {"line"}, "a clip is damaged"
        assert seen <= ids, "a clip is lost"
        if faults and chance.random() < 0.5:
            dataset.repair(faults)
            assert dataset.verify() == [], "what a kill leaves cannot be repaired"
        for id in chance.sample(sorted(ids), len(ids) // 2):  # so that there is work again
            dataset.record_path(id).unlink()
        seen = set(dataset.ids())
    assert joined([start(lambda: work(videos, torn))]) == [0]
    assert snapshot(torn) == whole, "interrupted and uninterrupted ingestions differ"
    files.remove_leftovers(torn, older_than=-1)
    assert hidden(torn) == {".prompts.lock"}
    return f"killed {killed} times, {len(whole)} files, same bytes"


def race(folder: Path, workers: int = 2) -> str:
    """Several in one folder share the videos, and none is done twice."""
    videos, whole = folder / "in", _whole(folder)
    both, log = folder / "both", folder / "log"
    children = [start(lambda: _logged(videos, both, log)) for _ in range(workers)]
    assert joined(children) == [0] * workers, "ingesting failed"
    assert snapshot(both) == whole and TrajectoryDataset.open(both).verify() == []
    lines = Counter(log.read_text().splitlines())
    assert len(lines) == lines.total() == VIDEOS, "a video was done twice or never"
    return f"{workers} wrote {len(whole)} files, same bytes, no video twice"


def _logged(videos: Path, out: Path, log: Path) -> None:
    """`work`, slowly, with a line in `log` for every video that is done."""
    do = Ingester.do

    def counted(self: Ingester, batch: Batch, *more: Any) -> object:
        outcome = do(self, batch, *more)
        with open(log, "ab", buffering=0) as file:
            file.write(f"{batch.prompt_ids[0]}\n".encode())
        return outcome

    Ingester.do = counted  # type: ignore[method-assign]
    work(videos, out, monitor=slow_step)


def limit(folder: Path) -> str:
    """A file that may not grow: a clear sentence, earlier clips intact, resume completes."""
    videos, full, some = folder / "in", folder / "full", folder / "some"
    whole = _whole(folder)
    some.mkdir()
    for path in videos.glob("v0.*"):
        shutil.copy(path, some)
    first = snapshot(work(some, full).dataset.folder)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        work(videos, full)
        raise AssertionError("the limit had no effect")
    except AccVideoError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert snapshot(full) == first and hidden(full) == {".prompts.lock"}
    work(videos, full)
    assert snapshot(full) == whole
    return message


SCENARIOS: Mapping[str, Callable[..., str]] = {"race": race, "limit": limit}


def main() -> None:
    """Run one scenario."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=["kill", *SCENARIOS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.scenario == "kill":
        print(kill(given.folder, given.times, given.seed))
    else:
        print(SCENARIOS[given.scenario](given.folder))


if __name__ == "__main__":
    main()

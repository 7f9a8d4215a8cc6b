"""Recorders that are killed, run side by side, or meet a full disk; run by hand or by the tests.

    python tests/faults/recorder.py kill FOLDER --times 50     SIGKILL at random moments
    python tests/faults/recorder.py race FOLDER                two recorders in one folder
    python tests/faults/recorder.py limit FOLDER               files may not grow beyond a limit

Each ends with one line that says what was seen, or with a failed assertion.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402

from accvideo_core import files  # noqa: E402
from accvideo_core.errors import AccVideoError  # noqa: E402
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record  # noqa: E402
from tests.analytic import gaussian_model, prompts  # noqa: E402

PROMPTS = 20


def work(folder: Path, samples: int = 2) -> TrajectoryDataset:
    """Record the dataset that every scenario is about: 20 prompts, batches of 3 with a rest."""
    spec = RecordSpec(5, 32, 32, samples, seed=1, steps=4, kept=4, batch_size=3)
    return record(gaussian_model(), prompts(PROMPTS, offsets=True), spec, folder)


class SlowFile(io.FileIO):
    """Writes in two halves with a pause between, so that a kill finds files half written."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        half = super().write(view[: len(view) // 2])
        time.sleep(0.003)
        return half + super().write(view[half:])


def slow_open(path: Path, mode: str, **_options: Any) -> Any:
    """`open`, with a SlowFile for what is written."""
    return open(path, mode) if mode.startswith("r") else SlowFile(path, mode.replace("b", ""))


def start(task: Callable[[], object]) -> int:
    """Run `task` in a forked process; its id."""
    child = os.fork()
    if child:
        return child
    try:
        task()
    except BaseException as error:
        print(f"recorder failed: {error!r}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file but the temporary ones, by name."""
    found = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def kill(folder: Path, times: int, seed: int) -> str:
    """Kill a recorder at random moments; what exists is whole, grows, and ends as one go would."""
    vars(files)["open"] = slow_open
    chance = random.Random(seed)
    begun = time.perf_counter()
    whole = snapshot(work(folder / "whole").folder)
    duration = time.perf_counter() - begun
    torn, seen, killed, lost = folder / "torn", set(), 0, 0
    while killed < times:
        child = start(lambda: work(torn))
        time.sleep(chance.uniform(0, duration / 3))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the recorder failed"
        if not (torn / "dataset.json").exists():
            continue
        dataset = TrajectoryDataset.open(torn)
        ids = set(dataset.ids())
        assert dataset.verify() == [] and seen <= ids, "a record is damaged or lost"
        if len(ids) == 2 * PROMPTS:  # done: take some away, so that there is work to interrupt
            for id in chance.sample(sorted(ids), PROMPTS):
                (torn / "records" / id[:2] / f"{id}.safetensors").unlink()
                lost += 1
        seen = set(dataset.ids())
    work(torn)
    assert snapshot(torn) == whole, "interrupted and uninterrupted recordings differ"
    leftovers = len(list(torn.rglob(".*.tmp")))
    files.remove_leftovers(torn, older_than=-1)
    assert not list(torn.rglob(".*.tmp"))
    return f"killed {killed} times, {lost} records removed, {leftovers} temporary files, same bytes"


def race(folder: Path) -> str:
    """Two recorders in one folder at once."""
    whole = snapshot(work(folder / "whole").folder)
    both = folder / "both"
    children = [start(lambda: work(both)) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0], "a recorder failed"
    assert TrajectoryDataset.open(both).verify() == [] and snapshot(both) == whole
    return f"two recorders wrote {len(whole)} files, same bytes"


def limit(folder: Path) -> str:
    """A file that may not grow: a clear sentence, earlier records intact, resume completes."""
    whole = snapshot(work(folder / "whole").folder)
    full = folder / "full"
    first = snapshot(work(full, samples=1).folder)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        work(full)
        raise AssertionError("the limit had no effect")
    except AccVideoError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert snapshot(full) == first and not list(full.rglob(".*.tmp"))
    work(full)
    assert snapshot(full) == whole
    return message


def main() -> None:
    """Run one scenario."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=["kill", "race", "limit"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.scenario == "kill":
        print(kill(given.folder, given.times, given.seed))
    else:
        print({"race": race, "limit": limit}[given.scenario](given.folder))


if __name__ == "__main__":
    main()

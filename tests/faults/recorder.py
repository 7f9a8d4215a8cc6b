"""Recorders that are killed, stopped, run side by side, or meet a full disk.

    python -m tests.faults.recorder kill FOLDER --times 50     SIGKILL at random moments
    python -m tests.faults.recorder race FOLDER                several recorders in one folder
    python -m tests.faults.recorder hang FOLDER                one that stands still for a while
    python -m tests.faults.recorder limit FOLDER               files may not grow beyond a limit

Each ends with one line that says what was seen, or with a failed assertion. The tests run each of
them shortly; `python -m tests.faults.long` runs all of them at length.
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
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from accvideo_core import files
from accvideo_core.errors import AccVideoError
from accvideo_core.monitor import Monitor, Progress, silent
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, claims, record
from accvideo_core.trajectories.record import Batch, Recorder
from tests.analytic import gaussian_model, prompts

PROMPTS, SAMPLES, BATCH = 20, 2, 3
BATCHES = SAMPLES * -(-PROMPTS // BATCH)


def work(folder: Path, samples: int = SAMPLES, monitor: Monitor = silent) -> TrajectoryDataset:
    """Record the dataset that every scenario is about: 20 prompts, batches of 3 with a rest."""
    spec = RecordSpec(5, 32, 32, samples, seed=1, steps=4, kept=4, batch_size=BATCH)
    return record(gaussian_model(), prompts(PROMPTS, offsets=True), spec, folder, monitor)


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


def slow_step(_progress: Progress) -> None:
    """A monitor that makes a teacher step take its time."""
    time.sleep(0.004)


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


def joined(children: list[int]) -> list[int]:
    """Wait for processes; their exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def logged(folder: Path, log: Path) -> None:
    """`work`, slowly, with a line in `log` for every batch that is computed to its end."""
    do = Recorder.do

    def counted(self: Recorder, batch: Batch, *more: Any) -> object:
        outcome = do(self, batch, *more)
        with open(log, "ab", buffering=0) as file:
            file.write(f"{batch.sample} {' '.join(batch.prompt_ids)}\n".encode())
        return outcome

    Recorder.do = counted  # type: ignore[method-assign]
    work(folder, monitor=slow_step)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file but the hidden ones, by name."""
    found = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    inside = (p for p in found if p.relative_to(folder).parts[0] != claims.FOLDER)
    return {str(p.relative_to(folder)): p.read_bytes() for p in inside}


def hidden(folder: Path) -> set[str]:
    """Claims, temporary files and the like."""
    return {p.name for p in folder.rglob("*") if p.is_file()} - {
        Path(name).name for name in snapshot(folder)
    }


def kill(folder: Path, times: int, seed: int) -> str:
    """Kill one or two recorders at random moments; what exists is whole, grows, and ends alike."""
    vars(files)["open"] = slow_open
    chance = random.Random(seed)
    begun = time.perf_counter()
    whole = snapshot(work(folder / "whole").folder)
    duration = time.perf_counter() - begun
    torn, seen, killed, lost = folder / "torn", set(), 0, 0
    while killed < times:
        children = [start(lambda: work(torn)) for _ in range(chance.choice((1, 2)))]
        for child in children:
            time.sleep(chance.uniform(0, duration / 3))
            os.kill(child, signal.SIGKILL)
        ends = joined(children)
        killed += ends.count(-signal.SIGKILL)
        assert set(ends) <= {0, -signal.SIGKILL}, "the recorder failed"
        if not (torn / "dataset.json").exists():
            continue
        dataset = TrajectoryDataset.open(torn)
        ids = set(dataset.ids())
        assert dataset.verify() == [] and seen <= ids, "a record is damaged or lost"
        if len(ids) == SAMPLES * PROMPTS:  # done: take some away, so that there is work again
            for id in chance.sample(sorted(ids), PROMPTS):
                dataset.record_path(id).unlink()
                lost += 1
        seen = set(dataset.ids())
    work(torn)
    assert snapshot(torn) == whole, "interrupted and uninterrupted recordings differ"
    leftovers = len(list(torn.rglob(".*.tmp")))
    files.remove_leftovers(torn, older_than=-1)
    assert hidden(torn) == {".prompts.lock"}
    return f"killed {killed} times, {lost} records removed, {leftovers} temporary files, same bytes"


def race(folder: Path, workers: int = 2) -> str:
    """Several recorders in one folder at once share the work, and nobody's clock matters."""
    whole = snapshot(work(folder / "whole").folder)
    both, log = folder / "both", folder / "log"
    children = [start(lambda days=days: _off(days, both, log)) for days in range(workers)]
    assert joined(children) == [0] * workers, "a recorder failed"
    assert TrajectoryDataset.open(both).verify() == [] and snapshot(both) == whole
    lines = Counter(log.read_text().splitlines())
    assert len(lines) == lines.total() == BATCHES, "a batch was computed twice or never"
    assert hidden(both) == {".prompts.lock"}
    return f"{workers} recorders wrote {len(whole)} files, same bytes, no batch twice"


def _off(days: int, folder: Path, log: Path) -> None:
    """`logged`, by a clock that is some days off."""
    now = time.time
    vars(time)["time"] = lambda: now() + 86400 * days
    logged(folder, log)


def expired(folder: Path, workers: int = 2) -> str:
    """Recorders whose claims run out at once do the same batches, and harm nothing."""
    whole = snapshot(work(folder / "whole").folder)
    both, log = folder / "both", folder / "log"
    vars(claims)["SECONDS"] = 0.0
    children = [start(lambda: logged(both, log)) for _ in range(workers)]
    assert joined(children) == [0] * workers, "a recorder failed"
    assert TrajectoryDataset.open(both).verify() == [] and snapshot(both) == whole
    twice = len(log.read_text().splitlines()) - BATCHES
    return f"{workers} recorders without valid claims did {twice} batches twice, same bytes"


def hang(folder: Path, seed: int = 0) -> str:
    """One recorder stands still, as with its network cut; another takes over; the first returns."""
    whole = snapshot(work(folder / "whole").folder)
    both, log = folder / "both", folder / "log"
    vars(claims)["SECONDS"] = 0.5
    still = start(lambda: logged(both, log))
    while not list((both / claims.FOLDER).glob("*.claim")):
        time.sleep(0.002)
    time.sleep(random.Random(seed).uniform(0, 0.15))
    os.kill(still, signal.SIGSTOP)
    other = start(lambda: logged(both, log))
    assert joined([other]) == [0], "the recorder that went on failed"
    assert snapshot(both) == whole, "work of the one that stands still was not taken over"
    before = {path: path.stat().st_ino for path in (both / "records").rglob("*.safetensors")}
    computed = len(log.read_text().splitlines())
    os.kill(still, signal.SIGCONT)
    assert joined([still]) == [0], "the recorder that came back failed"
    after = {path: path.stat().st_ino for path in (both / "records").rglob("*.safetensors")}
    assert snapshot(both) == whole and after.keys() == before.keys()
    assert TrajectoryDataset.open(both).verify() == [] and hidden(both) == {".prompts.lock"}
    # Only what it was computing the last step of, or writing, when it was stopped.
    twice = len(log.read_text().splitlines()) - computed
    again = sum(after[path] != before[path] for path in after)
    assert twice <= 1 and again <= 1, "it went on with what another had taken over"
    return f"the other took over; {twice} batches computed twice, {again} files replaced by equals"


def limit(folder: Path) -> str:
    """A file that may not grow: a clear sentence, earlier records intact, resume completes."""
    whole = snapshot(work(folder / "whole").folder)
    full = folder / "full"
    work(full, samples=1)  # and the plan for more: it is a record that shall meet the limit
    dataset = TrajectoryDataset.open(full)
    dataset.add_prompts(dataset.prompts(), SAMPLES)
    first = snapshot(full)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        work(full)
        raise AssertionError("the limit had no effect")
    except AccVideoError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert snapshot(full) == first and hidden(full) == {".prompts.lock"}
    work(full)
    assert snapshot(full) == whole
    return message


SCENARIOS: Mapping[str, Callable[..., str]] = {
    "race": race,
    "expired": expired,
    "hang": hang,
    "limit": limit,
}


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

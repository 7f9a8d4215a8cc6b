"""Every fault at length, by hand: `python -m tests.faults.long [--times 50] [--folder FOLDER]`.

Minutes of kills, races and hangs in forked processes, each round with another seed. The last line
counts what must be zero.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tests.faults import ingester, recorder, rot, tools


def apart(task: Callable[[], str]) -> bool:
    """Run a scenario in a process of its own, because some change the library; whether it held."""

    def told() -> None:
        print(f"  {task()}", flush=True)

    return recorder.joined([recorder.start(told)]) == [0]


def main() -> None:
    """Run everything; exit code 1 when anything did not hold."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50, help="SIGKILLs")
    parser.add_argument("--rounds", type=int, default=10, help="of every other fault")
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    base = given.folder or Path(tempfile.mkdtemp(prefix="accvideo-faults-"))
    plan: list[tuple[str, Callable[[Path, int], str], int]] = [
        ("killed", lambda folder, seed: recorder.kill(folder, given.times, seed), 1),
        ("side by side", lambda folder, seed: recorder.race(folder, 2 + seed % 2), given.rounds),
        ("without claims", lambda folder, _seed: recorder.expired(folder, 3), given.rounds),
        ("standing still", lambda folder, seed: recorder.hang(folder, seed), given.rounds),
        ("no room", lambda folder, _seed: recorder.limit(folder), 1),
        ("ingesting killed", lambda f, seed: ingester.kill(f, given.times, seed), 1),
        ("ingesting side by side", lambda f, seed: ingester.race(f, 2 + seed % 2), given.rounds),
        ("ingesting without room", lambda f, _seed: ingester.limit(f), 1),
        ("rotten", lambda folder, seed: rot.rot(folder, seed), given.rounds),
    ]
    for job in tools.JOBS:
        plan.append((f"{job} killed", partial(tools.kill, job, given.times), 1))
    failed = 0
    for name, scenario, rounds in plan:
        print(name, flush=True)
        for seed in range(rounds):
            folder = base / f"{name.replace(' ', '-')}-{seed}"
            folder.mkdir(parents=True)
            held = apart(lambda s=scenario, f=folder, n=seed: s(f, n))
            failed += not held
            if held:
                shutil.rmtree(folder)
            else:
                print(f"  FAILED, see {folder}", flush=True)
    print(f"{failed} scenarios with a record that was corrupt and accepted, lost or duplicated")
    if not failed and given.folder is None:
        os.rmdir(base)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

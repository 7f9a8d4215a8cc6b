"""Our adversarial LoRA update against a plain loop with separate copies, and against FastGen.

    python -m benchmarks.trainer                     time and memory, minutes on two cores
    python -m benchmarks.trainer --fastgen FOLDER    with FastGen's KD and LADD steps as well
    python -m benchmarks.trainer --small             a tiny network: shows that it works
    python -m benchmarks.trainer --gpu               13B and 14B shapes; see gpu_trainer.py

Time: `distill` itself, with reading batches and writing metrics, without checkpoints, against
`PlainAdversarial`, whose mathematics is the same to the last bit of the losses. Both run in turn,
one sweep over the key times at a time; figures are medians of the pairs' ratios.

Memory: highest resident memory of a fresh process beyond what it had after its imports, so that
everything counts, from the first weight on. The limit is on the case whose weights dominate; what
autograd keeps exists once on either side, so where that dominates copies matter little.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.distill.trainer import distill  # noqa: E402
from accvideo_core.models.packing import pack_weights  # noqa: E402
from accvideo_core.trajectories.store import TrajectoryDataset  # noqa: E402
from benchmarks.bench import Row, Seconds, compare, timed  # noqa: E402
from benchmarks.fastgen_trainer import STEPS, FastGenTraining  # noqa: E402
from benchmarks.loading import status  # noqa: E402
from benchmarks.plain_trainer import PlainAdversarial  # noqa: E402
from benchmarks.training_cases import (  # noqa: E402
    CASES,
    Case,
    Samples,
    make_dataset,
    make_model,
    make_recipe,
)

TIME_LIMIT, MEMORY_LIMIT = 1.05, 0.5
NO_LIMIT = float("inf")


@dataclass(frozen=True)
class Work:
    """What a side trains with, and where it may write; each makes the network itself."""

    case: Case
    dataset: TrajectoryDataset
    folder: Path
    fastgen: Path | None = None


def ours(work: Work, weights: str | None = None, **changes: Any) -> Seconds:
    """Mean seconds of an update of `distill` over one sweep, after its first update."""
    model = make_model(work.case)
    if weights is not None:
        model = pack_weights(model, weights)
    recipe = make_recipe(work.case, **changes)
    recipe = replace(recipe, train_steps=recipe.student_steps + 2)
    marks: list[Seconds] = []

    def mark(_progress: object) -> None:
        marks.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory(dir=work.folder) as run:
        distill(model, work.dataset, recipe, Path(run) / "run", monitor=mark)
    sweep = marks[: recipe.student_steps + 1]  # a checkpoint is written after the last update
    (wall, cpu), (first_wall, first_cpu) = sweep[-1], sweep[0]
    return (wall - first_wall) / recipe.student_steps, (cpu - first_cpu) / recipe.student_steps


def plain(work: Work, copies: int = 3) -> Callable[[], Seconds]:
    """The same of the plain loop, as often as it is called."""
    recipe = make_recipe(work.case)
    loop = PlainAdversarial(make_model(work.case), work.dataset, recipe, copies)
    loop.update()
    return lambda: sweep_of(loop.update, recipe.student_steps)


def fastgen(work: Work, method: str) -> Callable[[], Seconds]:
    """The same of FastGen, which makes its own copies of the weights."""
    assert work.fastgen is not None
    samples = Samples(work.dataset, STEPS, torch.device("cpu"))
    folder = work.folder / "fastgen"
    its = FastGenTraining(
        method, work.fastgen, make_model(work.case), samples, work.case.batch, folder
    )
    its.update()
    return lambda: sweep_of(its.update, STEPS)


def sweep_of(update: Callable[[], object], count: int) -> Seconds:
    """Mean seconds of `count` updates."""
    wall, cpu = timed(lambda: [update() for _ in range(count)])
    return wall / count, cpu / count


def eq_6(work: Work, **changes: Any) -> Seconds:
    return ours(work, student_steps=STEPS, adversarial=False, **changes)


def eq_6_7(work: Work, **changes: Any) -> Seconds:
    return ours(work, student_steps=STEPS, **changes)


SIDES: dict[str, Callable[[Work], object]] = {
    "ours": ours,
    "ours, recomputing": lambda work: ours(work, gradient_checkpointing=True),
    "ours, recomputing, fp8": lambda work: ours(work, "fp8", gradient_checkpointing=True),
    "plain, 3 copies": lambda work: plain(work)(),
    "plain, 2 copies": lambda work: plain(work, copies=2)(),
    "FastGen KD": lambda work: fastgen(work, "kd")(),
    "ours, Eq. 6, all weights": lambda work: eq_6(work, lora=None),
    "ours, Eq. 6, LoRA": eq_6,
    "FastGen LADD": lambda work: fastgen(work, "ladd")(),
    "ours, Eq. 6 + 7, all weights": lambda work: eq_6_7(work, lora=None),
    "ours, Eq. 6 + 7, LoRA": eq_6_7,
}
"""What a fresh process can be asked to do for one sweep over the key times."""


def child(side: str, case: Case, data: Path, fastgen_folder: Path | None) -> int:
    """Highest resident memory of one side, in bytes, beyond what this process had before.

    The side is run on a tiny network first, because first-time work of libraries is not its own.
    """
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    tiny = CASES["tiny"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = make_dataset(tiny, make_model(tiny), folder / "tiny")
        SIDES[side](Work(tiny, small, folder, fastgen_folder))
        work = Work(case, TrajectoryDataset.open(data), folder, fastgen_folder)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the highest so far
        before = status("VmRSS")
        SIDES[side](work)
    return status("VmHWM") - before


def peak(side: str, work: Work) -> int:
    """`child` in a new process, whose memory goes back to the system as soon as it is freed."""
    command = [sys.executable, "-m", "benchmarks.trainer", "--child", side]
    command += ["--case", work.case.name, "--data", str(work.dataset.folder)]
    if side.startswith("FastGen"):
        command += ["--fastgen", str(work.fastgen)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    if done.returncode:
        raise RuntimeError(f"{side} could not be measured:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def bench_time(work: Work, repeats: int) -> list[Row]:
    """Seconds of an update, ours and the plain loop's."""
    loop, name = plain(work), work.case.name
    limit = NO_LIMIT if name == "tiny" else TIME_LIMIT
    return [
        compare(f"{name}: ours / plain", limit, repeats, lambda: ours(work), loop),
        compare(
            f"{name}: ours, recomputing / plain",
            NO_LIMIT,
            repeats,
            lambda: ours(work, gradient_checkpointing=True),
            loop,
        ),
    ]


def bench_fastgen_time(work: Work, repeats: int) -> list[Row]:
    """Seconds of an update, ours and FastGen's."""
    rows = []
    for method, side in (("kd", eq_6), ("ladd", eq_6_7)):
        theirs = fastgen(work, method)
        for name, changes in (("all weights", {"lora": None}), ("LoRA", {})):
            what = {"kd": "Eq. 6", "ladd": "Eq. 6 + 7"}[method]
            label = f"{work.case.name}: ours, {what}, {name} / FastGen {method.upper()}"
            rows.append(
                compare(label, NO_LIMIT, repeats, lambda s=side, c=changes: s(work, **c), theirs)
            )
    return rows


def bench_memory(work: Work, pairs: list[tuple[str, str]]) -> list[Row]:
    """Peaks of (ours, theirs) in MB."""
    found = {side: peak(side, work) / 1e6 for pair in pairs for side in pair}
    limits = {("weights", "ours", "plain, 3 copies"): MEMORY_LIMIT}
    return [
        Row(
            f"{work.case.name}: {a} / {b}",
            found[a],
            found[b],
            found[a] / found[b],
            limits.get((work.case.name, a, b), NO_LIMIT),
        )
        for a, b in pairs
    ]


PLAIN = [
    ("ours", "plain, 3 copies"),
    ("ours", "plain, 2 copies"),
    ("ours, recomputing", "plain, 3 copies"),
    ("ours, recomputing, fp8", "plain, 3 copies"),
]
FASTGEN = [
    ("ours, Eq. 6, all weights", "FastGen KD"),
    ("ours, Eq. 6, LoRA", "FastGen KD"),
    ("ours, Eq. 6 + 7, all weights", "FastGen LADD"),
    ("ours, Eq. 6 + 7, LoRA", "FastGen LADD"),
]


def shown(row: Row) -> str:
    """A line of the table; memory in MB, times in seconds."""
    limit = "" if row.limit == NO_LIMIT else f"{row.limit:.2f}"
    mark = "" if row.passed else "  over the limit"
    cpu = "" if row.cpu_figure is None else f"{row.cpu_figure:.3f}"
    figures = f"{row.ours:10.3f}{row.plain or 0:10.3f}{row.figure:8.3f}{cpu:>8}{limit:>7}"
    return f"{row.name:60}{figures}{mark}"


def bench(case: Case, options: argparse.Namespace, folder: Path) -> list[Row]:
    """All rows of a case."""
    model = make_model(case)
    weights = sum(p.numel() for p in model.module.parameters())
    print(f"{case.name}: {weights / 1e6:.1f} M weights ({weights * 4 / 1e6:.0f} MB), "
          f"{case.tokens} video tokens a batch", flush=True)  # fmt: skip
    work = Work(case, make_dataset(case, model, folder / "data"), folder, options.fastgen)
    del model
    benches = [lambda: bench_memory(work, PLAIN), lambda: bench_time(work, options.repeats)]
    if options.fastgen is not None:
        benches.append(lambda: bench_memory(work, FASTGEN))
        benches.append(lambda: bench_fastgen_time(work, options.repeats))
    rows = []
    for one in benches:
        for row in one():
            print(shown(row), flush=True)
            rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fastgen", type=Path, help="folder of a FastGen checkout")
    parser.add_argument("--case", action="append", choices=CASES, help="(weights, activations)")
    parser.add_argument("--small", action="store_true", help="a tiny network alone")
    parser.add_argument("--gpu", action="store_true", help="13B and 14B shapes on a GPU instead")
    parser.add_argument("--repeats", type=int, default=5, help="pairs per ratio of times (5)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench_trainer.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gpu:
        from benchmarks.gpu_trainer import main as gpu

        return gpu([])
    if options.child:
        print(child(options.child, CASES[options.case[0]], options.data, options.fastgen))
        return 0
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    names = f"{'ours':>10}{'theirs':>10}{'ratio':>8}{'(CPU)':>8}{'limit':>7}"
    print(f"{'memory in MB, time in seconds an update':60}{names}", flush=True)
    rows = []
    for name in ["tiny"] if options.small else options.case or ["weights", "activations"]:
        with tempfile.TemporaryDirectory(prefix="trainer-") as folder:
            rows += bench(CASES[name], options, Path(folder))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What recording costs and how it grows, side by side in one run: `python -m benchmarks.recorder`.

    overhead   record() against the teacher's bare sampling loop              <= 1.03 x
    scaling    records a second of two processes on one folder against one    >= 1.8 x
    memory     resident memory from the first to the last 1000 of 10 000      flat
    headers    opening 10 000 records and reading every header                seconds
    access     random reads for training against raw memory-mapped reads      >= 0.8 x
    hiding     overhead with the Wan 1.3B shape at 480 x 832 x 81, on a GPU   <= 1.03 x

Both sides of a ratio run in turn; the figure is the median of the pairs' ratios. The network of the
first two is the embedded teacher's with random weights, in float32, one thread per process. What is
written meanwhile is told beside the overhead. One part alone: `--only access`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.conditioning import Condition, Prompt  # noqa: E402
from accvideo_core.flow import euler_states  # noqa: E402
from accvideo_core.guidance import guided  # noqa: E402
from accvideo_core.latents import seeded_noise  # noqa: E402
from accvideo_core.models import FAMILIES, VideoModel  # noqa: E402
from accvideo_core.monitor import Progress  # noqa: E402
from accvideo_core.trajectories import RecordSpec, Trajectory, TrajectoryDataset, record_id  # noqa: E402
from accvideo_core.trajectories.record import dataset_info, prepare, record  # noqa: E402
from benchmarks.bench import make_model, make_prompts  # noqa: E402
from tests.analytic import gaussian_model  # noqa: E402
from tests.analytic import prompts as analytic_prompts  # noqa: E402

SPEC = RecordSpec(17, 32, 32, steps=20, kept=5, batch_size=8)
RECORDS = 160
"""Of the scaling benchmark: enough batches that waiting for the other's last one weighs little."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Teacher:
    """What is recorded in a benchmark."""

    model: VideoModel
    prompts: Sequence[Prompt]
    spec: RecordSpec
    negative: Prompt | None = None


Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {
    "": time.perf_counter,
    ", CPU of the computing thread": time.thread_time,
    ", CPU of all threads": time.process_time,
}
"""Wall clock, and what other programs on the machine disturb less."""


def now() -> list[float]:
    return [clock() for clock in CLOCKS.values()]


def since(begun: list[float]) -> list[float]:
    return [b - a for a, b in zip(begun, now(), strict=True)]


@torch.no_grad()
def bare(teacher: Teacher) -> list[float]:
    """Seconds of the sampling loop alone, over the batches that record() computes."""
    prompts, spec = teacher.prompts, teacher.spec
    info = dataset_info(teacher.model, prompts, spec, teacher.negative)
    model = guided(teacher.model, teacher.negative, info.cfg)
    begun = now()
    for first in range(0, len(prompts), spec.batch_size):
        batch = prompts[first : first + spec.batch_size]
        cond = Condition.cat([p.condition for p in batch]).to(model.device, model.dtype)
        noise = torch.stack([seeded_noise(info.shape, 0, p.id, 0) for p in batch])

        def velocity(x_t: Tensor, t: float, cond: Condition = cond) -> Tensor:
            return model.velocity(x_t, t, cond)

        for x in euler_states(velocity, noise.to(model.device), info.time_grid):
            x.flatten()[0].item()  # a sampler that shows its progress waits for every step
    return since(begun)


@contextlib.contextmanager
def clocked_writes() -> Iterator[list[float]]:
    """The seconds of every record's write, whichever thread does it."""
    write, took = TrajectoryDataset.write, []

    def clocked(self: TrajectoryDataset, trajectory: Trajectory) -> None:
        begun = time.perf_counter()
        write(self, trajectory)
        took.append(time.perf_counter() - begun)

    TrajectoryDataset.write = clocked  # type: ignore[method-assign]
    try:
        yield took
    finally:
        TrajectoryDataset.write = write  # type: ignore[method-assign]


def recorded(teacher: Teacher) -> tuple[list[float], float, int]:
    """Seconds of record() into a prepared folder, of the writes meanwhile, and bytes written."""
    with tempfile.TemporaryDirectory() as folder, clocked_writes() as writes:
        given = (teacher.model, teacher.prompts, teacher.spec, Path(folder) / "d")
        prepare(*given, teacher.negative)  # once for a dataset of any size
        begun = now()
        dataset = record(*given, negative=teacher.negative)
        seconds = since(begun)
        return seconds, sum(writes), sum(head.size for head in dataset.headers())


def overhead(teacher: Teacher, repeats: int) -> Result:
    """record() against the bare loop."""
    written = recorded(teacher)[2]
    bare(teacher)
    pairs = []
    for number in range(repeats):
        # The side that goes first changes, so that a drift of the machine favours neither.
        if number % 2:
            ours, loop = recorded(teacher), bare(teacher)
        else:
            loop, ours = bare(teacher), recorded(teacher)
        pairs.append((ours, loop))
    result: Result = {
        f"record / bare loop{name}": statistics.median(a[0][i] / b[i] for a, b in pairs)
        for i, name in enumerate(CLOCKS)
    }
    result["background writes / bare loop"] = statistics.median(a[1] / b[0] for a, b in pairs)
    return {**result, "bare loop, s": pairs[-1][1][0], "MB written": written / 1e6}


def tiny_teacher(count: int) -> Teacher:
    return Teacher(make_model("cpu"), make_prompts(count), SPEC)


def bench_overhead(repeats: int) -> Result:
    return overhead(tiny_teacher(24), repeats)


def wan_teacher(device: str, layers: int = 30, heads: int = 12, **size: int) -> Teacher:
    """Wan 2.1 T2V 1.3B with random weights; fewer layers and heads to try it without a GPU."""
    from diffusers import WanTransformer3DModel

    family = FAMILIES["wan_t2v"]
    with torch.device(device):
        module = WanTransformer3DModel(
            num_layers=layers, num_attention_heads=heads, ffn_dim=8960 * heads // 12
        ).to(torch.bfloat16)
    spec = family.latent_spec(module.config, {})
    model = VideoModel(module.eval().requires_grad_(False), family, spec, source="random")
    text = seeded_noise((4, 512, 4096), "text")
    prompts = [Prompt.of(f"clip {i}", Condition(text).select(i)) for i in range(4)]
    video = {"frames": 81, "height": 480, "width": 832, **size}
    return Teacher(model, prompts[:3], RecordSpec(**video, steps=10, kept=5), prompts[3])


def bench_hiding(repeats: int) -> Result:
    if not torch.cuda.is_available():
        return {"skipped": "there is no GPU"}
    return overhead(wan_teacher("cuda"), min(repeats, 3))


def worker(task: str, part: int) -> None:
    """One process of the scaling benchmark: says when it is ready, and works when told to.

    `task` is a folder to record into, or "half" or "whole" of the same work as a bare loop.
    """
    torch.set_num_threads(1)
    teacher = tiny_teacher(RECORDS)
    bare(replace(teacher, prompts=teacher.prompts[:8]))
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.process_time()
    if task in ("half", "whole"):
        half = teacher.prompts[part::2]
        bare(replace(teacher, prompts=half if task == "half" else teacher.prompts))
    else:
        record(teacher.model, teacher.prompts, SPEC, Path(task))
    print("done", time.process_time() - begun, flush=True)


def together(count: int, task: str) -> tuple[float, float]:
    """Wall seconds that `count` processes take that are started together, and the CPU seconds of
    the busiest, which other programs on the machine do not lengthen.
    """
    cpu = []
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-m", "benchmarks.recorder", "--worker", task, "--part"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        workers = [
            stack.enter_context(subprocess.Popen([*command, str(part)], **pipes))
            for part in range(count)
        ]
        for each in workers:
            assert each.stdout is not None and each.stdout.readline() == "ready\n"
        begun = time.perf_counter()
        for each in workers:
            assert each.stdin is not None
            each.stdin.write("go\n")
            each.stdin.flush()
        for each in workers:
            word, _, seconds = (each.stdout.readline() if each.stdout else "").partition(" ")
            if word != "done":
                raise RuntimeError("a recorder failed")
            cpu.append(float(seconds))
        # Without the time that Python takes to end.
        return time.perf_counter() - begun, max(cpu)


def recording_together(count: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        return together(count, f"{folder}/d")


def bench_scaling(repeats: int) -> Result:
    """Two recorders on one folder against one; and bare loops, for what the machine gives."""
    recorders, loops = [], []
    for number in range(max(1, repeats // 2)):
        counts = (1, 2) if number % 2 else (2, 1)
        took = {count: recording_together(count) for count in counts}
        recorders.append([a / b for a, b in zip(took[1], took[2], strict=True)])
        one, two = together(1, "whole"), together(2, "half")
        loops.append([a / b for a, b in zip(one, two, strict=True)])
    result: Result = {}
    for i, clock in enumerate(("", ", CPU of the busiest")):
        result[f"two recorders / one{clock}"] = statistics.median(x[i] for x in recorders)
        result[f"two bare loops of half / one whole{clock}"] = statistics.median(
            x[i] for x in loops
        )
    return {**result, "best pair of recorders": max(x[0] for x in recorders)}


def resident() -> float:
    """Resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def bench_memory(records: int) -> Result:
    """Memory while many small records are made, then the time to open them again."""
    seen: list[float] = []

    def watch(progress: Progress) -> None:
        if progress.metrics["records_done"] >= len(seen) * records / 10:
            seen.append(resident())

    with tempfile.TemporaryDirectory() as folder:
        spec = RecordSpec(5, 16, 16, 10, steps=2, kept=2, batch_size=20)
        given = analytic_prompts(records // 10)
        begun = time.perf_counter()
        record(gaussian_model(), given, spec, Path(folder) / "d", watch)
        made = time.perf_counter() - begun
        begun = time.perf_counter()
        heads = TrajectoryDataset.open(Path(folder) / "d").headers()
        opened = time.perf_counter() - begun
        begun = time.perf_counter()
        faults = TrajectoryDataset.open(Path(folder) / "d").verify()
        whole = time.perf_counter() - begun
    assert len(heads) == records and not faults
    return {
        "records": records,
        "MB after a tenth": seen[1],
        "MB at the end": seen[-1],
        "records a second": records / made,
        "open and read all headers, s": opened,
        "verify every byte, s": whole,
    }


def raw_states(path: Path, like: Tensor) -> Tensor:
    """The states of a record's file, mapped by hand."""
    size = path.stat().st_size
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return data[size - like.nbytes :].view(like.dtype).view(like.shape)


def bench_access(repeats: int, records: int = 32) -> Result:
    """Records of 6 MB, read in random order into a buffer, and the same with `load_all`."""
    model, given = wan_shape(), analytic_prompts(records)
    spec = RecordSpec(17, 480, 832, steps=5, kept=5)
    with tempfile.TemporaryDirectory() as folder:
        dataset = prepare(model, given, spec, Path(folder) / "d")
        info = dataset.info
        for prompt in given:
            states = seeded_noise((6, *info.shape), prompt.id).bfloat16()
            id = record_id(info.seed, prompt.id, 0)
            dataset.write(Trajectory(id, states, info.times, info.seed, prompt.id, 0))
        order = random.Random(0).choices(dataset.ids(), k=4 * records)
        begun = time.perf_counter()
        buffer = torch.stack([dataset.read(id).latents for id in dataset.ids()])[0].clone()
        first = time.perf_counter() - begun
        ours, raw = [], []
        for _ in range(repeats):
            raw.append(clock(order, lambda id: raw_states(dataset.record_path(id), buffer), buffer))
            ours.append(clock(order, lambda id: dataset.read(id).latents, buffer))
    speed = len(order) * buffer.nbytes / 1e6
    return {
        "read() / raw mapped read": statistics.median(
            b / a for a, b in zip(ours, raw, strict=True)
        ),
        "raw, MB/s": speed / statistics.median(raw),
        "first read with its check, MB/s": records * buffer.nbytes / 1e6 / first,
    }


def clock(order: Sequence[str], read: Callable[[str], Tensor], buffer: Tensor) -> float:
    begun = time.perf_counter()
    for id in order:
        buffer.copy_(read(id))
    return time.perf_counter() - begun


def wan_shape() -> VideoModel:
    """A model that costs nothing, of Wan's latent shape."""
    spec = FAMILIES["wan_t2v"].latent_spec({}, {})
    return replace(gaussian_model(), latent_spec=spec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="pairs per ratio")
    parser.add_argument("--records", type=int, default=10_000, help="of the memory benchmark")
    parser.add_argument("--only", choices=["overhead", "scaling", "memory", "access", "hiding"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "recorder.json")
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options.part)
    torch.set_num_threads(1)
    benches: dict[str, Callable[[], Result]] = {
        "overhead": lambda: bench_overhead(options.repeats),
        "scaling": lambda: bench_scaling(options.repeats),
        "memory": lambda: bench_memory(options.records),
        "access": lambda: bench_access(options.repeats),
        "hiding": lambda: bench_hiding(options.repeats),
    }
    results = {}
    for name in [options.only] if options.only else benches:
        results[name] = benches[name]()
        print(name, flush=True)
        for what, value in results[name].items():
            shown = f"{value:.3f}" if isinstance(value, float) else value
            print(f"  {what:48}{shown:>12}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

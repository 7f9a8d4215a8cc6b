"""Loading a large single file, ours against diffusers' `from_single_file`, side by side in one run.

    python -m benchmarks.loading            files of at least 4 GB, made on the spot and removed
    python -m benchmarks.loading --small    tiny files: shows that it works, and no more

Three files: HunyuanVideo's and Wan 14B's true widths with fewer blocks in bfloat16, and Wan's in
float32, as it was released, loaded as bfloat16. Every load runs in a process of its own. Reported
are seconds until the network is there, seconds until each of its pages has been touched too (a
mapped file is read then), and the highest memory of the process beyond what it had before: all of
it, and the part that is anonymous, which the system cannot drop again. Peaks are in units of the
weights in the target dtype; ours must stay within 1.1. "cold" means that the file was taken out of
the system's cache before. Both sides must end with the same weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.files import Later, write_safetensors  # noqa: E402
from accvideo_core.models import FAMILIES  # noqa: E402
from accvideo_core.models.building import empty  # noqa: E402
from accvideo_core.models.pipeline_folder import diffusers_class  # noqa: E402
from accvideo_core.models.video_model import weight_fingerprint  # noqa: E402

LIMIT = 1.1
TARGET = torch.bfloat16
PAGE = 4096


@dataclass(frozen=True)
class Case:
    """A file to load."""

    name: str
    family: str
    config: dict[str, Any]
    stored: torch.dtype = torch.bfloat16


HUNYUAN: dict[str, Any] = {"num_attention_heads": 24, "num_refiner_layers": 2}
WAN_14B: dict[str, Any] = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
LARGE = (
    Case(
        "HunyuanVideo bf16", "hunyuan_video", {**HUNYUAN, "num_layers": 3, "num_single_layers": 8}
    ),
    Case("Wan 14B bf16", "wan_t2v", {**WAN_14B, "num_layers": 6}),
    Case("Wan 14B fp32 as bf16", "wan_t2v", {**WAN_14B, "num_layers": 3}, torch.float32),
)
SMALL_WAN = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 2}
SMALL = (
    Case("small Wan bf16", "wan_t2v", SMALL_WAN),
    Case("small Wan fp32 as bf16", "wan_t2v", SMALL_WAN, torch.float32),
)


@dataclass(frozen=True)
class Load:
    """One load in a process of its own; memory in bytes beyond what the process had before."""

    seconds: float
    touched: float
    peak: int
    anonymous: int
    weights: int
    fingerprint: str


def random_weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values of about the size that trained weights have; one stretch of noise, repeated."""
    noise = torch.randn(min(2**20, math.prod(shape)), generator=torch.Generator().manual_seed(seed))
    noise *= 0.1 if len(shape) < 2 else math.prod(shape[1:]) ** -0.5
    count = math.prod(shape)
    return noise.to(dtype).repeat(-(-count // len(noise)))[:count].reshape(shape)


def native_shapes(family: str, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network without weights, and its tensors (without values) under their native names."""
    entry = FAMILIES[family]
    module = empty(diffusers_class(entry.transformer_class), config)
    state = entry.key_table(module.config).to_native(module.state_dict())  # type: ignore[arg-type]
    return module, state


def write_native(path: Path, state: dict[str, Tensor], dtype: torch.dtype) -> int:
    """A file of random weights in native names, made one tensor at a time; returns its size."""

    def maker(shape: tuple[int, ...], seed: int) -> Callable[[], Tensor]:
        return lambda: random_weights(shape, dtype, seed)

    tensors: dict[str, Tensor | Later] = {
        name: Later(tuple(x.shape), dtype, maker(tuple(x.shape), i))
        for i, (name, x) in enumerate(state.items())
    }
    write_safetensors(path, tensors)
    return path.stat().st_size


def need_disk(folder: Path, size: float) -> None:
    """Refuse before writing what will not fit."""
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:
        raise SystemExit(
            f"{folder} has {free / 1e9:.1f} GB free and {1.1 * size / 1e9:.1f} GB are needed; "
            "give another folder with --folder"
        )


def status(field: str) -> int:
    """A figure of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if field in line)


class AnonymousPeak(threading.Thread):
    """Looks every few milliseconds, as the system keeps no high-water mark of this one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.before = status("RssAnon")
        self.running = True

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, status("RssAnon"))
            time.sleep(0.005)


def load_ours(path: Path, _config: Path) -> nn.Module:
    from accvideo_core.models.loading import load_teacher

    return load_teacher(path, dtype=TARGET).model.module


def load_theirs(path: Path, config: Path) -> nn.Module:
    name = json.loads((config / "config.json").read_text(encoding="utf-8"))["_class_name"]
    cls = diffusers_class(name)
    return cls.from_single_file(
        str(path), config=str(config), torch_dtype=TARGET, local_files_only=True
    )


SIDES = {"ours": load_ours, "diffusers": load_theirs}


def child(side: str, path: Path, config: Path) -> Load:
    """Load once, in this process, which does nothing else."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    # What is only imported, and the library's own first-time work, is not part of loading.
    cls = json.loads((config / "config.json").read_text(encoding="utf-8"))["_class_name"]
    empty(diffusers_class(cls), {"num_layers": 1})
    import diffusers.loaders.single_file_model  # noqa: F401

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the high-water mark
    before, watch = status("VmRSS"), AnonymousPeak()
    watch.start()
    start = time.perf_counter()
    module = SIDES[side](path, config)
    loaded = time.perf_counter()
    for p in module.parameters():
        p.detach().view(torch.uint8).reshape(-1)[::PAGE].sum()
    touched = time.perf_counter()
    watch.running = False
    watch.join()
    return Load(
        seconds=loaded - start,
        touched=touched - start,
        peak=status("VmHWM") - before,
        anonymous=watch.peak - watch.before,
        weights=sum(p.numel() for p in module.parameters()) * TARGET.itemsize,
        fingerprint=weight_fingerprint(module),
    )


def in_new_process(side: str, path: Path, config: Path, cold: bool) -> Load:
    """One load, the file having been taken out of the system's cache, or put into it, before."""
    with open(path, "rb") as file:
        if cold:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while not cold and file.read(2**24):
            pass
    command = [sys.executable, "-m", "benchmarks.loading", "--child", side, str(path), str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{side} did not load {path.name}:\n{done.stderr}")
    return Load(**json.loads(done.stdout.splitlines()[-1]))


def measure(case: Case, folder: Path, repeats: int, caches: Sequence[bool]) -> list[dict[str, Any]]:
    """The rows of one file, which is made before and removed after; `caches` holds cold or not."""
    module, state = native_shapes(case.family, case.config)
    need_disk(folder, sum(x.numel() for x in state.values()) * case.stored.itemsize)
    path, config = folder / "weights.safetensors", folder / "config"
    module.save_config(config)  # type: ignore[operator]
    try:
        size = write_native(path, state, case.stored)
        print(f"\n{case.name}: {size / 1e9:.2f} GB", flush=True)
        rows = []
        for cold in caches:
            # The sides take turns, so that a drift of the machine favours neither.
            runs: dict[str, list[Load]] = {side: [] for side in SIDES}
            for _ in range(repeats):
                for side, found in runs.items():
                    found.append(in_new_process(side, path, config, cold))
            prints = {load.fingerprint for found in runs.values() for load in found}
            if len(prints) != 1:
                raise RuntimeError(f"{case.name}: the two sides loaded different weights")
            rows += [row(case.name, side, cold, found) for side, found in runs.items()]
            for line in rows[-2:]:
                print(text(line), flush=True)
            print(ratios(*rows[-2:]), flush=True)
        return rows
    finally:
        path.unlink(missing_ok=True)


def row(case: str, side: str, cold: bool, runs: list[Load]) -> dict[str, Any]:
    """Medians of one side; peaks in units of the weights, and the worst of them."""
    first = runs[0]
    return {
        "case": case,
        "side": side,
        "cache": "cold" if cold else "warm",
        "seconds": statistics.median(run.seconds for run in runs),
        "touched": statistics.median(run.touched for run in runs),
        "peak": statistics.median(run.peak / first.weights for run in runs),
        "anonymous": statistics.median(run.anonymous / first.weights for run in runs),
        "worst_peak": max(run.peak / first.weights for run in runs),
        "weights": first.weights,
        "runs": [asdict(run) for run in runs],
    }


HEADER = f"{'':22}{'load s':>9}{'touched s':>11}{'peak x':>9}{'anonymous x':>13}"


def text(row: dict[str, Any]) -> str:
    figures = f"{row['seconds']:9.2f}{row['touched']:11.2f}"
    return f"{row['side']:>14} {row['cache']:7}{figures}{row['peak']:9.3f}{row['anonymous']:13.3f}"


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Ours over theirs."""
    keys, widths = ("seconds", "touched", "peak", "anonymous"), (9, 11, 9, 13)
    found = [ours[key] / theirs[key] if theirs[key] else math.nan for key in keys]
    cells = "".join(f"{value:{width}.3f}" for value, width in zip(found, widths, strict=True))
    return f"{'ratio':>14} {'':7}{cells}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny files, one warm run, no limit")
    parser.add_argument("--only", default="", help="part of the names of the files to load")
    parser.add_argument("--repeats", type=int, default=3, help="loads per side, cold and warm")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: temporary)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench_loading.json")
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "FILE", "CONFIG"), help="internal")
    options = parser.parse_args()
    if options.child:
        side, path, config = options.child
        print(json.dumps(asdict(child(side, Path(path), Path(config)))))
        return 0
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory(prefix="loading-", dir=options.folder) as folder:
        cases = [case for case in (SMALL if options.small else LARGE) if options.only in case.name]
        plan = (1, (False,)) if options.small else (options.repeats, (True, False))
        rows = [row for case in cases for row in measure(case, Path(folder), *plan)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"torch": torch.__version__, "limit": LIMIT, "rows": rows}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    over = [r for r in rows if r["side"] == "ours" and r["worst_peak"] > LIMIT]
    if options.small:
        return 0  # of a tiny file, the process's own overhead is most
    for r in over:
        print(f"{r['case']}, {r['cache']}: peak {r['worst_peak']:.3f} is over the limit {LIMIT}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())

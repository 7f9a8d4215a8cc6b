"""Loading and running networks of the released sizes on a GPU, in bfloat16 and scaled fp8.

    python -m benchmarks.gpu_loading --folder /fast/disk

HunyuanVideo 13B and Wan 14B with random weights, written to disk as single files in native names
(28 GB and less, one at a time, removed afterwards) and loaded onto the GPU by `load_teacher`.
Reported are seconds to load (the file in the system's cache), peak memory of host and GPU, seconds
per forward pass at 544 x 960 x 93 frames (HunyuanVideo) and 480 x 832 x 81 (Wan), and the largest
difference of the fp8 network's velocity from the bfloat16 one's, relative to the largest velocity.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.conditioning import Condition  # noqa: E402
from accvideo_core.files import Later, write_safetensors  # noqa: E402
from accvideo_core.latents import seeded_noise  # noqa: E402
from accvideo_core.models import VideoModel  # noqa: E402
from accvideo_core.models.loading import load_teacher  # noqa: E402
from benchmarks.loading import native_shapes, need_disk, random_weights, status  # noqa: E402
from benchmarks.released import HUNYUAN_VIDEO, WAN, Released  # noqa: E402

E4M3 = torch.float8_e4m3fn
FP8_LARGEST = 448.0


CASES = (HUNYUAN_VIDEO, WAN)


def linear(name: str, x: Tensor) -> bool:
    return name.endswith(".weight") and x.dim() == 2


def packed(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """A linear weight in ComfyUI's scaled fp8: numbers and their scale."""
    x = random_weights(shape, torch.bfloat16, seed).float()
    scale = x.abs().max() / FP8_LARGEST
    return (x / scale).to(E4M3), scale


def tensors(state: dict[str, Tensor], fp8: bool) -> Iterator[tuple[str, Tensor | Later]]:
    """What goes into a file; the same seed gives a weight the same values in both formats."""
    for seed, (name, x) in enumerate(state.items()):
        shape = tuple(x.shape)
        if fp8 and linear(name, x):
            yield name, Later(shape, E4M3, lambda shape=shape, seed=seed: packed(shape, seed)[0])
            yield name.removesuffix("weight") + "scale_weight", packed(shape, seed)[1]
        else:
            yield (
                name,
                Later(
                    shape,
                    torch.bfloat16,
                    lambda shape=shape, seed=seed: random_weights(shape, torch.bfloat16, seed),
                ),
            )
    if fp8:
        yield "scaled_fp8", torch.zeros(2, dtype=E4M3)


def question(case: Released, model: VideoModel) -> tuple[Tensor, Condition]:
    """Latents [1, C, T, H, W] and a prompt on the GPU."""
    shape = (1, *model.latent_spec.shape(case.frames, case.height, case.width))
    cond = case.condition()
    cond = cond if model.family.guidance is None else cond.with_guidance(model.family.guidance)
    return seeded_noise(shape, "latents").to("cuda"), cond.to("cuda")


@torch.inference_mode()
def forward(case: Released, model: VideoModel, repeats: int) -> tuple[Tensor, float]:
    """The velocity on the CPU, and the median of the seconds per forward pass after a first one."""
    x, cond = question(case, model)
    seconds, v = [], x
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        v = model.velocity(x, 0.5, cond)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return v.float().cpu(), statistics.median(seconds[1:])


def measure(case: Released, fp8: bool, folder: Path, repeats: int) -> tuple[dict[str, Any], Tensor]:
    """One file: written, loaded, asked, removed."""
    _, state = native_shapes(case.family, case.config)
    need_disk(folder, sum(x.numel() for x in state.values()) * (1.1 if fp8 else 2))
    path = folder / "weights.safetensors"
    try:
        write_safetensors(path, dict(tensors(state, fp8)))
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before, start = status("VmRSS"), time.perf_counter()
        model = load_teacher(path, device="cuda", dtype=torch.bfloat16).model
        torch.cuda.synchronize()
        load = time.perf_counter() - start
        host, weights = status("VmHWM") - before, torch.cuda.max_memory_allocated()
        v, seconds = forward(case, model, repeats)
        return {
            "case": case.name,
            "format": "scaled fp8" if fp8 else "bf16",
            "file_gb": path.stat().st_size / 1e9,
            "load_s": load,
            "host_peak_gb": host / 1e9,
            "gpu_weights_gb": weights / 1e9,
            "gpu_peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "forward_s": seconds,
            "fp8_error": None,
        }, v
    finally:
        path.unlink(missing_ok=True)


COLUMNS = (
    *(("file_gb", "file GB"), ("load_s", "load s"), ("host_peak_gb", "host peak GB")),
    *(("gpu_weights_gb", "GPU loading GB"), ("gpu_peak_gb", "GPU peak GB")),
    *(("forward_s", "forward s"), ("fp8_error", "fp8 error")),
)


def text(row: dict[str, Any]) -> str:
    cells = ("" if row[key] is None else f"{row[key]:.3f}" for key, _ in COLUMNS)
    names = (name for _, name in COLUMNS)
    joined = "".join(f"{c:>{len(n) + 2}}" for c, n in zip(cells, names, strict=True))
    return f"{row['case']:18}{row['format']:11}{joined}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="forward passes that are timed")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: temporary)")
    parser.add_argument("--only", default="", help="part of the names of the networks to load")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench_gpu_loading.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA GPU is present")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(f"{torch.cuda.get_device_name()}\n{'':29}" + "".join(f"  {n}" for _, n in COLUMNS))
    rows = []
    with tempfile.TemporaryDirectory(prefix="loading-", dir=options.folder) as folder:
        for case in (case for case in CASES if options.only in case.name):
            row, reference = measure(case, False, Path(folder), options.repeats)
            print(text(row), flush=True)
            fp8, v = measure(case, True, Path(folder), options.repeats)
            fp8["fp8_error"] = float((v - reference).abs().max() / reference.abs().max())
            print(text(fp8), flush=True)
            rows += [row, fp8]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

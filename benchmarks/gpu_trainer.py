"""Adversarial LoRA training of networks of the released sizes on a GPU.

    python -m benchmarks.trainer --gpu               or  python -m benchmarks.gpu_trainer
    python -m benchmarks.gpu_trainer --small         tiny networks: shows that it works

HunyuanVideo 13B at 544 x 960 x 93 and Wan 14B at 480 x 832 x 81, random weights, LoRA of rank 32,
trajectory guidance and the adversarial term, one clip a batch, activations recomputed: in bfloat16,
and with the base in fp8 and most blocks swapped. Reported are the highest memory that PyTorch held
on the GPU while training, seconds per update (the mean of one sweep over the key times, after a
first update), the floating-point operations that an update performed (matrix products, attention
and convolutions, recomputation included), and their rate as a share of a large bfloat16 matrix
product's on the same card.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.conditioning import Prompt  # noqa: E402
from accvideo_core.distill.recipes import Recipe  # noqa: E402
from accvideo_core.distill.student import LoraSpec  # noqa: E402
from accvideo_core.distill.trainer import distill  # noqa: E402
from accvideo_core.guidance import Cfg  # noqa: E402
from accvideo_core.models import FAMILIES, VideoModel  # noqa: E402
from accvideo_core.models.building import empty  # noqa: E402
from accvideo_core.models.packing import pack_weights  # noqa: E402
from accvideo_core.models.pipeline_folder import diffusers_class  # noqa: E402
from accvideo_core.profiling.counting import Operations  # noqa: E402
from accvideo_core.profiling.peaks import measure_peaks  # noqa: E402
from accvideo_core.trajectories.record import RecordSpec, record  # noqa: E402
from accvideo_core.trajectories.store import TrajectoryDataset  # noqa: E402
from benchmarks.released import HUNYUAN_VIDEO, WAN, Released  # noqa: E402

STEPS = 5
GB = 1e9


@dataclass(frozen=True)
class Case:
    """A network and how it is trained."""

    network: Released
    swapped: int
    """Blocks that wait in main memory in the second setting."""
    rank: int = 32


CASES = (Case(HUNYUAN_VIDEO, swapped=40), Case(WAN, swapped=28))
_SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}
SMALL = (
    Case(
        Released("small HunyuanVideo", "hunyuan_video", _SMALL, 5, 32, 32, (6, 24), 20),
        swapped=2,
        rank=4,
    ),
)


def make_model(network: Released, device: torch.device) -> VideoModel:
    """The network on the device in bfloat16 (float32 on a CPU), its weights random."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    family = FAMILIES[network.family]
    module = empty(diffusers_class(family.transformer_class), network.config)
    # Tables of positions are real already and stay as they are.
    tables = {name: x.to(device) for name, x in module.named_buffers() if not x.is_meta}
    module = module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.data = p.data.to(dtype)
            scale = 0.1 if p.dim() < 2 else p[0].numel() ** -0.5
            p.normal_(0, scale, generator=generator)
        for name, x in tables.items():
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, x)
    spec = family.latent_spec(module.config, {})
    return VideoModel(module.eval().requires_grad_(False), family, spec, source=network.name)


def make_dataset(network: Released, model: VideoModel, folder: Path) -> TrajectoryDataset:
    """One trajectory of as many steps as the student takes."""
    spec = RecordSpec(
        network.frames, network.height, network.width, steps=STEPS, kept=STEPS, cfg=Cfg(1.0)
    )
    prompt = Prompt.of("clip", network.condition())
    return record(model, [prompt], replace(spec, batch_size=1), folder)


def measure(case: Case, fp8: bool, device: torch.device, rate: float) -> dict[str, Any]:
    """One setting of one network: trained for a sweep, and measured."""
    model = make_model(case.network, device)
    recipe = Recipe(
        name="bench",
        adversarial=True,
        lora=LoraSpec(rank=case.rank),
        student_steps=STEPS,
        train_steps=STEPS + 2,
        batch_size=1,
        gradient_checkpointing=True,
        swap_blocks=case.swapped if fp8 else 0,
    )
    marks: list[tuple[float, int]] = []
    counted = Operations()

    def mark(_progress: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append((time.perf_counter(), counted.cost.flops))

    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(case.network, model, Path(folder) / "data")
        if fp8:
            model = pack_weights(model, "fp8")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with counted:
            distill(model, dataset, recipe, Path(folder) / "run", monitor=mark)
    (start, before), (end, after) = marks[0], marks[STEPS]  # after the last, a checkpoint follows
    seconds, operations = (end - start) / STEPS, (after - before) / STEPS
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "case": case.network.name,
        "setting": f"fp8, {case.swapped} blocks swapped" if fp8 else "bf16",
        "peak_gb": peak / GB,
        "update_s": seconds,
        "teraflop": operations / 1e12,
        "share": operations / seconds / rate,
    }


def text(row: dict[str, Any]) -> str:
    figures = f"{row['peak_gb']:9.1f}{row['update_s']:11.2f}{row['teraflop']:11.3g}"
    return f"{row['case']:20}{row['setting']:26}{figures}{row['share']:8.1%}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the networks to train")
    parser.add_argument("--small", action="store_true", help="tiny networks, on a CPU as well")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench_gpu_trainer.json")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        print("skipped: no CUDA GPU is present")
        return 0
    logging.disable(logging.WARNING)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rate = measure_peaks(device, torch.bfloat16).flops
    print(f"{name}: {rate / 1e12:.3g} TFLOP/s in a bfloat16 matrix product")
    print(f"{'':46}{'peak GB':>9}{'update s':>11}{'TFLOP':>11}{'share':>8}")
    rows = []
    cases = SMALL if options.small else CASES
    for case in (case for case in cases if options.only in case.network.name):
        for fp8 in (False, True):
            rows.append(measure(case, fp8, device, rate))
            print(text(rows[-1]), flush=True)
            gc.collect()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"device": name, "torch": torch.__version__, "matrix_rate": rate, "rows": rows}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

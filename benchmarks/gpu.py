"""What a GPU makes of it: `python -m benchmarks.gpu`, with random weights in the released shapes.

    python -m benchmarks.gpu --models "HunyuanVideo 13B 720"    one of them
    python -m benchmarks.gpu --rows ours --models Wan           some rows of some
    python -m benchmarks.gpu --tiny                             tiny models, on a CPU as well

For every model: diffusers' own pipeline as it ships at its official steps and at a student's, and
ours dense in bfloat16, then with torch.compile, fp8 linear layers, sparse attention and a tiny
decoder, each on top of those before. A denoising is timed over three steps, of which the first
only warms up, and scaled to all of them. Text is encoded once, by the same encoders for all rows. A
student has no guidance; the teacher's row has the family's own, and `cfg step` is what a step of
ours costs with it. `share` is of the card's rate in a bfloat16 product of 8192 x 8192, measured in
the same call; operations are those of the dense network, also where a row skips some.

Results are kept in a file after every row, and a later call adds to it, so that a table can be
measured in calls of a few minutes. A row that fails says why and the next one begins.
"""

from __future__ import annotations

import argparse
import gc
import logging
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.guidance import Guided  # noqa: E402
from accvideo_core.latents import seeded_noise  # noqa: E402
from accvideo_core.models import VideoModel  # noqa: E402
from accvideo_core.models.vae import VideoVAE  # noqa: E402
from accvideo_core.profiling import measure_peaks  # noqa: E402
from accvideo_core.profiling.counting import call_of  # noqa: E402
from accvideo_core.profiling.timeline import Timeline  # noqa: E402
from accvideo_core.sampling import sample  # noqa: E402
from accvideo_core.speed import Speed, sped_up  # noqa: E402
from benchmarks import gpu_cases  # noqa: E402
from benchmarks.gpu_cases import CASES, PROMPT, TINY, Case  # noqa: E402
from benchmarks.gpu_table import (  # noqa: E402
    HEADER,
    Figures,
    Table,
    line,
    read,
    targets,
    told,
    write,
)

MEASURED = 3
"""Steps that are run, the first of which warms up."""
BACKEND = "inductor"
"""Of torch.compile."""
RESULTS = ROOT / "build" / "bench_gpu.json"


class Bench:
    """One model on the device, with its prompt encoded."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        texts = gpu_cases.text_encoders(case, device, self.dtype)
        vae = case.vae_module(device, self.dtype)
        module = case.module(device, self.dtype)
        self.pipeline = gpu_cases.pipeline(case, module, vae, texts)
        self.model = VideoModel(module, case.family, case.spec(module, vae), source=case.name)
        self.noise = seeded_noise((1, *case.shape(self.model.latent_spec)), "noise").to(device)
        encoded = partial(gpu_cases.conditions, case, self.pipeline, self.model.latent_spec, device)
        encoded()
        self.text_s, (self.condition, self.negative) = timed(device, encoded)
        call = call_of(module, lambda: self.model.velocity(self.noise, 0.5, self.condition))
        self.step_flops = call.cost().flops
        self.known: dict[str, Any] = {}
        """What several rows share, once it was measured."""

    def release_text_encoders(self) -> None:
        """Ours leave the device before sampling; diffusers' pipelines keep theirs."""
        self.pipeline.register_modules(**dict.fromkeys(self.case.text))
        clear(self.device)

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self.known:
            self.known[name] = measure()
        return self.known[name]


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    timeline = Timeline(device)
    start = timeline.mark()
    result = work()
    end = timeline.mark()
    timeline.wait()
    return timeline.seconds(start, end), result


def clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


class Marks:
    """A mark after every step of a denoising."""

    def __init__(self, device: torch.device) -> None:
        self.timeline = Timeline(device)
        self.marks: list[int] = []

    def __call__(self, *_: object) -> None:
        self.marks.append(self.timeline.mark())

    @property
    def seconds(self) -> float:
        """Of a step, the first left out."""
        self.timeline.wait()
        return self.timeline.seconds(self.marks[0], self.marks[-1]) / (len(self.marks) - 1)


# diffusers ------------------------------------------------------------------------------------


def diffusers_row(bench: Bench, steps: int, guidance: bool) -> Figures:
    """diffusers' pipeline, everything of it on the device."""
    step_s = bench.once(f"diffusers {guidance}", lambda: diffusers_step(bench, guidance))
    decode_s, note = bench.once("diffusers decode", lambda: diffusers_decode(bench))
    asked = 2 if guidance and bench.case.family.cfg else 1
    return {
        "steps": steps,
        "step_s": step_s,
        "vae_s": decode_s,
        "flops": asked * bench.step_flops,
        "note": note,
    }


def diffusers_step(bench: Bench, guidance: bool) -> float:
    """Seconds of a step after the first."""
    case, pipe, marks = bench.case, bench.pipeline, Marks(bench.device)

    def stepped(_pipe: Any, number: int, _time: Any, given: Figures) -> Figures:
        marks()
        pipe._interrupt = number + 1 >= MEASURED  # it goes through the other steps doing nothing
        return given

    plan = case.plan
    pipe(
        **gpu_cases.pipeline_inputs(case, PROMPT, guidance),
        num_frames=plan.frames,
        height=plan.height,
        width=plan.width,
        num_inference_steps=case.family.steps,
        output_type="latent",
        callback_on_step_end=stepped,
    )
    return marks.seconds


def diffusers_decode(bench: Bench) -> tuple[float, str]:
    """(seconds, what had to be done for it)."""
    spec, vae = bench.model.latent_spec, bench.pipeline.vae
    z = spec.from_model(bench.noise).to(bench.dtype)

    def decode() -> None:
        with torch.no_grad():
            vae.decode(z, return_dict=False)[0].float().cpu()

    try:
        return timed(bench.device, decode)[0], ""
    except torch.OutOfMemoryError:
        clear(bench.device)
    vae.enable_tiling()
    try:
        return timed(bench.device, decode)[0], "VAE tiled, because it does not fit as it ships"
    finally:
        vae.disable_tiling()


# Ours -----------------------------------------------------------------------------------------


def our_row(bench: Bench, speed: Speed, tiny: bool = False, cfg: bool = False) -> Figures:
    """Ours; `cfg` adds what a step of a teacher costs that is asked about a negative prompt too."""
    steps = bench.case.steps
    step_s, latents = our_steps(bench, speed)
    figures: Figures = {"steps": steps, "step_s": step_s, "flops": bench.step_flops}
    dense = bench.known.setdefault("latents", latents)
    if speed.inexact:
        apart, moved = (latents - dense).norm(), (dense - bench.noise).norm()
        figures["error"] = float(apart / moved)
    if cfg and bench.case.family.cfg is not None:
        guided = Guided(bench.model, bench.negative, bench.case.family.cfg)
        figures["cfg_step_s"] = our_steps(bench, speed, guided)[0]
    name = "tiny decode" if tiny else "decode"
    figures["vae_s"] = bench.once(name, lambda: our_decode(bench, tiny))
    return figures


def our_steps(bench: Bench, speed: Speed, guided: Guided | None = None) -> tuple[float, Tensor]:
    """(seconds of a step after the first, latents after the measured steps)."""
    marks = Marks(bench.device)
    times = bench.case.family.time_grid(bench.case.steps)[: MEASURED + 1]
    with sped_up(bench.model, speed, backend=BACKEND) as fast:
        asked = fast if guided is None else replace(guided, model=fast, batched=speed.cfg_batch)
        latents = sample(asked, bench.condition, bench.noise, times, marks)
    return marks.seconds, latents


def our_decode(bench: Bench, tiny: bool) -> float:
    """Seconds of making frames in main memory; a first, small clip chooses kernels."""
    spec = bench.model.latent_spec
    decoder: Any = VideoVAE(bench.pipeline.vae, spec)
    if tiny:
        decoder = gpu_cases.tiny_decoder(bench.case, bench.model)
    decoder.decode(bench.noise[:, :, :2, :8, :8])
    return timed(bench.device, lambda: decoder.decode(bench.noise))[0]


COMPILED = Speed(compile=True)
FP8 = replace(COMPILED, fp8=True)
SPARSE = replace(FP8, sparse="radial")

ROWS: dict[str, Callable[[Bench], Figures]] = {
    "diffusers, teacher": lambda b: diffusers_row(b, b.case.family.steps, guidance=True),
    "diffusers, student": lambda b: diffusers_row(b, b.case.steps, guidance=False),
    "ours": lambda b: our_row(b, Speed(), cfg=True),
    "ours + compile": lambda b: our_row(b, COMPILED, cfg=True),
    "ours + compile, fp8": lambda b: our_row(b, FP8),
    "ours + compile, fp8, sparse": lambda b: our_row(b, SPARSE),
    "ours + all, tiny decoder": lambda b: our_row(b, SPARSE, tiny=True),
}
"""In the order in which they are measured; diffusers' first, while its text encoders are there."""


# The run --------------------------------------------------------------------------------------


def measure(name: str, bench: Bench, rate: float) -> Figures:
    """A row, or why there is none."""
    if name.startswith("ours"):
        bench.release_text_encoders()
    clear(bench.device)
    try:
        row = ROWS[name](bench)
    except Exception as error:  # a row that fails must not take the others away
        return {"failed": reason(error)}
    on_gpu = bench.device.type == "cuda"
    row["memory"] = torch.cuda.max_memory_allocated(bench.device) if on_gpu else None
    row["text_s"] = bench.text_s
    row["denoise_s"] = row["steps"] * row["step_s"]
    row["total_s"] = row["text_s"] + row["denoise_s"] + row["vae_s"]
    row["share"] = row["flops"] / row["step_s"] / rate
    return row


def reason(error: BaseException) -> str:
    """One line of it."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def run(case: Case, rows: Sequence[str], device: torch.device, until: float, out: Path) -> None:
    """Measure rows of a model, each written down at once."""
    report = read(out)
    rate = report["peaks"]["flops"]
    table: Table = report["models"]
    kept = table.setdefault(case.label, {})
    print(f"\n{case.label}\n{HEADER}", flush=True)
    try:
        bench = Bench(case, device)
    except Exception as error:
        kept.update({name: {"failed": reason(error)} for name in rows})
        print(reason(error), flush=True)
        write(out, report)
        return
    for name in rows:
        if time.monotonic() > until:
            print(f"{name:42}  no time is left for it; call again with --rows", flush=True)
            continue
        kept[name] = measure(name, bench, rate)
        teacher = kept.get("diffusers, teacher", {})
        print(line(name, kept[name], teacher if "total_s" in teacher else None), flush=True)
        write(out, report)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="", help="beginning of the names of models")
    parser.add_argument("--rows", default="", help="beginning of the names of rows")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on a CPU as well")
    parser.add_argument("--seconds", type=float, default=480, help="no row begins after (480)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="what earlier calls measured too")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        print("skipped: no CUDA GPU is present")
        return 0
    begun = time.monotonic()
    logging.disable(logging.WARNING)
    peaks = measure_peaks(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    report = read(options.out)
    report["peaks"] = asdict(peaks)
    report["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    write(options.out, report)
    product = f"{peaks.flops / 1e12:.4g} TFLOP/s in a {peaks.dtype} product of {peaks.size} squared"
    print(f"{peaks.device}: {product}, {peaks.bytes / 1e12:.3g} TB/s in a copy", flush=True)
    rows = [name for name in ROWS if name.startswith(options.rows)]
    for case in TINY if options.tiny else CASES:
        if case.label.startswith(options.models):
            run(case, rows, device, begun + options.seconds, options.out)
            clear(device)
    print("\ntargets")
    for target in targets(read(options.out)["models"]):
        print(told(target))
    return 0


if __name__ == "__main__":
    sys.exit(main())

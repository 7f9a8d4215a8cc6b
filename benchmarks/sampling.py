"""What sampling costs over the bare work, and beside others: `python -m benchmarks.sampling`.

    loop       sample() against the network's forward passes alone                     <= 1.02 x
    pipelines  a clip against diffusers' HunyuanVideoPipeline and WanPipeline          <= 0.90 x
    memory     of a process that loads one of these and makes a clip                   <= 1.00 x
    official   the network against AccVideo's own code (--official FOLDER)             <= 1/1.2 x
    steps      what a step costs after many against what it costs after few            <= 1.05 x
    tokens     how time grows with tokens, beside floating-point operations
    speed      each setting that makes sampling faster, against none of them

Both sides of a ratio run in turn, several times; the figure is the median of the pairs' ratios, and
beside the wall clock stands the same ratio in CPU seconds. Where both sides give a result, the
largest difference between them is told, as a part of the largest value; a difference beyond 1e-3
makes a row fail whatever its ratio. Networks are random and of diffusers' own classes.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.conditioning import Condition  # noqa: E402
from accvideo_core.flow import time_grid  # noqa: E402
from accvideo_core.guidance import Cfg, Guided  # noqa: E402
from accvideo_core.models import VideoModel  # noqa: E402
from accvideo_core.profiling.counting import call_of  # noqa: E402
from accvideo_core.sampling import SamplePlan, sample  # noqa: E402
from accvideo_core.speed import Speed, sped_up  # noqa: E402
from benchmarks.bench import timed  # noqa: E402
from benchmarks.sampling_cases import Case, cases, hunyuan, parameters  # noqa: E402
from benchmarks.sampling_pipelines import SIDES, OurClip, diffusers_clip, peak  # noqa: E402
from benchmarks.sampling_rows import (  # noqa: E402
    HEADER,
    NO_AIM,
    Options,
    Result,
    against,
    line,
    write,
)

STEPS = 5


# The loop -------------------------------------------------------------------------------------


def network_inputs(case: Case, cond: Condition) -> dict[str, Any]:
    """What the bare network wants besides latents and time."""
    missing = case.padded - cond.text.shape[1]
    if case.family == "wan_t2v":
        return {"encoder_hidden_states": torch.nn.functional.pad(cond.text, (0, 0, 0, missing))}
    return {
        "encoder_hidden_states": cond.text,
        "encoder_attention_mask": cond.full_mask(),
        "pooled_projections": cond.pooled,
        "guidance": torch.full((1,), 6000.0),
    }


@torch.no_grad()
def forwards(case: Case, module: Any, conds: Sequence[Condition], steps: int) -> None:
    """As many passes of the bare network as a sampler needs."""
    inputs, noise = [network_inputs(case, cond) for cond in conds], case.noise()
    for t in time_grid(steps, 5.0)[:-1]:
        for given in inputs:
            timestep = torch.full((1,), 1000 * t)
            module(hidden_states=noise, timestep=timestep, **given, return_dict=False)


def bench_loop(options: Options) -> list[Result]:
    """sample() against as many passes, with and without guidance."""
    results = []
    for case in cases(options.quick).values():
        case = case if options.quick else shorter(case)
        model, cond, negative = case.model(), case.condition(), case.condition(9, "negative")
        asked: list[tuple[str, Any, list[Condition]]] = [("", model, [cond])]
        if case.family == "wan_t2v":
            both = Guided(model, negative, Cfg(5.0))
            asked.append((", guidance", both, [cond, negative]))
        for name, how, conds in asked:
            results.append(
                against(
                    f"{case.family}{name}: sample / forwards",
                    1.02,
                    options.repeats,
                    partial(in_silence, how, cond, case.noise(), time_grid(STEPS, 5.0)),
                    partial(forwards, case, model.module, conds, STEPS),
                    tokens=case.tokens,
                )
            )
    return results


def in_silence(*given: Any) -> None:
    """sample(), whose result nothing is to be compared with."""
    sample(*given)


# Pipelines ------------------------------------------------------------------------------------


def bench_pipelines(options: Options) -> list[Result]:
    """Whole clips. Ours keep the encoded prompt; what encoding takes is told beside."""
    results = []
    for family, case in cases(options.quick).items():
        with tempfile.TemporaryDirectory(prefix="sampling-") as name:
            folder = case.save(Path(name) / "pipeline")
            ours = OurClip(case, folder, STEPS)
            facts = {
                "tokens": case.tokens,
                "text": ours.prompt.condition.text.shape[1],
                "padded_text": case.padded,
                "parameters_m": parameters(ours.teacher.model.module),
                "encode_s": timed(ours.encode)[0],
            }
            theirs = diffusers_clip(case, folder, STEPS)
            compiled = OurClip(case, folder, STEPS, "eager" if options.quick else "inductor")
            for name, side in (("clip", ours), ("clip, compiled", compiled)):
                title = f"{family}: {name} / diffusers"
                results.append(against(title, 0.9, options.repeats, side, theirs, **facts))
    return results


def bench_memory(options: Options) -> list[Result]:
    """Whole clips, from loading on, each in a process of its own."""
    if sys.platform != "linux":
        logging.warning("memory: skipped, because it is read from /proc")
        return []
    results = []
    for family, case in cases(options.quick).items():
        with tempfile.TemporaryDirectory(prefix="sampling-") as name:
            folder = case.save(Path(name) / "pipeline")
            ours, theirs = (peak(side, family, folder, options.quick) / 1e6 for side in SIDES)
        sides = {"ours": ours, "theirs": theirs, "unit": "MB"}
        results.append(Result(f"{family}: memory / diffusers", ours / theirs, 1.0, **sides))
    return results


def bench_official(options: Options) -> list[Result]:
    """The network against AccVideo's own code."""
    if options.official is None:
        logging.warning("official: skipped, because no folder was given (--official FOLDER)")
        return []
    from benchmarks.official_sampling import bench

    return bench(options)


# Growth ---------------------------------------------------------------------------------------


def bench_steps(options: Options) -> list[Result]:
    """Seconds of sampling against the number of steps: the slope of the later half is the former's.

    In one run the numbers of steps take turns, and each has the median of its repeats.
    """
    case = (
        hunyuan(32, SamplePlan(5, 32, 32)) if options.quick else hunyuan(128, SamplePlan(9, 64, 64))
    )
    model, cond, noise = case.model(), case.condition(), case.noise()
    counts = (1, 2, 4) if options.quick else (1, 2, 5, 10, 25, 50)
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    sample(model, cond, noise, time_grid(1))
    for _ in range(options.repeats):
        for count in counts:
            seconds[count].append(
                timed(partial(in_silence, model, cond, noise, time_grid(count, 5.0)))[0]
            )
    medians = {count: statistics.median(found) for count, found in seconds.items()}
    middle = len(counts) // 2
    early, late = slope(medians, counts[: middle + 1]), slope(medians, counts[middle:])
    facts = {"seconds": medians, "fixed_s": medians[counts[0]] - counts[0] * slope(medians, counts)}
    name = "a late step / an early step"
    return [Result(name, late / early, 1.05, ours=late, theirs=early, facts=facts)]


def slope(points: dict[int, float], at: Sequence[float]) -> float:
    """Of the line that fits best (least squares)."""
    return fit([float(x) for x in at], [points[int(x)] for x in at])[0]


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(slope, root mean square of what is left) of the line that fits best."""
    line = statistics.linear_regression(xs, ys)
    rest = [y - line.slope * x - line.intercept for x, y in zip(xs, ys, strict=True)]
    return line.slope, math.sqrt(statistics.fmean(r * r for r in rest))


def bench_tokens(options: Options) -> list[Result]:
    """Seconds and operations of a step from a thousand to 64 thousand tokens, on a narrow network.

    An exponent is the slope of the logarithms; of all sizes, and of the last doubling alone, where
    attention outweighs the rest.
    """
    sizes = [(5, 32, 32), (5, 48, 48), (9, 64, 64)]
    if not options.quick:
        sizes = [(13, 128, 128), (29, 128, 128), (61, 128, 128), (61, 128, 256), (61, 256, 256)]
        sizes += [(125, 256, 256), (253, 256, 256)]
    rows: list[dict[str, float]] = []
    for frames, height, width in sizes:
        case = hunyuan(32, SamplePlan(frames, height, width), num_layers=1, num_single_layers=1)
        model, cond, noise = case.model(), case.condition(), case.noise()
        repeats = 3 if case.tokens < 20_000 else 1
        times = (1.0, 0.0)
        took = [timed(partial(in_silence, model, cond, noise, times))[0] for _ in range(repeats)]
        flops = step_operations(model, cond, noise)
        rows.append({"tokens": case.tokens, "seconds": min(took), "flops": flops})
    results = []
    for name, chosen in (("all sizes", rows), ("the last doubling", rows[-2:])):
        logs = {key: [math.log(row[key]) for row in chosen] for key in rows[0]}
        ours, counted = (fit(logs["tokens"], logs[key])[0] for key in ("seconds", "flops"))
        facts = {"rows": chosen} if chosen is rows else {}
        sides = {"ours": ours, "theirs": counted, "unit": "exponent"}
        results.append(
            Result(
                f"time ~ tokens^a, {name}: a / operations'", ours / counted, **sides, facts=facts
            )
        )
    return results


def step_operations(model: VideoModel, cond: Condition, noise: Tensor) -> int:
    """Floating-point operations of one step."""
    return call_of(model.module, lambda: model.velocity(noise, 0.5, cond)).cost().flops


# Settings -------------------------------------------------------------------------------------


SPEEDS: dict[str, Speed] = {
    "the defaults": Speed(),
    "compile": Speed(compile=True),
    "fp8": Speed(fp8=True),
    "sparse radial": Speed(sparse="radial"),
    "half of the blocks swapped": Speed(swap_blocks=3),
    "guidance in one batch": Speed(cfg_batch="batched"),
}
"""Each alone, so that it is seen what it does."""


def bench_speed(options: Options) -> list[Result]:
    """Each setting against a model of the same weights without any."""
    results = []
    backend = "eager" if options.quick else "inductor"
    for family, whole in cases(options.quick).items():
        case = whole if options.quick else shorter(whole)
        for name, speed in SPEEDS.items():
            if speed.cfg_batch == "auto" or case.family == "wan_t2v":
                title = f"{family}: {name} / plain"
                results.append(with_speed(title, case, speed, options.repeats, backend))
    return results


def with_speed(title: str, case: Case, speed: Speed, repeats: int, backend: str) -> Result:
    """Two steps; what changes results by more than rounding has its error told and no limit."""
    cond, negative, times = case.condition(), case.condition(20, "negative"), (1.0, 0.5, 0.0)

    def work(model: VideoModel, batched: str) -> Tensor:
        guided = batched != "auto"
        asked = Guided(model, negative, Cfg(5.0), batched) if guided else model
        return sample(asked, cond, case.noise(), times)

    speed = replace(speed, swap_blocks=min(speed.swap_blocks, case.model().num_blocks))
    plain = "auto" if speed.cfg_batch == "auto" else "in turn"
    with sped_up(case.model(), speed, backend=backend) as fast:
        row = against(
            title,
            NO_AIM,
            repeats,
            partial(work, fast, speed.cfg_batch),
            partial(work, case.model(), plain),
            tokens=case.tokens,
        )
    if not speed.inexact:
        return row
    return replace(row, difference=None, facts={**row.facts, "error": row.difference})


def shorter(case: Case) -> Case:
    """Fewer tokens, whose steps show more of what is around the network."""
    return replace(case, plan=SamplePlan(9, case.plan.height // 2, case.plan.width // 2))


# The table ------------------------------------------------------------------------------------


BENCHES: dict[str, Callable[[Options], list[Result]]] = {
    "loop": bench_loop,
    "pipelines": bench_pipelines,
    "memory": bench_memory,
    "official": bench_official,
    "steps": bench_steps,
    "tokens": bench_tokens,
    "speed": bench_speed,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=BENCHES, help="(all of them)")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that everything works")
    parser.add_argument("--official", type=Path, help="folder of a checkout of AccVideo")
    parser.add_argument("--repeats", type=int, default=7, help="pairs per ratio (7)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (torch's own choice)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench_sampling.json")
    given = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    if given.threads:
        torch.set_num_threads(given.threads)
    options = Options(given.quick, 1 if given.quick else given.repeats, given.official)
    print(HEADER, flush=True)
    rows: list[Result] = []
    for name in given.only or BENCHES:
        for row in BENCHES[name](options):
            print(line(row), flush=True)
            rows.append(row)
        write(given.out, rows)  # what a later bench does cannot take it away
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What sparse attention costs in accuracy and saves in time, on this machine, as tables.

    python -m scripts.sparse_error                    what docs/sampling_speed.md shows
    python -m scripts.sparse_error --frames 24 48 --heads 4

The error is that of one velocity against dense attention, |v - v_dense| / |v_dense|, the largest
over the times asked. The networks are tiny and random, whose attention is nearly even and falls
with no distance, which is the worst case for a pattern of near tokens; and the embedded teacher,
which is trained. Blocks are smaller there than on a GPU, for there are few tokens. None of it says
how a video of a large model looks.

Shapes: N tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.conditioning import Condition  # noqa: E402
from accvideo_core.latents import seeded_noise  # noqa: E402
from accvideo_core.models.attention import attention  # noqa: E402
from accvideo_core.models.kernels import KERNELS  # noqa: E402
from accvideo_core.models.loading import load_teacher  # noqa: E402
from accvideo_core.models.sparse import (  # noqa: E402
    Grid,
    Radial,
    block_mask,
    computed_share,
)
from accvideo_core.models.tiny import embedded_teacher_path  # noqa: E402
from accvideo_core.models.video_model import VideoModel  # noqa: E402

TIMES = (1.0, 0.9, 0.6, 0.2)
FRAMES = 16
"""Latent frames, so that there are distances of all kinds."""
WINDOWS = (1.0, 0.5, 0.2)
"""The paper's formula, what its code does, and what it sets for Wan."""
PROMPT = "a red circle moving right"
STEPS = 10
CLIP = (17, 64, 64)
"""Frames, height and width that the embedded teacher is trained on."""
FRAME = (30, 45)
"""Tokens of a frame in the timing: of 480 x 720 pixels."""


@dataclass(frozen=True, slots=True)
class Row:
    """One network under one pattern."""

    network: str
    tokens: int
    pattern: Radial
    share: float
    """Of the pairs of blocks that are computed."""
    error: float


def grid_of(model: VideoModel, x: Tensor) -> Grid:
    spec, (frames, height, width) = model.latent_spec, x.shape[2:]
    return frames // spec.patch_t, height // spec.patch, width // spec.patch


@torch.no_grad()
def error_rows(
    name: str, model: VideoModel, states: dict[float, Tensor], condition: Condition, block: int
) -> Iterator[Row]:
    """Of states x_t [1, C, T, H, W] by their times."""
    dense = {t: model.velocity(x, t, condition) for t, x in states.items()}
    grid = grid_of(model, next(iter(states.values())))
    # Text is in the video's sequence, or in one of its own.
    text = 0 if name.startswith("wan") else condition.text.shape[1]
    for window in WINDOWS:
        pattern = Radial(window=window, block=block)
        with attention(model, "math", pattern):
            found = {t: model.velocity(x, t, condition) for t, x in states.items()}
        worst = max(float((found[t] - v).norm() / v.norm()) for t, v in dense.items())
        share = computed_share(pattern, grid, text)
        yield Row(name, math.prod(grid) + text, pattern, share, worst)


def tiny_rows() -> Iterator[Row]:
    """Random networks of three families, 64 tokens a frame, in blocks of 16."""
    from tests.tiny_families import case

    for name in ("hunyuan_video", "wan_t2v", "cogvideox_5b"):
        made = case(name)
        shape = (1, made.x.shape[1], FRAMES, 16, 16)
        states = {t: seeded_noise(shape, name, t) for t in TIMES}
        yield from error_rows(name, made.model, states, made.condition.select(0), 16)


def teacher_rows() -> Iterator[Row]:
    """The embedded teacher along its own way from noise to a clip."""
    teacher = load_teacher(embedded_teacher_path())
    condition = teacher.encode_prompts([PROMPT])[0].condition
    model = teacher.model
    x = seeded_noise((1, *model.latent_spec.shape(*CLIP)), "sparse", PROMPT)
    times = model.family.time_grid(STEPS)
    states = {}
    with torch.no_grad():
        for t, following in pairwise(times):
            states[t] = x
            x = x + (following - t) * model.velocity(x, t, condition)
    yield from error_rows("embedded teacher", model, states, condition, 16)


@dataclass(frozen=True, slots=True)
class Timing:
    """One attention of all heads."""

    tokens: int
    share: float
    dense: float
    """Seconds."""
    sparse: float


@torch.no_grad()
def timing(grid: Grid, heads: int, rounds: int = 5) -> Timing:
    """Dense attention as torch computes it, and the radial pattern, in turn; medians."""
    device, tokens = torch.device("cpu"), math.prod(grid)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, tokens, heads, 64, generator=generator)
    dense, sparse = (KERNELS[name].load(device) for name in ("sdpa", "flex"))
    pattern = Radial()
    mask = block_mask(pattern, grid, 0, device)
    runs = (partial(dense, q, k, v, None), partial(sparse, q, k, v, mask))
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for run, took in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if number:  # the first compiles
                took.append(time.perf_counter() - start)
    share = computed_share(pattern, grid, 0)
    return Timing(tokens, share, *(statistics.median(took) for took in seconds))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frames", type=int, nargs="*", default=[6, 12, 24], help="of the timing")
    parser.add_argument("--heads", type=int, default=2, help="of the timing, of size 64")
    given = parser.parse_args(arguments)
    print("| network | tokens | block | window | computed | error |\n|---|---|---|---|---|---|")
    for row in (*tiny_rows(), *teacher_rows()):
        pattern = row.pattern
        print(
            f"| {row.network} | {row.tokens} | {pattern.block} | {pattern.window:g} "
            f"| {row.share:.0%} | {row.error:.1e} |"
        )
    print("\n| tokens | computed | dense s | sparse s | times as fast |\n|---|---|---|---|---|")
    for frames in given.frames:
        took = timing((frames, *FRAME), given.heads)
        print(
            f"| {took.tokens} | {took.share:.0%} | {took.dense:.2f} | {took.sparse:.2f} "
            f"| {took.dense / took.sparse:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

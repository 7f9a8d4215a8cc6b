"""What sampling the released networks takes of a card, and how many blocks have to wait to fit.

    python -m benchmarks.sampling_memory

One video at a time, without guidance beside the network, as students are asked. Nothing is
measured: the networks have no values, and any machine tells the same in some minutes. Attention and
RMS norm are counted as CUDA's fused kernels.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.conditioning import Condition  # noqa: E402
from accvideo_core.models import VideoModel  # noqa: E402
from accvideo_core.models.fitting import Sampling, Savings  # noqa: E402
from benchmarks.memory_plans import network  # noqa: E402
from benchmarks.released import HUNYUAN_VIDEO, WAN, Released  # noqa: E402

CUDA = torch.device("cuda")
WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
CASES = (
    HUNYUAN_VIDEO,
    replace(HUNYUAN_VIDEO, frames=129, height=720, width=1280),
    WAN,
    replace(WAN, height=720, width=1280),
    replace(WAN, name="Wan 1.3B", config=WAN_SMALL),
)
CARDS = (16, 24, 48, 80)
"""GB."""
USABLE = 0.9
"""Of them: the rest is CUDA's, the display's, and what torch cannot fill."""
COLUMNS = ("weights", "working", "peak", *(f"{size} GB" for size in CARDS))


def sampling(case: Released, model: VideoModel) -> Sampling:
    """One video, its text as long as the family's prompts are."""
    text = torch.empty(1, *case.text, device="meta")
    pooled = None if case.pooled is None else torch.empty(1, case.pooled, device="meta")
    cond = Condition(text, pooled=pooled).with_guidance(model.family.guidance)
    return Sampling(model, cond, (case.frames, case.height, case.width), CUDA)


def waiting(asked: Sampling, card: float) -> str:
    """The fewest blocks that have to wait on a card of so many bytes."""
    blocks = asked.model.num_blocks
    counts = range(blocks + 1)
    fits = (n for n in counts if asked.takes(Savings(swap_blocks=n)).peak <= USABLE * card)
    fewest = next(fits, None)
    return "-" if fewest is None else "all on it" if fewest == 0 else f"{fewest} of {blocks} wait"


def row(case: Released, fp8: bool) -> str:
    asked = sampling(case, network(case, fp8))
    plain = asked.takes(Savings())
    sizes = [f"{size / 1e9:.1f}" for size in (plain.weights, plain.working, plain.peak)]
    cards = [waiting(asked, size * 1e9) for size in CARDS]
    name = f"{case.name}, {case.height} x {case.width} x {case.frames}"
    return f"| {name} | {'fp8' if fp8 else 'bf16'} | {' | '.join([*sizes, *cards])} |"


def main(_argv: Sequence[str] | None = None) -> None:
    print(f"| network and video | weights in | {' | '.join(COLUMNS)} |")
    print("| --- " * (len(COLUMNS) + 2) + "|")
    for case in CASES:
        for fp8 in (False, True):
            start = time.perf_counter()
            print(row(case, fp8), flush=True)
            print(f"counted in {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

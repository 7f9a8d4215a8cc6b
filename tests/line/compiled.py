"""Real compilers on real networks, by hand: `python -m tests.line.compiled [FAMILY ...]`.

Velocities as sampling compiles them; then gradients of every role with everything compiled by
inductor and all that saves memory, against plain separate copies. Minutes for each family, nearly
all of them the compiler's.
"""

from __future__ import annotations

import sys
import time

import torch

from accvideo_core.distill import memory
from accvideo_core.models.compiling import compiled_blocks
from accvideo_core.models.packing import pack_weights
from tests import tiny_families, updates

BOUND = 1e-4
"""Of a gradient's largest number: fused operations round in another order."""


@torch.no_grad()
def sampling_error(case: tiny_families.Case) -> float:
    """Of velocities, against their largest number."""
    expected = case.velocities(case.model)
    with compiled_blocks(case.model, training=False):
        found = case.velocities(case.model)
    return float((found - expected).abs().max() / expected.abs().max())


def main(families: list[str]) -> int:
    memory.OFFLOADED_BYTES = 0
    worst = 0.0
    for family in families or ["hunyuan_video", "wan22_t2v", "cogvideox_5b"]:
        error = sampling_error(tiny_families.case(family))
        print(f"{family} sampled: error {error:.1e}", flush=True)
        worst = max(worst, error)
        for weights in (None, "fp8"):
            case = tiny_families.case(family)
            model = case.model if weights is None else pack_weights(case.model, weights)
            batch, started = updates.batch_of(case), time.perf_counter()
            options = {**updates.ALL, "compile": True}
            found = updates.saving(model, batch, options, updates.FarAway())
            seconds = time.perf_counter() - started
            error = updates.difference(found, updates.reference(model, batch))
            which = f"{family} {weights or 'unpacked'}"
            print(f"{which}: error {error:.1e}, {seconds:.0f} s", flush=True)
            worst = max(worst, error)
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Memory plans of the released sizes: what training them takes on one GPU, by the plan.

    python -m benchmarks.memory_plans

HunyuanVideo 13B at 544 x 960 x 93 frames and Wan 14B at 480 x 832 x 81, a LoRA of rank 32 with the
adversarial term, one clip at a time. Nothing is measured: the networks have no values, and any
machine tells the same in a few minutes. Attention and RMS norm are counted as CUDA's fused kernels.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.conditioning import Condition  # noqa: E402
from accvideo_core.distill.batch import KeyBatch  # noqa: E402
from accvideo_core.distill.memory_plan import MemoryPlan, plan_memory  # noqa: E402
from accvideo_core.distill.recipes import Recipe, preset  # noqa: E402
from accvideo_core.distill.student import StudentInfo  # noqa: E402
from accvideo_core.models import FAMILIES, VideoModel  # noqa: E402
from accvideo_core.models.quantised import Fp8Linear  # noqa: E402
from benchmarks.gpu_loading import CASES, E4M3  # noqa: E402
from benchmarks.loading import native_shapes  # noqa: E402
from benchmarks.released import Released  # noqa: E402

CUDA = torch.device("cuda")
RECIPE = replace(preset("adversarial"), batch_size=32, accumulate=32)
ALL = 10**6
"""Blocks to swap: as many as there are."""
SETTINGS: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    ("bf16", False, {}),
    ("bf16, checkpointing", False, {"gradient_checkpointing": True}),
    (
        "bf16, checkpointing, offloading",
        False,
        {"gradient_checkpointing": True, "offload_activations": True},
    ),
    ("fp8, checkpointing", True, {"gradient_checkpointing": True}),
    (
        "fp8, checkpointing, offloading",
        True,
        {"gradient_checkpointing": True, "offload_activations": True},
    ),
    (
        "fp8, checkpointing, offloading, all blocks swapped",
        True,
        {"gradient_checkpointing": True, "offload_activations": True, "swap_blocks": ALL},
    ),
)
"""(what it is called, whether the blocks' weights are fp8, changes of the recipe)."""


COLUMNS = ("weights", "trained", "key states", "activations", "working", "peak", "main memory")


def network(case: Released, fp8: bool) -> VideoModel:
    """A released network in bfloat16 on the meta device; what diffusers keeps in float32 stays."""
    family = FAMILIES[case.family]
    module, _ = native_shapes(case.family, case.config)
    wide = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        if x.is_meta and wide.isdisjoint(name.split(".")):
            x.data = x.data.to(torch.bfloat16)
    module.requires_grad_(False)
    for block in family.blocks(module) if fp8 else ():
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                above, _, child = name.rpartition(".")
                weight = torch.empty(layer.weight.shape, dtype=E4M3, device="meta")
                scale = torch.empty((), device="meta")
                setattr(block.get_submodule(above), child, Fp8Linear(weight, scale, layer.bias))
    spec = family.latent_spec(module.config, {})  # type: ignore[arg-type]
    return VideoModel(module, family, spec, case.name, "none")


def plan(case: Released, model: VideoModel, recipe: Recipe) -> MemoryPlan:
    """The plan for one clip at a time, however large the batch."""
    spec, family = model.latent_spec, model.family
    shape = spec.shape(case.frames, case.height, case.width)
    times = recipe.times(family.time_grid())
    info = StudentInfo(
        family=family.name,
        base="none",
        key_times=times,
        guidance=family.guidance,
        lora=recipe.lora,
        latent_spec=spec,
        frames=case.frames,
        height=case.height,
        width=case.width,
    )

    def meta(*sizes: int) -> Tensor:
        return torch.empty(1, *sizes, device="meta")

    cond = Condition(meta(*case.text), pooled=None if case.pooled is None else meta(case.pooled))
    latents = meta(*shape).expand(len(times), 1, *shape)
    batch = KeyBatch(latents, times[::-1], cond, meta(*shape), torch.zeros(1))
    return plan_memory(model, info, recipe, batch, CUDA)


def row(name: str, found: MemoryPlan) -> str:
    learnt = found.trained + found.heads + found.gradients + found.optimiser + found.average
    elsewhere = found.waiting + found.offloaded
    sizes = (found.weights, learnt, found.states, found.activations, found.working, found.peak)
    cells = [f"{size / 1e9:.1f}" for size in (*sizes, elsewhere)]
    return f"| {name} | {' | '.join(cells)} |"


def main(_argv: Sequence[str] | None = None) -> None:
    for case in CASES:
        print(f"\n{case.name}, {case.height} x {case.width} x {case.frames}, GB\n")
        print(f"| settings | {' | '.join(COLUMNS)} |")
        print("| --- " * 8 + "|")
        for name, fp8, changes in SETTINGS:
            start = time.perf_counter()
            model, recipe = network(case, fp8), replace(RECIPE, **changes)
            recipe = replace(recipe, swap_blocks=min(recipe.swap_blocks, model.num_blocks))
            found = plan(case, model, recipe)
            print(row(name, found), flush=True)
            print(f"planned in {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

"""The memory plan against what torch's profiler saw a real run allocate, and against arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_cogvideox
import tiny_wan
import torch
from memory_cases import RECIPE, SHORT, allocated, packed, recorded, small, wide
from torch import Tensor, nn

from accvideo_core.distill.batch import KeyBatch
from accvideo_core.distill.memory_plan import MemoryPlan, optimiser_bytes, plan_memory
from accvideo_core.distill.recipes import CHOICES, Recipe
from accvideo_core.distill.student import StudentInfo
from accvideo_core.distill.trainer import distill, memory_plan
from accvideo_core.models import VideoModel
from accvideo_core.models.footprint import tensor_bytes
from accvideo_core.models.swapping import SLOTS
from accvideo_core.trajectories.store import TrajectoryDataset

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


CASES: dict[str, tuple[Any, tuple[int, int], dict[str, Any]]] = {
    "adapters, activations weigh most": (small, (5, 96), {"adversarial": False}),
    "adversarial, checkpointing, in parts": (
        small,
        (5, 96),
        {"gradient_checkpointing": True, "accumulate": 2},
    ),
    "bf16, adapters, running average": (
        lambda: wide(torch.bfloat16),
        (5, 48),
        {"adversarial": False, "ema": 0.9},
    ),
    "fp8, checkpointing": (
        packed,
        (5, 32),
        {"adversarial": False, "gradient_checkpointing": True},
    ),
    "full student": (wide, (5, 32), {"adversarial": False, "lora": None}),
    "full student of Wan, adversarial, checkpointing": (
        lambda: tiny_wan.video_model("wan_t2v"),
        (9, 128),
        {"lora": None, "gradient_checkpointing": True},
    ),
    "CogVideoX, adversarial, a step on each loss, further heads": (
        lambda: tiny_cogvideox.video_model("cogvideox_5b"),
        (9, 64),
        {"updates": "separate", "head_kind": "spatial_temporal", "r1": "features", "r1_weight": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_within_15_percent_of_the_measured_peak(case: str, tmp_path: Path) -> None:
    make, (frames, size), settings = CASES[case]
    teacher = make()
    dataset = recorded(teacher, tmp_path / "data", frames, size)
    plans: list[MemoryPlan] = []
    with allocated() as peaks:
        recipe = replace(RECIPE, **settings)
        distill(teacher, dataset, recipe, tmp_path / "run", on_plan=plans.append)
    module = teacher.module
    measured = peaks[0] + tensor_bytes((*module.parameters(), *module.buffers()))
    assert plans[0].peak == pytest.approx(measured, rel=0.15)


@pytest.fixture(scope="module")
def teacher() -> VideoModel:
    return small()


@pytest.fixture(scope="module")
def dataset(teacher: VideoModel, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryDataset:
    return recorded(teacher, tmp_path_factory.mktemp("data") / "clips", 5, 64)


def test_each_line_of_the_plan_is_what_it_says(
    teacher: VideoModel, dataset: TrajectoryDataset
) -> None:
    recipe = replace(SHORT, ema=0.9, gradient_checkpointing=True)
    plan = memory_plan(teacher, dataset, recipe)
    module = teacher.module
    linear = {name: x for name, x in module.named_modules() if isinstance(x, nn.Linear)}
    targets = teacher.family.lora_targets
    adapted = [x for n, x in linear.items() if any(n.endswith(f".{t}") for t in targets)]
    assert plan.weights == tensor_bytes((*module.parameters(), *module.buffers()))
    assert plan.trained == sum(4 * 4 * (x.in_features + x.out_features) for x in adapted)
    assert plan.heads == 0 and plan.gradients == plan.average == plan.trained
    assert plan.optimiser == 2 * plan.trained + 4 * 2 * len(adapted)
    # Two samples of 4 x 2 x 16 x 16 at 3 key times and as noise, and a third for the preview.
    latents, text = 4 * 4 * 2 * 16 * 16, 4 * (4 * tiny.TEXT + tiny.POOLED + 1)
    assert plan.states == 3 * ((3 + 1) * latents + text) + 2 * 3 * latents
    # With checkpointing a block leaves its outputs: 2 x 8 x 8 tokens of video and 4 of text.
    assert plan.blocks == 2 and plan.block == 2 * (2 * 8 * 8 + 4) * 32 * 4
    held = plan.weights + plan.trained + plan.gradients + plan.optimiser + plan.average
    assert plan.peak == held + plan.states + plan.activations + plan.working


def large(recipe: Recipe, device: torch.device) -> MemoryPlan:
    """Of two clips of 8192 tokens, which are nowhere; the network has four blocks."""
    teacher = tiny.video_model()
    times = (0.0, 0.5, 1.0)
    info = StudentInfo(
        *(teacher.family.name, teacher.fingerprint, times[::-1], 6.0, recipe.lora, tiny.SPEC),
        *(5, 512, 512),
    )
    noise = torch.empty(2, *tiny.SPEC.shape(5, 512, 512), device="meta")
    latents = noise.expand(3, *noise.shape)
    batch = KeyBatch(latents, times, tiny.condition(2), noise, torch.zeros(2))
    return plan_memory(teacher, info, recipe, batch, device)


def test_what_saves_memory_does_so_in_the_plan() -> None:
    plans = [large(SHORT, CUDA)]
    recipe = SHORT
    for change in (
        {"accumulate": 2},
        {"gradient_checkpointing": True},
        {"offload_activations": True},
        {"swap_blocks": 4},
        {"optimizer": "adafactor"},
    ):
        recipe = replace(recipe, **change)
        plans.append(large(recipe, CUDA))
    whole, parts, recomputed, offloaded, swapped, factored = plans
    assert all(b.peak < a.peak for a, b in zip(plans, plans[1:], strict=False))
    assert parts.activations == pytest.approx(whole.activations / 2, rel=0.05)
    assert recomputed.activations < parts.activations / 3
    assert offloaded.activations < recomputed.activations / 2
    assert offloaded.offloaded >= 4 * 8192 * 32 * 4  # the inputs of four blocks
    model = tiny.video_model()
    sizes = [tensor_bytes(block.parameters()) for block in model.family.blocks(model.module)]
    assert swapped.waiting == sum(sizes) - SLOTS * max(sizes)
    assert swapped.weights + swapped.waiting == offloaded.weights
    assert offloaded.peak - swapped.peak == swapped.waiting
    assert factored.optimiser < swapped.optimiser / 2


def test_main_memory_is_the_device_on_a_cpu() -> None:
    recipe = replace(SHORT, gradient_checkpointing=True)
    here = large(recipe, CPU)
    assert large(replace(recipe, offload_activations=True), CPU) == here
    swapped = large(replace(recipe, swap_blocks=4), CPU)
    assert swapped.waiting == 0 and swapped.peak > here.peak  # by the places of two blocks


def test_both_experts_count(tmp_path: Path) -> None:
    pair = tiny_wan.video_model("wan22_t2v")
    plan = memory_plan(pair, recorded(pair, tmp_path / "data", 5, 32), RECIPE)
    assert plan.weights == tensor_bytes((*pair.module.parameters(), *pair.module.buffers()))
    assert plan.peak > plan.weights + plan.trained + plan.optimiser


def test_nothing_of_the_teacher_is_read_or_changed(
    teacher: VideoModel, dataset: TrajectoryDataset
) -> None:
    """A network whose weights are nowhere has the same plan."""
    nowhere = replace(teacher, module=small().module.to("meta"), _fingerprint=teacher.fingerprint)
    before = {name: x.clone() for name, x in teacher.module.state_dict().items()}
    plan = memory_plan(teacher, dataset, SHORT)
    assert memory_plan(nowhere, dataset, SHORT, device=CPU) == plan
    assert all(torch.equal(x, before[n]) for n, x in teacher.module.state_dict().items())
    assert not any(p.requires_grad for p in teacher.module.parameters())


def test_table_tells_every_part_in_words() -> None:
    sizes = dict.fromkeys(MemoryPlan.__dataclass_fields__, 0)
    sizes |= {"weights": 13_400_000_000, "waiting": 12_200_000_000, "peak": 32_500_000_000}
    sizes |= {"activations": 400_000_000, "offloaded": 37_800_000_000, "trained": 564_700_000}
    assert MemoryPlan(**{**sizes, "device": "cuda"}).table() == "\n".join(  # type: ignore[arg-type]
        [
            "memory plan (cuda)",
            "  teacher's weights   13.4 GB  12.2 GB more in main memory",
            "  trained weights    564.7 MB",
            "  heads                0.0 MB",
            "  gradients            0.0 MB",
            "  optimiser            0.0 MB",
            "  running average      0.0 MB",
            "  key states           0.0 MB",
            "  activations        400.0 MB  37.8 GB more in main memory",
            "  working memory      18.1 GB",
            "  peak                32.5 GB",
        ]
    )


# Optimisers -----------------------------------------------------------------------------------

SHAPES = [(64, 200), (100, 64), (300,), (3, 5), (16, 8, 4, 4)]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        tensor_bytes([x])
        for state in optimizer.state.values()
        for name, x in state.items()
        if isinstance(x, Tensor) and not name.startswith("qmap")
    )


@pytest.mark.parametrize("name", CHOICES["optimizer"])
def test_optimiser_bytes_are_those_of_its_state(name: str) -> None:
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    if name == "adamw_8bit":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        optimizer: Any = bitsandbytes.optim.AdamW8bit(parameters)
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p)
            optimizer.init_state(optimizer.param_groups[0], p, 0, i)
    else:
        classes = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}
        optimizer = classes[name](parameters)
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert optimiser_bytes(name, SHAPES) == state_bytes(optimizer)

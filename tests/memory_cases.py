"""Random networks, and datasets of two trajectories: training them takes little memory. And how to
measure how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn
from torch.profiler import ProfilerActivity, profile

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.student import LoraSpec
from accvideo_core.guidance import Cfg
from accvideo_core.models import FAMILIES, VideoModel
from accvideo_core.models.quantised import Fp8Linear
from accvideo_core.trajectories.record import RecordSpec, record
from accvideo_core.trajectories.store import TrajectoryDataset
from tests import tiny, tiny_cogvideox, tiny_wan

RECIPE = Recipe(
    student_steps=2,
    adversarial=True,
    lora=LoraSpec(rank=4),
    train_steps=2,
    batch_size=2,
    head_width=16,
)
SHORT = replace(RECIPE, adversarial=False)


def small() -> VideoModel:
    """A HunyuanVideo of one dual and one single block of width 32."""
    return hunyuan(2, 16, (4, 6, 6))


def wide(dtype: torch.dtype = torch.float32) -> VideoModel:
    """The same of width 256: 20 MB in float32."""
    return hunyuan(8, 32, (8, 12, 12), dtype)


def hunyuan(
    heads: int, width: int, axes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> VideoModel:
    module = HunyuanVideoTransformer3DModel(
        in_channels=tiny.CHANNELS,
        out_channels=tiny.CHANNELS,
        num_attention_heads=heads,
        attention_head_dim=width,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=tiny.TEXT,
        pooled_projection_dim=tiny.POOLED,
        guidance_embeds=True,
        rope_axes_dim=axes,
    )
    module = module.to(dtype).eval().requires_grad_(False)
    return VideoModel(module, FAMILIES["hunyuan_video"], tiny.SPEC, source="random")


def packed() -> VideoModel:
    """`wide` with the linear layers of its blocks in fp8."""
    model = wide(torch.bfloat16)
    for block in model.family.blocks(model.module):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, child = name.rpartition(".")
                weight = layer.weight.to(torch.float8_e4m3fn)
                small = Fp8Linear(weight, torch.tensor(0.5), layer.bias)
                setattr(block.get_submodule(parent), child, small)
    return model


@contextmanager
def allocated() -> Iterator[list[int]]:
    """Afterwards holds the most bytes that the block had allocated at once, by torch's profiler."""
    found: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    recorded_by_torch: Any = profiler.profiler
    events = [e for e in recorded_by_torch.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    found.append(peak)


def conditions(model: VideoModel) -> list[Condition]:
    name = model.family.name
    if name.startswith("wan"):
        return [tiny_wan.condition(name, 1, seed=i) for i in (20, 21)]
    if name.startswith("cogvideox"):
        return [tiny_cogvideox.condition(1, seed=i) for i in (20, 21)]
    return [tiny.condition(1, length=3 + i, seed=i) for i in (0, 1)]


def recorded(model: VideoModel, folder: Path, frames: int, size: int) -> TrajectoryDataset:
    """Two trajectories of `frames` x `size` x `size` pixels."""
    prompts = [Prompt.of(f"clip {i}", cond) for i, cond in enumerate(conditions(model))]
    spec = RecordSpec(frames, size, size, steps=2, kept=2, dtype="float32", cfg=Cfg(1))
    return record(model, prompts, spec, folder)

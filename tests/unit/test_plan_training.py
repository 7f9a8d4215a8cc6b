"""The planning tables of training: sizes and passes against the networks and the trainer itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from accvideo_core.conditioning import Condition
from accvideo_core.distill.adversarial import build_adversarial
from accvideo_core.distill.batch import KeyBatch
from accvideo_core.distill.heads import Heads
from accvideo_core.distill.recipes import PRESETS, Recipe
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.models import FAMILIES, VideoModel
from scripts.plan_training import HUNYUAN, SETUPS, WAN, Network, Setup, main

TIMES = (0.0, 0.5, 0.8, 1.0)


def without_values(cls: Callable[..., Any], name: str, **changes: Any) -> VideoModel:
    """A network of its default, the released, size but for `changes`."""
    with torch.device("meta"):
        module = cls(**changes).requires_grad_(False)
    family = FAMILIES[name]
    return VideoModel(module, family, family.latent_spec(module.config, {}), "x", "x")


RELEASED = [
    (HUNYUAN, HunyuanVideoTransformer3DModel, "hunyuan_video", "num_layers num_single_layers"),
    (WAN, WanTransformer3DModel, "wan_t2v", "num_layers"),
]


@pytest.mark.parametrize(("network", "cls", "name", "depths"), RELEASED)
def test_sizes_are_those_of_the_released_networks(
    network: Network, cls: Callable[..., Any], name: str, depths: str
) -> None:
    model = without_values(cls, name)
    assert network.blocks == model.num_blocks
    parameters = sum(p.numel() for p in model.module.parameters())
    assert network.parameters == pytest.approx(parameters, rel=1e-3)
    linear = {n: x for n, x in model.module.named_modules() if isinstance(x, nn.Linear)}
    adapters = sum(
        32 * (x.in_features + x.out_features)
        for n, x in linear.items()
        if any(n.endswith("." + target) for target in model.family.lora_targets)
    )
    assert network.adapters == pytest.approx(adapters, rel=1e-3)
    heads = Heads([(0,)] * 5, {0: network.width}, PRESETS["adversarial"], None)
    assert network.heads == pytest.approx(sum(p.numel() for p in heads.parameters()), rel=1e-3)


@pytest.mark.parametrize(("network", "cls", "name", "depths"), RELEASED)
def test_a_pass_takes_the_operations_that_torch_counts(
    network: Network, cls: Callable[..., Any], name: str, depths: str
) -> None:
    """On one block of every kind; the blocks of a kind are alike."""
    model = without_values(cls, name, **dict.fromkeys(depths.split(), 1))
    height, width, frames = network.size
    x = torch.empty(1, *model.latent_spec.shape(frames, height, width), device="meta")
    text = torch.empty(1, 256, 4096, device="meta")
    cond = Condition(text, pooled=torch.empty(1, 768, device="meta"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.velocity(x, torch.ones(1, device="meta"), cond)
    part = model.num_blocks / network.blocks
    small = replace(network, blocks=model.num_blocks, per_token=network.per_token * part)
    # The rest belongs to the text and to the first and last layers.
    counted = counter.get_total_flops()
    assert small.linear + small.attention == pytest.approx(counted, rel=0.05)


def test_operations_are_those_of_the_trainers_objective() -> None:
    """Counted over all key times, on a network that is nearly nothing but its blocks."""
    teacher = tiny.video_model()
    recipe = Recipe(
        student_steps=3, batch_size=1, adversarial=True, head_width=4, feature_blocks=(3,)
    )
    # One adapter at the very front, so that the way back is long and adapters cost nothing.
    lora = LoraSpec(rank=1, targets=("transformer_blocks.0.attn.to_q",))
    spec = teacher.latent_spec
    info = StudentInfo("hunyuan_video", "", TIMES[::-1], None, lora, spec, 5, 128, 128)
    student = Student.create(teacher, info)
    for model in (student.model, teacher):
        model.module.enable_gradient_checkpointing()  # type: ignore[operator]
    latents = torch.randn(4, 1, 4, 2, 16, 16)
    batch = KeyBatch(latents, TIMES, tiny.condition(1), latents[3], torch.zeros(1))
    game = build_adversarial(recipe, teacher, batch)
    roles = {True: list(game.heads.parameters()), False: list(student.trainable().values())}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for k in range(3):
            for term in game(student, batch, k):
                term.loss.backward(inputs=roles[term.trains_heads])
    network = replace(
        HUNYUAN, per_token=4 * 8 * 32**2, blocks=4, width=32, text=5, size=(128, 128, 5)
    )
    assert network.tokens == 2 * 8 * 8 + 5
    setup = Setup(network, 1, batch=1, steps=3, attention_backward=2.0)
    assert setup.operations == pytest.approx(counter.get_total_flops() / 3, rel=0.05)


def test_shares_of_several_gpus() -> None:
    one, eight, two = Setup(HUNYUAN, 1), Setup(HUNYUAN, 8), Setup(HUNYUAN, 8, sequence=2)
    assert one.weights == 2 * HUNYUAN.parameters and one.gathered == one.exchanged == 0
    assert eight.weights == pytest.approx(one.weights * (1 / 8 + 2 / 60))
    assert eight.activations == one.activations == 2 * two.activations
    assert eight.compute == pytest.approx(one.compute / 8) and two.compute > eight.compute
    assert eight.gathered == pytest.approx(4 * (6 + 3) * one.weights * 7 / 8)
    queued = replace(eight, queued=True)
    passes = (eight.operations - queued.operations) / (HUNYUAN.linear + HUNYUAN.attention)
    assert passes == pytest.approx(2)
    full = Setup(HUNYUAN, 32, full=True)
    assert full.trained == pytest.approx(12 * HUNYUAN.parameters / 32 + 16 * HUNYUAN.heads)
    with pytest.raises(SystemExit, match="8 GPUs in groups of 3"):
        Setup(HUNYUAN, 8, sequence=3)


def test_own_figures_make_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    main("--network wan --gpus 8 --sequence 4 --forward 10".split())
    memory, times = capsys.readouterr().out.split("\n\n")
    assert "| LoRA 32 | 8 | 4 |" in memory and "| LoRA 32 | 8 | 4 |" in times
    setup = Setup(replace(WAN, forward=10.0), 8, 4)
    assert f"| {setup.compute:.0f} | {setup.seconds:.0f} |" in times
    main("--network wan --full --size 720x1280x81".split())
    assert "720x1280x81 | all weights" in capsys.readouterr().out


def test_the_docs_hold_the_tables(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    main([])
    page = (root / "docs" / "distributed_training.md").read_text(encoding="utf-8")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line not in page] == [] and len(lines) > len(SETUPS)

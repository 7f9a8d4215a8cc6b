"""The line over Wan: record under guidance, distil a LoRA for both experts, save and load it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_wan
import torch

from accvideo_core.conditioning import Prompt
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.student import LoraSpec
from accvideo_core.distill.trainer import distill
from accvideo_core.export import load_student, save_student
from accvideo_core.models import VideoModel
from accvideo_core.sampling import sample
from accvideo_core.trajectories.record import RecordSpec, record
from accvideo_core.trajectories.store import TrajectoryDataset

RECIPE = Recipe(
    student_steps=2,
    adversarial=True,
    lora=LoraSpec(rank=2),
    train_steps=3,
    batch_size=2,
    lr=1e-2,
    head_lr=1e-2,
    head_width=8,
)


def recorded(model: VideoModel, folder: Path, shift: float | None = None) -> TrajectoryDataset:
    name = model.family.name
    prompts = [Prompt.of("", tiny_wan.condition(name, 1, seed=20 + i)) for i in range(2)]
    negative = Prompt.of("", tiny_wan.condition(name, 1, seed=30).without_image())
    stride = 4 * model.latent_spec.stride_hw
    spec = RecordSpec(
        5, stride, stride, steps=4, kept=4, batch_size=2, dtype="float32", shift=shift
    )
    return record(model, prompts, spec, folder, negative=negative)


@pytest.mark.parametrize("name", tiny_wan.IMAGE_FAMILIES)
def test_prompts_with_images_are_recorded_and_read_back(name: str, tmp_path: Path) -> None:
    model = tiny_wan.video_model(name)
    dataset = recorded(model, tmp_path / "data")
    assert dataset.info.cfg == model.family.cfg and dataset.info.negative
    assert dataset.info.time_grid == model.family.time_grid(4, size=(1, 1))
    ids = dataset.ids()
    stored = dataset.prompt(dataset.read(ids[0]).prompt_id).condition
    given = [tiny_wan.condition(name, 1, seed=20 + i).tensors() for i in range(2)]
    assert any(all(torch.equal(x, one[n]) for n, x in stored.tensors().items()) for one in given)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_experts_learn_and_are_saved(checkpointing: bool, tmp_path: Path) -> None:
    teacher = tiny_wan.video_model("wan22_t2v")
    # Shift 5 puts the two student steps, at 1 and .833, on either side of the boundary .875.
    dataset = recorded(teacher, tmp_path / "data", shift=5.0)
    recipe = replace(RECIPE, gradient_checkpointing=checkpointing)
    student = distill(teacher, dataset, recipe, tmp_path / "run").student
    learnt = {n for n, p in student.trainable().items() if ".lora_B." in n and p.any()}
    for expert in ("high", "low"):
        blocks = {n.split(".")[2] for n in learnt if n.startswith(f"{expert}.")}
        assert blocks == {"0", "1", "2"}
    assert not any(p.grad is not None or p.requires_grad for p in teacher.module.parameters())

    loaded = load_student(save_student(student, tmp_path / "student.safetensors"), teacher)
    noise, cond = tiny_wan.latents("wan22_t2v"), tiny_wan.condition("wan22_t2v")
    expected = sample(student, cond, noise, student.key_times)
    assert torch.equal(sample(loaded, cond, noise, loaded.key_times), expected)
    assert (sample(teacher, cond, noise, student.key_times) - expected).abs().max() > 1e-3

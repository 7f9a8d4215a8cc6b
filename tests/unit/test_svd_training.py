"""Stable Video Diffusion along the line: recorded under guidance, distilled, saved, sampled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_svd_images import image

from accvideo_core.arguments import micro_of
from accvideo_core.conditioning import Condition, Micro, Prompt
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.distill.trainer import distill
from accvideo_core.errors import AccVideoError
from accvideo_core.export import load_student, save_student
from accvideo_core.guidance import Cfg, guided
from accvideo_core.models.footprint import footprint
from accvideo_core.models.loading import load_teacher
from accvideo_core.models.swapping import spread_blocks, swapped_blocks, transfer_to
from accvideo_core.models.video_model import VideoModel
from accvideo_core.sampling import sample
from accvideo_core.trajectories import TrajectoryDataset
from accvideo_core.trajectories.record import RecordSpec, record
from tests import tiny_svd as tiny


def prompts() -> list[Prompt]:
    return [Prompt.of(f"clip {i}", tiny.condition(1, seed=10 + i)) for i in range(2)]


NEGATIVE = Prompt.of("", Condition(torch.zeros(1, 1, tiny.EMBEDDING)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryDataset:
    spec = RecordSpec(3, 64, 64, steps=2, kept=2, batch_size=2, dtype="float32")
    folder = tmp_path_factory.mktemp("svd") / "data"
    return record(tiny.video_model(), prompts(), spec, folder, negative=NEGATIVE)


def test_recorded_states_are_those_of_the_guided_teacher(dataset: TrajectoryDataset):
    assert dataset.info.cfg == Cfg(3.0, first=1.0)
    states = dataset.read(dataset.ids()[0])
    asked = guided(tiny.video_model(), NEGATIVE, dataset.info.cfg)
    condition = dataset.prompt(states.prompt_id).condition
    assert condition.micro is not None and condition.micro.tolist()[0][:2] == [6.0, 127.0]
    end = sample(asked, condition, states.latents[None, 0], dataset.info.time_grid)
    assert torch.allclose(end[0], states.latents[-1], atol=1e-3)


@pytest.mark.parametrize("lora", [LoraSpec(rank=2), None])
def test_distilled_saved_and_loaded_back(
    lora: LoraSpec | None, dataset: TrajectoryDataset, tmp_path: Path
):
    teacher = tiny.video_model()
    recipe = Recipe(student_steps=2, lora=lora, train_steps=2, batch_size=1, lr=1e-3)
    result = distill(teacher, dataset, recipe, tmp_path / "run")
    assert len(result.losses) == 2 and all(0 < loss < 1e3 for loss in result.losses)
    saved = save_student(result.student, tmp_path / "student.safetensors")
    student = load_student(saved, tiny.video_model())
    x, cond = tiny.latents(1), tiny.condition(1)
    v = student.velocity(x, 1.0, cond)
    assert torch.equal(v, result.student.velocity(x, 1.0, cond))
    assert (v - teacher.velocity(x, 1.0, cond)).abs().max() > 1e-4


def student_of(teacher: VideoModel) -> Student:
    info = StudentInfo(
        family="svd",
        base=teacher.fingerprint,
        key_times=(1.0, 0.5, 0.0),
        guidance=None,
        lora=LoraSpec(rank=2),
        latent_spec=tiny.SPEC,
        frames=3,
        height=64,
        width=64,
    )
    return Student.create(teacher, info)


def test_adapters_lie_on_attention_and_feed_forward_everywhere():
    student = student_of(tiny.video_model())
    layers = {name.split(".lora_")[0] for name in student.trainable()}
    sides = {name.split(".")[0] for name in layers}
    assert sides == {"down_blocks", "mid_block", "up_blocks"}
    blocks = {
        name
        for name, module in tiny.network().named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name
    }
    assert layers == blocks


def test_gradients_with_checkpointing_are_those_without():
    student = student_of(tiny.video_model())
    with torch.no_grad():  # B matrices begin as zeros, and A would see no gradient
        for p in student.trainable().values():
            p.add_(0.01)

    def gradients() -> list[torch.Tensor]:
        v = student.velocity(tiny.latents(), 0.7, tiny.condition())
        return list(torch.autograd.grad(v.square().sum(), [*student.trainable().values()]))

    plain = gradients()
    student.model.module.enable_gradient_checkpointing()  # type: ignore[operator]
    again = gradients()
    assert len(plain) > 50 and all(bool(x.any()) for x in plain)
    for a, b in zip(plain, again, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_an_image_is_sampled_and_decoded_from_the_folder(tmp_path: Path):
    teacher = load_teacher(tiny.save_pipeline(tmp_path / "svd"))
    prompt = teacher.encode_image("", image(), 3)
    asked = guided(teacher.model, teacher.encode_negative(), teacher.model.family.cfg)
    noise = tiny.latents(1)
    latents = sample(asked, prompt.condition, noise, teacher.model.family.time_grid(3))
    frames = teacher.vae.decode(latents)
    assert frames.shape == (1, 3, 64, 64, 3) and 0 <= frames.min() <= frames.max() <= 1


def test_numbers_beside_the_image_are_read_from_the_command_line():
    assert micro_of(None) == Micro() and micro_of("12,40") == Micro(12, 40)
    for wrong in ("a,b", "1,2,3,4"):
        with pytest.raises(AccVideoError, match="not up to three numbers"):
            micro_of(wrong)
    with pytest.raises(AccVideoError, match="fps is 0.0; it must be at least 1"):
        micro_of("0")


def test_memory_of_sampling_is_counted_without_values():
    model = tiny.video_model()
    asked = guided(model, NEGATIVE, Cfg(3.0))
    planned = footprint(asked, tiny.condition(1), (1, 4, 3, 8, 8))
    weights = sum(p.numel() * 4 for p in model.module.parameters())
    assert planned.peak > weights and len(planned.blocks[0]) == model.num_parts == 9


def test_swapped_parts_compute_the_same():
    model, x, cond = tiny.video_model(), tiny.latents(1), tiny.condition(1)
    expected = model.velocity(x, 0.5, cond)
    with torch.no_grad(), swapped_blocks([spread_blocks(model, 9)], transfer_to(x.device)):
        assert torch.equal(model.velocity(x, 0.5, cond), expected)

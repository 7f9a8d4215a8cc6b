"""Student files: round trips, diffusers' own reader, and files that are not what they should be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_student import make, shake

from accvideo_core.distill.student import LoraSpec, Student
from accvideo_core.errors import AccVideoError
from accvideo_core.export import load_student, read_student_info, save_student
from accvideo_core.models import VideoModel


@pytest.fixture
def teacher() -> VideoModel:
    return tiny.video_model()


def trained(teacher: VideoModel, lora: LoraSpec | None) -> Student:
    student = make(teacher, lora)
    shake(student)
    return student


@pytest.mark.parametrize("lora", [LoraSpec(rank=4), LoraSpec(rank=4, targets=("to_q",)), None])
def test_a_saved_student_comes_back_bit_for_bit(
    teacher: VideoModel, tmp_path: Path, lora: LoraSpec | None
) -> None:
    student = trained(teacher, lora)
    path = save_student(student, tmp_path / "students" / "mine.safetensors")
    assert read_student_info(path) == student.info
    loaded = load_student(path, teacher)
    assert loaded.info == student.info
    for name, x in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x)
    x, cond = tiny.latents(), tiny.condition()
    assert torch.equal(loaded.velocity(x, 0.6, cond), student.velocity(x, 0.6, cond))


def test_alpha_is_folded_into_the_file(teacher: VideoModel, tmp_path: Path) -> None:
    student = trained(teacher, LoraSpec(rank=4, alpha=6.0))
    path = save_student(student, tmp_path / "a.safetensors")
    loaded = load_student(path, teacher)
    assert loaded.info.lora == LoraSpec(rank=4)
    x, cond = tiny.latents(), tiny.condition()
    torch.testing.assert_close(loaded.velocity(x, 0.6, cond), student.velocity(x, 0.6, cond))


def test_diffusers_loads_the_file_as_a_lora(tmp_path: Path) -> None:
    from diffusers import HunyuanVideoPipeline

    from accvideo_core.models.loading import load_teacher

    folder = tiny.save_random_pipeline(tmp_path / "teacher")
    teacher = load_teacher(folder).model
    student = trained(teacher, LoraSpec(rank=4, alpha=8.0))
    path = save_student(student, tmp_path / "lora.safetensors")
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    cond = tiny.Condition(text, pooled=torch.ones(1, 64))

    pipeline = HunyuanVideoPipeline.from_pretrained(folder, local_files_only=True)
    plain = replace(teacher, module=pipeline.transformer).velocity(x, 0.6, cond)
    pipeline.load_lora_weights(path)
    theirs = replace(teacher, module=pipeline.transformer).velocity(x, 0.6, cond)
    torch.testing.assert_close(theirs, student.velocity(x, 0.6, cond), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(theirs, plain, atol=1e-2)


def test_a_full_student_is_a_state_dict_of_the_network(teacher: VideoModel, tmp_path: Path) -> None:
    student = trained(teacher, None)
    path = save_student(student, tmp_path / "full.safetensors")
    network = tiny.network(seed=8)
    network.load_state_dict(load_file(path))
    x, cond = tiny.latents(), tiny.condition()
    again = replace(teacher, module=network).velocity(x, 0.6, cond)
    assert torch.equal(again, student.velocity(x, 0.6, cond))


def test_lora_names_are_diffusers_names(teacher: VideoModel, tmp_path: Path) -> None:
    path = save_student(trained(teacher, LoraSpec(rank=4)), tmp_path / "lora.safetensors")
    names = set(load_file(path))
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in names
    assert all(n.startswith("transformer.") and ".lora_" in n for n in names)


def test_bad_files_are_named(teacher: VideoModel, tmp_path: Path) -> None:
    student = trained(teacher, LoraSpec(rank=4))
    path = save_student(student, tmp_path / "good.safetensors")

    with pytest.raises(AccVideoError, match="missing.safetensors"):
        load_student(tmp_path / "missing.safetensors", teacher)
    with pytest.raises(AccVideoError, match="must end in .safetensors"):
        save_student(student, tmp_path / "student.ckpt")

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    for read in (read_student_info, lambda p: load_student(p, teacher)):
        with pytest.raises(AccVideoError, match="cut.safetensors is truncated"):
            read(cut)

    flipped = bytearray(path.read_bytes())
    flipped[-50] ^= 16
    (tmp_path / "flipped.safetensors").write_bytes(flipped)
    with pytest.raises(AccVideoError, match="flipped.safetensors is damaged"):
        load_student(tmp_path / "flipped.safetensors", teacher)

    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    with pytest.raises(AccVideoError, match="foreign.safetensors"):
        read_student_info(foreign)
    text = tmp_path / "text.safetensors"
    text.write_text("this is not a tensor")
    with pytest.raises(AccVideoError, match="text.safetensors"):
        read_student_info(text)


def test_a_file_of_ours_that_is_no_student_is_named(tmp_path: Path) -> None:
    from accvideo_core.files import write_safetensors

    write_safetensors(tmp_path / "record.safetensors", {"latents": torch.zeros(2)}, {"seed": "0"})
    with pytest.raises(AccVideoError, match="record.safetensors cannot be loaded as a student"):
        read_student_info(tmp_path / "record.safetensors")


def test_another_teacher_or_family_is_refused(teacher: VideoModel, tmp_path: Path) -> None:
    student = trained(teacher, LoraSpec(rank=4))
    path = save_student(student, tmp_path / "good.safetensors")
    with pytest.raises(AccVideoError, match="was trained on another teacher"):
        load_student(path, tiny.video_model(seed=1))
    other = replace(teacher, family=replace(teacher.family, name="wan"))
    with pytest.raises(AccVideoError, match="is a hunyuan_video student, but the teacher is a wan"):
        load_student(path, other)

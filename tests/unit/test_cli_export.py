"""accvideo export, and LoRAs on the teacher from the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import SmallTeacher, last_error
from test_student import make, shake

from accvideo_core.cli import main
from accvideo_core.distill.student import LoraSpec, Student
from accvideo_core.export import load_student, read_student_info, save_student
from accvideo_core.models import loading
from accvideo_core.models.lora import apply_loras
from tests import tiny, tiny_families
from tests.lora_files import factors_of, native_shapes, write


@pytest.fixture(autouse=True)
def teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SmallTeacher:
    """The one that every command loads."""
    teacher = SmallTeacher(tiny.video_model(), tmp_path)
    monkeypatch.setattr(loading, "load_teacher", lambda *_args, **_options: teacher)
    monkeypatch.chdir(tmp_path)
    return teacher


@pytest.fixture
def student(teacher: SmallTeacher) -> Student:
    """Also in student.safetensors."""
    student = make(teacher.model, LoraSpec(rank=2))
    shake(student)
    save_student(student, Path("student.safetensors"))
    return student


def test_a_student_file_becomes_a_lora_for_comfyui(student: Student, capsys) -> None:
    assert main(["export", "student.safetensors", "loras/fast.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "student after 7 updates is in loras:" in said and "fast.safetensors (0." in said
    tensors = load_file("loras/fast.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    assert tensors["diffusion_model.single_blocks.0.linear1.lora_A.weight"].shape == (8, 32)


@pytest.mark.parametrize(
    ("words", "out", "found"),
    [
        (["--what", "full", "--dtype", "fp8"], "x.safetensors", "relative error"),
        (["--what", "full", "--layout", "diffusers"], "folder", "folder ("),
        (["--layout", "diffusers", "--dtype", "fp16"], "x.safetensors", "x.safetensors ("),
        (["--rank", "1", "--dtype", "fp32"], "x.safetensors", "relative error"),
    ],
)
def test_every_choice_is_passed_on(
    student: Student, capsys, words: list[str], out: str, found: str
) -> None:
    assert main(["export", "student.safetensors", out, *words]) == 0
    assert found in capsys.readouterr().out
    info = load_student(Path(out), student.teacher).info
    assert (info.lora is None) == ("full" in words)
    if "--rank" in words:
        assert info.lora == LoraSpec(rank=1)


def test_full_students_are_full_without_being_asked(teacher: SmallTeacher, capsys) -> None:
    save_student(make(teacher.model, None), Path("student.safetensors"))
    assert main(["export", "student.safetensors", "x.safetensors"]) == 0
    assert read_student_info(Path("x.safetensors")).lora is None
    assert main(["export", "student.safetensors", "y.safetensors", "--what", "lora"]) == 2
    assert "export it as full" in last_error(capsys)


def test_loras_change_the_teacher_of_a_command(teacher: SmallTeacher, capsys) -> None:
    shapes = native_shapes(teacher.model)
    one = write(Path("one.safetensors"), factors_of(shapes, 1))
    two = write(Path("a=b.safetensors"), factors_of(shapes, 2))
    expected = apply_loras(teacher.model, [(one, 0.5), (two, 1.0)])
    student = make(expected, LoraSpec(rank=2))
    save_student(student, Path("student.safetensors"))
    export = ["export", "student.safetensors", "x.safetensors"]
    loras = ["--lora", "one.safetensors=0.5", "--lora", "a=b.safetensors"]
    for mode in ("merge", "adapter"):
        assert main([*export, *loras, "--lora-mode", mode]) == 0
    assert main(export) == 2
    assert "was trained on another teacher" in last_error(capsys)
    assert main([*export, "--lora", "missing.safetensors"]) == 2
    assert "'missing.safetensors' does not exist" in last_error(capsys)
    assert main([*export, "--lora-low", "one.safetensors"]) == 2
    assert "is one network" in last_error(capsys)


def test_loras_for_one_expert(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_families.case("wan22_t2v").model
    pair = SmallTeacher(model, tmp_path)
    monkeypatch.setattr(loading, "load_teacher", lambda *_args, **_options: pair)
    one = write(Path("one.safetensors"), factors_of(native_shapes(model)))
    student = make(apply_loras(model, [(one, 1.0)], experts="low"), LoraSpec(rank=2))
    save_student(student, Path("student.safetensors"))
    export = ["export", "student.safetensors", "x.safetensors"]
    assert main([*export, "--lora-low", "one.safetensors"]) == 0
    names = ["x_high_noise.safetensors", "x_low_noise.safetensors"]
    assert sorted(path.name for path in Path().glob("x*")) == names
    assert main([*export, "--lora-high", "one.safetensors"]) == 2

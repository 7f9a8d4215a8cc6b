"""A student shares its teacher's weights, starts equal to it and never changes it."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import tiny
import torch

from accvideo_core.distill.student import LoraSpec, Student, StudentInfo, shared_copy, student_grid
from accvideo_core.errors import AccVideoError
from accvideo_core.models import FAMILIES, VideoModel


def info_for(teacher: VideoModel, lora: LoraSpec | None = LoraSpec(rank=4)) -> StudentInfo:  # noqa: B008
    return StudentInfo(
        family=teacher.family.name,
        base=teacher.fingerprint,
        key_times=(1.0, 0.8, 0.0),
        guidance=6.0,
        lora=lora,
        latent_spec=teacher.latent_spec,
        frames=5,
        height=16,
        width=16,
        recipe={"name": "test", "betas": [0.9, 0.999]},
        steps_trained=7,
    )


def make(teacher: VideoModel, lora: LoraSpec | None = LoraSpec(rank=4), seed: int = 0) -> Student:  # noqa: B008
    return Student.create(teacher, info_for(teacher, lora), seed)


def tensor_bytes(*models: VideoModel) -> int:
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for model in models
        for p in model.module.parameters()
    }
    return sum(storages.values())


def shake(student: Student, seed: int = 5) -> None:
    """Give every trained weight another value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in student.trainable().values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("lora", [LoraSpec(rank=4), LoraSpec(rank=3, alpha=9.0), None])
def test_a_new_student_equals_the_teacher_bit_for_bit(lora: LoraSpec | None) -> None:
    teacher = tiny.video_model()
    x, cond = tiny.latents(), tiny.condition()
    expected = teacher.velocity(x, 0.7, cond)
    assert torch.equal(make(teacher, lora).velocity(x, 0.7, cond), expected)


def test_base_weights_exist_once() -> None:
    teacher = tiny.video_model()
    base = tensor_bytes(teacher)
    student = make(teacher)
    adapters = sum(4 * p.numel() for p in student.trainable().values())
    assert adapters > 0
    assert tensor_bytes(teacher, student.model, student.as_teacher()) == base + adapters
    full = make(teacher, None)
    assert tensor_bytes(teacher, full.model) == 2 * base


def test_teacher_is_untouched_by_creating_training_and_deleting_a_student() -> None:
    teacher = tiny.video_model()
    x, cond = tiny.latents(), tiny.condition()
    names = [name for name, _ in teacher.module.named_modules()]
    values = {name: p.clone() for name, p in teacher.module.named_parameters()}
    fingerprint, output = teacher.fingerprint, teacher.velocity(x, 0.5, cond)

    student = make(teacher)
    optimizer = torch.optim.SGD(student.trainable().values(), lr=0.1)
    for _ in range(2):
        student.velocity(x, 0.5, cond).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(student.velocity(x, 0.5, cond), output)
    assert torch.equal(student.as_teacher().velocity(x, 0.5, cond), output)
    del student, optimizer
    gc.collect()

    assert [name for name, _ in teacher.module.named_modules()] == names
    for name, p in teacher.module.named_parameters():
        assert torch.equal(p, values[name]) and p.grad is None and not p.requires_grad
    assert torch.equal(teacher.velocity(x, 0.5, cond), output)
    assert replace(teacher, _fingerprint="").fingerprint == fingerprint


def test_a_student_has_its_teachers_fingerprint_computed_or_not() -> None:
    teacher = tiny.video_model()
    student = make(teacher)
    assert replace(student.model, _fingerprint="").fingerprint == teacher.fingerprint


def gradients(student: Student, checkpointing: bool) -> dict[str, torch.Tensor]:
    if checkpointing:
        student.model.module.enable_gradient_checkpointing()  # pyright: ignore
    x, cond = tiny.latents(), tiny.condition()
    teacher = student.as_teacher()
    # As in adversarial training: the teacher looks at what the student makes, in one graph.
    loss = teacher.features(student.velocity(x, 0.8, cond), 0.3, cond, [3])[0].square().mean()
    teacher.velocity(x, 0.8, cond)  # a pass of the teacher between forward and backward
    loss.backward()
    return {name: p.grad.clone() for name, p in student.trainable().items()}  # pyright: ignore


def test_gradients_equal_those_of_checkpointing_and_of_two_separate_copies() -> None:
    """One copy of the weights, whatever recomputes them, gives the gradients of two copies."""
    teacher = tiny.video_model()
    student = make(teacher)
    shake(student)
    plain = gradients(student.clone(), checkpointing=False)
    recomputed = gradients(student.clone(), checkpointing=True)

    apart = replace(teacher, module=copy.deepcopy(teacher.module))
    two = Student.create(teacher, student.info)
    two.load_state_dict(student.state_dict())
    separate = gradients(Student(two.model, two.info, apart), checkpointing=False)
    assert tensor_bytes(two.model, apart) > 1.9 * tensor_bytes(teacher)

    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(separate[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_frozen_teacher_with_checkpointing_gives_the_same_gradients() -> None:
    teacher = tiny.video_model()
    saving = replace(teacher, module=shared_copy(teacher.module))
    saving.module.enable_gradient_checkpointing()  # pyright: ignore
    results = []
    for model in (teacher, saving):
        x = tiny.latents().requires_grad_()
        model.features(x, 0.5, tiny.condition(), [1, 3])[1].square().mean().backward()
        results.append(x.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in teacher.module.modules())


def test_trained_weights_are_float32_on_a_bfloat16_base() -> None:
    teacher = tiny.video_model()
    teacher.module.to(torch.bfloat16)
    x, cond = tiny.latents(), tiny.condition()
    expected = teacher.velocity(x, 0.7, cond)
    for lora in (LoraSpec(rank=4), None):
        student = make(teacher, lora)
        assert {p.dtype for p in student.trainable().values()} == {torch.float32}
        assert {p.dtype for p in student.state_dict().values()} == {torch.float32}
        student.velocity(x, 0.7, cond).float().square().mean().backward()
    assert torch.equal(make(teacher).velocity(x, 0.7, cond), expected)
    assert teacher.dtype is torch.bfloat16


def test_adapters_follow_from_the_seed_alone() -> None:
    teacher = tiny.video_model()
    before = torch.random.get_rng_state()
    first = make(teacher, seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = make(teacher, seed=1).state_dict(), make(teacher, seed=2).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    a = [name for name in first if ".lora_A." in name]
    assert a and all(not torch.equal(first[name], other[name]) for name in a)
    assert all((x == 0).all() for name, x in first.items() if ".lora_B." in name)
    assert all(x.abs().max() <= x.shape[1] ** -0.5 for x in (first[name] for name in a))


def test_names_of_trained_weights() -> None:
    names = list(make(tiny.video_model()).state_dict())
    assert "transformer_blocks.0.attn.to_q.lora_A.weight" in names
    assert "single_transformer_blocks.1.proj_out.lora_B.weight" in names
    assert not any("default" in name or "base_layer" in name for name in names)
    full = make(tiny.video_model(), None)
    assert set(full.state_dict()) == set(tiny.network().state_dict())


def test_a_clone_is_equal_and_apart() -> None:
    student = make(tiny.video_model())
    shake(student)
    before = student.state_dict()
    twin = student.clone()
    assert all(torch.equal(x, before[name]) for name, x in twin.state_dict().items())
    shake(twin)
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())


def test_works_inside_inference_mode() -> None:
    teacher = tiny.video_model()
    with torch.inference_mode():
        student = make(teacher)
        student.load_state_dict(make(teacher, seed=3).state_dict())
    student.velocity(tiny.latents(), 0.5, tiny.condition()).square().mean().backward()
    b = student.trainable()["transformer_blocks.0.attn.to_q.lora_B.weight"]
    assert b.grad is not None and b.grad.abs().max() > 0


def test_info_survives_the_header() -> None:
    info = info_for(tiny.video_model(), LoraSpec(rank=8, targets=("to_q", "to_k")))
    metadata = info.as_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert StudentInfo.from_metadata({**metadata, "format": "pt"}) == info
    full = replace(info, lora=None, guidance=None)
    assert StudentInfo.from_metadata(full.as_metadata()) == full
    with pytest.raises(AccVideoError, match="choose a file that AccVideo saved"):
        StudentInfo.from_metadata({"format": "pt"})


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraSpec(rank=33), "rank 33 is more than the width 32"),
        (LoraSpec(targets=("nothing",)), "no linear layer is called like"),
    ],
)
def test_impossible_adapters_are_refused(lora: LoraSpec, message: str) -> None:
    with pytest.raises(AccVideoError, match=message):
        make(tiny.video_model(), lora)


def test_bad_values_are_refused() -> None:
    with pytest.raises(AccVideoError, match="rank is 0"):
        LoraSpec(rank=0)
    with pytest.raises(AccVideoError, match="alpha is -1"):
        LoraSpec(alpha=-1)
    student = make(tiny.video_model())
    state = student.state_dict()
    name = next(iter(state))
    with pytest.raises(AccVideoError, match=f"1 weights do not fit this student, '{name}'"):
        student.load_state_dict({**state, name: torch.zeros(1)})
    with pytest.raises(AccVideoError, match="2 weights do not fit"):
        student.load_state_dict({**state, "x": torch.zeros(1), "y": torch.zeros(1)})


def test_students_of_any_steps_take_the_familys_grid_but_not_its_lowest_level() -> None:
    for steps in (1, 2, 4, 8):
        flow, edm = FAMILIES["hunyuan_video"], FAMILIES["svd"]
        assert student_grid(flow, steps) == flow.time_grid(steps)
        times = student_grid(edm, steps)
        assert len(times) == steps + 1 and times[0] == 1.0 and times[-1] == 0.0
        assert times[-2] > 0.02 > edm.time_grid(max(2, steps))[-2]

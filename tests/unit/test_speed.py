"""What speeds a model up changes no result where it says so, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_families
import torch
from torch import Tensor, nn
from updates import FarAway

from accvideo_core import speed as speeding
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.errors import AccVideoError
from accvideo_core.models import VideoModel, placement
from accvideo_core.models.fp8 import fp8_products
from accvideo_core.models.packing import pack_weights
from accvideo_core.sampling import sample
from accvideo_core.speed import CHOICES, Speed, check_exact, check_speed, sped_up

TIMES = (1.0, 0.6, 0.0)
FAMILIES = ("hunyuan_video", "wan_t2v", "wan22_i2v", "cogvideox_5b")
EXACT: dict[str, dict[str, Any]] = {
    "nothing": {},
    "attention": {"attention": "math"},
    "swapping": {"swap_blocks": 2},
    "all blocks": {"swap_blocks": 3},
    "compiled": {"compile": True},
    "compiled and swapped": {"attention": "math", "compile": True, "swap_blocks": 2},
}


def sampled(model: VideoModel, case: tiny_families.Case) -> Tensor:
    return sample(model, case.condition, case.x, TIMES)


@cache
def expected(family: str) -> Tensor:
    case = tiny_families.case(family)
    return sampled(case.model, case)


def student_of(model: VideoModel, lora: bool) -> VideoModel:
    """A (random) student's network, with adapters or with weights of its own."""
    size = LoraSpec(rank=2) if lora else None
    family, spec = model.family.name, model.latent_spec
    student = Student.create(model, StudentInfo(family, "", TIMES, None, size, spec, 5, 16, 16))
    generator = torch.Generator().manual_seed(5)
    for p in student.trainable().values():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return student.model


def structure(model: VideoModel) -> dict[str, Any]:
    """All of a model that speeding it up might leave changed; not where its tensors lie."""
    found: dict[str, Any] = {"": (model.family, model.fingerprint)}
    for name, module in model.module.named_modules():
        hooks = (len(module._forward_pre_hooks), len(module._forward_hooks))
        found[name] = (
            *(type(module), getattr(module, "processor", None), *hooks),
            {key: x for key, x in module.__dict__.items() if key == "forward"},
        )
    for name, p in model.module.named_parameters():
        found[name] = (id(p), p.requires_grad, p.device, p.dtype, p.shape, p.sum().item())
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", EXACT.values(), ids=EXACT)
def test_exact_speed_changes_no_result(family: str, how: dict[str, Any]) -> None:
    case = tiny_families.case(family)
    before = structure(case.model)
    with sped_up(case.model, Speed(**how), transfer=FarAway(), backend="eager") as fast:
        found = sampled(fast, case)
    assert (found - expected(family)).abs().max() < 1e-5 * expected(family).abs().max()
    assert structure(case.model) == before
    assert torch.equal(sampled(case.model, case), expected(family))


@pytest.mark.parametrize(
    "how", [{}, {"compile": True, "swap_blocks": 2, "attention": "math"}], ids=["fp8", "all"]
)
def test_fp8_rounds_the_same_with_everything_else(how: dict[str, Any]) -> None:
    case = tiny_families.case("hunyuan_video")
    model = pack_weights(case.model, "fp8")
    plain = sampled(model, case)
    with fp8_products(model):
        rounded = sampled(model, case)
    before = structure(model)
    with sped_up(model, Speed(fp8=True, **how), transfer=FarAway(), backend="eager") as fast:
        found = sampled(fast, case)
    # Where sums come in another order, a few numbers fall to the other side of a rounding.
    assert (plain - rounded).norm() > 1e-3 * plain.norm()
    assert (found - rounded).norm() < 0.1 * (plain - rounded).norm()
    assert structure(model) == before


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_students_are_sped_up_and_their_teacher_stays_as_it_is(lora: bool) -> None:
    case = tiny_families.case("hunyuan_video")
    model = student_of(case.model, lora)
    plain = sampled(model, case)
    before = structure(model), structure(case.model)
    how = Speed(attention="math", compile=True, swap_blocks=3)
    with sped_up(model, how, transfer=FarAway(), backend="eager") as fast:
        found = sampled(fast, case)
        # What was trained waits too: of three blocks of four, all but the one that computed last.
        blocks = model.family.blocks(model.module)
        here = [sum(p.numel() for p in block.parameters()) > 0 for block in blocks]
        assert here.count(True) == 2
    assert (plain - sampled(case.model, case)).abs().max() > 1e-3
    assert (found - plain).abs().max() < 1e-5 * plain.abs().max()
    assert (structure(model), structure(case.model)) == before


class Replays:
    """Records nothing, and computes again; counts what it was asked to record."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        result = work()

        def replay() -> None:
            for kept, x in zip(result, work(), strict=True):
                kept.copy_(x)

        return result, replay


@pytest.mark.parametrize("how", [{}, {"swap_blocks": 2}], ids=["compiled", "swapped"])
def test_batches_with_and_without_padding_follow_one_another(how: dict[str, Any]) -> None:
    case = tiny_families.case("hunyuan_video")
    lengths = torch.ones(2, 5, dtype=torch.bool).tril(3)  # 4 and 5 tokens
    batches = [
        replace(case, condition=replace(case.condition, mask=mask))
        for mask in (None, lengths, None, lengths.flip(0), lengths)
    ]
    plain = [sampled(case.model, batch) for batch in batches]
    with sped_up(case.model, Speed(compile=True, **how), backend="eager") as model:
        found = [sampled(model, batch) for batch in batches]
    for one, other in zip(found, plain, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize("how", [{}, {"compile": True}], ids=["graphs", "compiled"])
def test_a_step_is_recorded_once_for_texts_of_the_same_lengths(how: dict[str, Any]) -> None:
    case, recorder = tiny_families.case("hunyuan_video"), Replays()
    before = structure(case.model)
    lengths = torch.ones(2, 5, dtype=torch.bool).tril(3)  # 4 and 5 tokens
    conditions = [replace(case.condition, mask=mask) for mask in (None, lengths, lengths.flip(0))]
    batches = [replace(case, condition=condition) for condition in (*conditions, conditions[0])]
    plain = [sampled(case.model, batch) for batch in batches]
    fast, counts, found = Speed(cuda_graphs=True, **how), [], []
    with sped_up(case.model, fast, recorder=recorder, backend="eager") as model:
        for batch in batches:
            found.append(sampled(model, batch))
            counts.append(recorder.recorded)
    assert counts == [1, 2, 3, 3]
    for one, other in zip(found, plain, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()
    assert structure(case.model) == before


def test_a_sampling_that_is_cancelled_leaves_nothing_behind() -> None:
    case = tiny_families.case("wan_t2v")
    before = structure(case.model)
    how = Speed(attention="math", compile=True, swap_blocks=2)
    with pytest.raises(KeyboardInterrupt), sped_up(case.model, how, backend="eager"):
        raise KeyboardInterrupt
    assert structure(case.model) == before


def test_it_works_in_inference_mode_and_the_model_can_be_trained_through_afterwards() -> None:
    case = tiny_families.case("hunyuan_video")
    model = student_of(case.model, lora=True)
    with torch.inference_mode(), sped_up(model, Speed(swap_blocks=2)) as fast:
        sampled(fast, case)
    v = model.velocity(case.x, 0.5, case.condition)
    v.square().mean().backward()
    assert all(p.grad is not None for p in model.module.parameters() if p.requires_grad)


def test_blocks_that_wait_never_pass_through_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny_families.case("hunyuan_video")
    came: list[nn.Module] = []

    @contextmanager
    def visiting(module: nn.Module, _device: Any, waiting: list[nn.Module]) -> Iterator[None]:
        came.extend(part for part, _, _ in placement.apart([module], nn.ModuleList(waiting)))
        yield

    monkeypatch.setattr(speeding, "visiting", visiting)
    blocks = case.model.family.blocks(case.model.module)
    with sped_up(case.model, Speed(swap_blocks=4), torch.device("cpu")):
        pass
    assert came and not {*came} & {part for block in blocks for part in block.modules()}


def test_without_speed_a_model_is_left_alone() -> None:
    case = tiny_families.case("hunyuan_video")
    processors = [b.attn.processor for b in case.model.module.transformer_blocks]  # type: ignore[union-attr]
    with sped_up(case.model, None) as fast:
        assert fast is case.model
        assert [b.attn.processor for b in case.model.module.transformer_blocks] == processors  # type: ignore[union-attr]


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"attention": "quick"}, ("speed.attention is 'quick'", "sdpa", "sage", "flex")),
        ({"sparse": "much"}, ("speed.sparse is 'much'", "dense", "radial")),
        ({"cfg_batch": "never"}, ("speed.cfg_batch is 'never'", "in turn")),
        ({"swap_blocks": -1}, ("speed.swap_blocks is -1", "0 for none")),
        ({"cuda_graphs": True, "swap_blocks": 4}, ("cuda_graphs", "swap_blocks 4", "leave one")),
    ],
)
def test_settings_that_nothing_could_have_are_refused(
    how: dict[str, Any], words: tuple[str, ...]
) -> None:
    assert_says(refusal(lambda: Speed(**how)), *words)


def divided_config() -> Any:
    """As diffusers marks a processor whose sequence two processes divide."""
    mesh = SimpleNamespace(get_group=lambda: "both")
    return SimpleNamespace(context_parallel_config=SimpleNamespace(_ulysses_mesh=mesh))


def test_what_the_model_or_the_device_lacks_is_refused_before_anything_is_done() -> None:
    case = tiny_families.case("hunyuan_video")
    before = structure(case.model)

    def entered(**how: Any) -> None:
        with sped_up(case.model, Speed(**how)):
            pass

    assert_says(refusal(lambda: entered(swap_blocks=5)), "swap_blocks is 5", "4 blocks", "most 4")
    assert_says(refusal(lambda: entered(cuda_graphs=True)), "CUDA graphs", "on cpu", "leave CUDA")
    text = refusal(lambda: entered(fp8=True, swap_blocks=2))
    assert_says(text, "fp8", "swap_blocks 2", "--weights fp8")
    case.model.module.transformer_blocks[0].attn.processor._parallel_config = divided_config()  # type: ignore[union-attr]
    text = refusal(lambda: check_speed(Speed(cuda_graphs=True), case.model))
    assert_says(text, "cuda_graphs", "divided", "leave one")
    case.model.module.transformer_blocks[0].attn.processor._parallel_config = None  # type: ignore[union-attr]
    assert structure(case.model) == before


@pytest.mark.parametrize(
    ("how", "field"),
    [({"sparse": "radial"}, "sparse"), ({"fp8": True}, "fp8"), ({"attention": "sage"}, "sage")],
)
def test_what_changes_answers_is_not_recorded(how: dict[str, Any], field: str) -> None:
    check_exact(None)
    check_exact(Speed(attention="math", compile=True, swap_blocks=2))
    assert_says(refusal(lambda: check_exact(Speed(**how))), field, "leave it out")


def test_every_choice_can_be_chosen() -> None:
    for name, choices in CHOICES.items():
        for choice in choices:
            assert getattr(replace(Speed(), **{name: choice}), name) == choice


def refusal(work: Any) -> str:
    with pytest.raises(AccVideoError) as caught:
        work()
    text = str(caught.value)
    assert "\n" not in text and len(text) > 40
    return text


def assert_says(text: str, *words: str) -> None:
    assert all(word in text for word in words), text

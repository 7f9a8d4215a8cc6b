"""Attention kernels: the one that was asked for runs, exactly, and nothing of it is left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_kernels import PACKAGES, add_maskless, install
from tiny_families import NAMES, Case, case
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from accvideo_core.conditioning import Condition
from accvideo_core.errors import AccVideoError
from accvideo_core.models.attention import attention, decided
from accvideo_core.models.experts import networks_of
from accvideo_core.models.processors import Processor

OPERATION = {
    "sdpa": "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flash": "aten::_scaled_dot_product_flash_attention_for_cpu",
    "math": "aten::_scaled_dot_product_attention_math",
}
ONE_OF_EACH = ("hunyuan_video", "wan_i2v", "cogvideox_5b", "svd")


@pytest.fixture
def no_masks(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a kernel that takes none."""
    return add_maskless(monkeypatch)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def processors(made: Case) -> list[Any]:
    modules = made.model.module.modules()
    return [found for m in modules if (found := getattr(m, "processor", None)) is not None]


def operations(made: Case) -> dict[str, int]:
    """How often each attention kernel ran on one question."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        made.model.velocity(made.x, 0.4, made.condition)
    return {e.key: e.count for e in seen.key_averages() if e.key.startswith("aten::_scaled_dot")}


def attending(made: Case) -> list[Any]:
    """The attention modules of one network's blocks."""
    network = made.model.expert(0.4)
    modules = [m for b in made.model.family.body_of(network) for m in b.modules()]
    return [m for m in modules if hasattr(m, "processor")]


def attentions(made: Case) -> int:
    """How often one network's blocks attend."""
    found = attending(made)
    images = [m for m in found if getattr(m, "add_k_proj", None) is not None]
    return len(found) + (len(images) if made.model.family.name == "wan_i2v" else 0)


def ragged(made: Case, lengths: tuple[int, ...] = (5, 5, 3)) -> Case:
    """As many samples, of which some have a shorter text."""
    rows = [0] * len(lengths)
    condition = made.condition.select(rows)
    generator = torch.Generator().manual_seed(7)
    text = torch.randn(len(rows), 5, condition.text.shape[2], generator=generator)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    x = torch.randn(len(rows), *made.x.shape[1:], generator=generator)
    return replace(made, x=x, condition=replace(condition, text=text, mask=mask))


# What is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_family_computes_what_diffusers_processors_compute(name: str) -> None:
    made = case(name)
    expected = made.velocities(made.model)
    for kernel in ("auto", "math"):
        with attention(made.model, kernel):
            # A UNet divides by the deviation of few numbers, which enlarges rounding.
            bound = 1e-6 if made.model.family.joint else 1e-5
            assert difference(made.velocities(made.model), expected) < bound


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bfloat16_is_as_near_to_float32_as_diffusers_is(name: str) -> None:
    made = case(name)
    expected = made.velocities(made.model)
    made.model.module.to(torch.bfloat16)
    theirs = difference(made.velocities(made.model).float(), expected)
    with attention(made.model):
        assert difference(made.velocities(made.model).float(), expected) < 1.5 * theirs


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_gradients_are_those_of_diffusers_processors(name: str) -> None:
    made = case(name)
    made.model.module.requires_grad_(True)
    x = made.x.clone().requires_grad_(True)
    parameters = [p for p in made.model.expert(0.4).parameters()]

    def gradients() -> list[Tensor]:
        v = made.model.velocity(x, 0.4, made.condition)
        found = torch.autograd.grad(v.square().sum(), [x, *parameters], allow_unused=True)
        return [g for g in found if g is not None]

    expected = gradients()
    with attention(made.model):
        found = gradients()
    assert len(found) == len(expected) > 10
    norm = torch.stack([g.norm() for g in expected]).max()
    for g, reference in zip(found, expected, strict=True):
        assert (g - reference).norm() < 1e-5 * norm


def test_features_are_those_of_diffusers_processors() -> None:
    made = ragged(case("hunyuan_video"))
    expected = made.model.features(made.x, 0.4, made.condition, [0, 3])
    with attention(made.model, "sdpa"):
        found = made.model.features(made.x, 0.4, made.condition, [0, 3])
    for one, other in zip(found, expected, strict=True):
        assert difference(one, other) < 1e-6


@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video_i2v_replace"])
def test_text_without_padding_is_the_same_as_text_padded_to_256_tokens(name: str) -> None:
    made = case(name)
    text = torch.nn.functional.pad(made.condition.text, (0, 0, 0, 256 - 5))
    mask = (torch.arange(256) < 5).expand(len(text), -1)
    padded = replace(made.condition, text=text, mask=mask)
    network, family = made.model.module, made.model.family
    t = torch.full((len(text),), 0.4)
    expected = family.forward(network, made.x, t, padded)  # diffusers', with all the padding
    with attention(made.model, "flash"):
        assert difference(made.model.velocity(made.x, 0.4, padded), expected) < 1e-6


@pytest.mark.parametrize("lengths", [(5, 5, 3), (1, 5, 1), (4, 2, 3)])
def test_samples_of_different_lengths_are_computed_without_a_mask(
    lengths: tuple[int, ...], no_masks: str
) -> None:
    made = ragged(case("hunyuan_video"), lengths)
    expected = made.velocities(made.model)
    with attention(made.model, no_masks):
        assert difference(made.velocities(made.model), expected) < 1e-6


def test_padding_in_the_text_changes_nothing(no_masks: str) -> None:
    made = ragged(case("hunyuan_video"))
    text = made.condition.text.masked_fill(~made.condition.full_mask()[..., None], 1e3)
    loud = replace(made, condition=replace(made.condition, text=text))
    with attention(made.model, no_masks):
        quiet = made.velocities(made.model)
        assert difference(loud.velocities(made.model), quiet) < 1e-6


def test_one_prompt_and_prompts_of_one_length_leave_the_mask_out() -> None:
    made = case("hunyuan_video")
    mask = torch.arange(9) < 5
    padded = Condition(
        text=torch.nn.functional.pad(made.condition.text, (0, 0, 0, 4)),
        mask=mask.expand(2, -1),
        pooled=made.condition.pooled,
    )
    assert padded.unmasked().mask is None
    assert padded.unmasked().text.shape[1] == 5
    uneven = replace(padded, mask=torch.stack([mask, torch.arange(9) < 3]))
    assert uneven.unmasked().mask is not None
    assert uneven.select(1).unmasked().mask is None


def test_basic_transformer_blocks_of_diffusers_are_computed(no_masks: str) -> None:
    """Self- and cross-attention of a UNet such as Stable Video Diffusion's."""
    from diffusers.models.attention import BasicTransformerBlock

    block: Any = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24)
    block.eval().requires_grad_(False)
    made = case("wan_t2v")
    network = torch.nn.Module()
    network.add_module("block", block)
    network.to(made.x)
    generator = torch.Generator().manual_seed(0)
    tokens, text = (torch.randn(2, *size, generator=generator) for size in ((9, 32), (5, 24)))

    def forward(_network: Any, *_asked: Any) -> Tensor:
        return block(tokens, encoder_hidden_states=text)

    family = replace(made.model.family, forward=forward, blocks=lambda _network: [block])
    model = replace(made.model, module=network, family=family)
    expected = model.velocity(made.x, 0.4, made.condition)
    for kernel in ("math", no_masks):
        with attention(model, kernel):
            assert difference(model.velocity(made.x, 0.4, made.condition), expected) < 1e-6
            assert isinstance(block.attn2.processor, Processor)


# Which kernel runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "name"),
    [*(("math", name) for name in NAMES), *(("flash", name) for name in ONE_OF_EACH)],
)
def test_the_kernel_that_is_asked_for_runs(name: str, kernel: str) -> None:
    made = case(name)
    with attention(made.model, kernel):
        ran = operations(made)
    # HunyuanVideo's text is refined before the blocks, by diffusers' own attention.
    expected = {OPERATION["flash"]: int(name.startswith("hunyuan"))}
    expected[OPERATION[kernel]] = expected.get(OPERATION[kernel], 0) + attentions(made)
    assert ran == {operation: count for operation, count in expected.items() if count}


@pytest.mark.parametrize("kernel", list(PACKAGES))
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_package_is_called_for_every_attention(
    name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install(monkeypatch, kernel)
    made = case(name)
    expected = made.model.velocity(made.x, 0.4, made.condition)
    with attention(made.model, kernel):
        calls.clear()  # the one that shows whether it runs
        found = made.model.velocity(made.x, 0.4, made.condition)
        assert len(calls) == attentions(made)
        made.model.velocity(made.x, 0.95, made.condition)  # another expert's, where there is one
    assert difference(found, expected) < 1e-6
    heads = {(m.heads, m.inner_dim // m.heads) for m in attending(made)}
    assert {shape[2:] for shape, _ in calls} == heads
    assert all(options == {"tensor_layout": "NHD"} for _, options in calls if kernel == "sage")


def test_a_package_may_give_more_than_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash3", result=lambda out: (out, "log-sum-exp"))
    made = case("wan_t2v")
    expected = made.velocities(made.model)
    with attention(made.model, "flash3"):
        assert difference(made.velocities(made.model), expected) < 1e-6


def test_two_models_use_different_kernels_at_the_same_time() -> None:
    one, other = case("hunyuan_video"), case("cogvideox_5b")
    with attention(one.model, "math"), attention(other.model, "flash"):
        assert OPERATION["math"] in operations(one)
        assert OPERATION["math"] not in operations(other)


def test_a_kernel_within_another_lasts_for_its_own_time() -> None:
    made = case("wan_t2v")
    with attention(made.model, "flash"):
        with attention(made.model, "math"):
            assert operations(made) == {OPERATION["math"]: attentions(made)}
        assert operations(made) == {OPERATION["flash"]: attentions(made)}


# What is left ---------------------------------------------------------------------------------


class Strange:
    """An attention processor that nobody knows."""


def settings(made: Case) -> tuple[Any, ...]:
    """All that a switch could leave behind."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    structure = [(name, set(vars(m))) for name, m in made.model.module.named_modules()]
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in made.model.module.modules()
    ]
    flags = (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    inner = [dict(vars(p)) for p in processors(made)]
    active = _AttentionBackendRegistry.get_active_backend()[0]
    return processors(made), made.model.family, structure, hooks, flags, inner, active


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_afterwards(name: str) -> None:
    made = case(name)
    before, expected = settings(made), made.velocities(made.model)
    with attention(made.model, "math"):
        found = made.velocities(made.model)
        assert settings(made) != before
    assert settings(made) == before
    assert made.velocities(made.model).equal(expected)
    assert found.shape == expected.shape


def test_nothing_is_left_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case("wan22_t2v")
    before = settings(made)
    with pytest.raises(KeyError), attention(made.model, "math"):
        made.velocities(made.model)
        raise KeyError
    assert settings(made) == before
    with pytest.raises(AccVideoError), attention(made.model, "sage"):
        pass
    assert settings(made) == before
    # The second expert's attention is not one that is known.
    low = networks_of(made.model.module)["low"]
    monkeypatch.setattr(low.get_submodule("blocks.0.attn1"), "processor", Strange())
    before = settings(made)
    with pytest.raises(AccVideoError, match="computed by Strange"), attention(made.model):
        pass
    assert settings(made) == before


def test_nothing_of_a_forward_pass_is_kept_for_the_next_one(no_masks: str) -> None:
    made = ragged(case("hunyuan_video"))
    with attention(made.model, no_masks):
        attend = next(p for p in processors(made) if isinstance(p, Processor)).attend
        made.velocities(made.model)
        assert (attend.known, attend.parts, attend.mask) == (False, (), None)
        broken = replace(made.condition, pooled=None)
        with pytest.raises(AccVideoError, match="pooled"):
            made.model.velocity(made.x, 0.4, broken)
        assert (attend.known, attend.parts, attend.mask) == (False, (), None)


def test_a_network_that_is_asked_past_the_model_is_given_masks() -> None:
    made = ragged(case("hunyuan_video"))
    other = replace(made, model=replace(made.model))
    expected = other.velocities(other.model)
    with attention(made.model, "flash"):
        assert difference(other.velocities(other.model), expected) < 1e-6


def test_a_network_that_is_asked_past_the_model_is_refused_without_masks(no_masks: str) -> None:
    made = ragged(case("hunyuan_video"))
    other = replace(made.model)
    with attention(made.model, no_masks):
        with pytest.raises(AccVideoError, match=f"{no_masks!r} takes no mask; choose .* or math"):
            other.velocity(made.x, 0.4, made.condition)


def test_what_was_decided_for_a_pass_tells_batches_of_one_size_apart(no_masks: str) -> None:
    made = case("hunyuan_video")
    blocks = made.model.family.blocks(made.model.module)
    told = []
    blocks[0].register_forward_pre_hook(lambda *_: told.append(decided(blocks)))
    made.velocities(made.model)
    for lengths in ((5, 5), (5, 3), (5, 3), (5, 2)):
        with attention(made.model, no_masks):
            uneven = ragged(made, lengths)
            made.model.velocity(uneven.x, 0.4, uneven.condition)
            assert decided(blocks) is None
    with attention(made.model, "math"):
        made.model.velocity(made.x, 0.4, made.condition)
    assert told[:2] == [None, None]
    whole, one, same, other, plain = told[2:]
    assert one == same
    assert len({whole, one, other, plain}) == 4


def test_gradient_checkpointing_is_refused() -> None:
    made = case("wan_t2v")
    made.model.module.enable_gradient_checkpointing()  # type: ignore[operator]
    with attention(made.model):
        made.model.module.requires_grad_(True)
        with pytest.raises(AccVideoError, match="gradient checkpointing"):
            made.model.velocity(made.x, 0.4, made.condition)
        with torch.no_grad():
            made.model.velocity(made.x, 0.4, made.condition)


# Compiled blocks ------------------------------------------------------------------------------


def test_compiled_blocks_use_the_kernel_and_are_compiled_once_for_all_lengths() -> None:
    made = case("hunyuan_video")
    compiled = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    block: Any = made.model.family.blocks(made.model.module)[0]
    whole, uneven, other = (ragged(made, lengths) for lengths in ((5, 5), (5, 3), (2, 5)))
    expected = [asked.model.velocity(asked.x, 0.4, asked.condition) for asked in (whole, uneven)]
    with attention(made.model, "math"):
        block.forward = torch.compile(block.forward, backend=backend)
        found = whole.model.velocity(whole.x, 0.4, whole.condition)
        assert len(compiled) == 1  # in one piece
        ran = operations(whole)
        found = [found, uneven.model.velocity(uneven.x, 0.4, uneven.condition)]
        before = len(compiled)
        other.model.velocity(other.x, 0.4, other.condition)
        assert len(compiled) == before
    assert all(difference(*both) < 1e-6 for both in zip(found, expected, strict=True))
    assert ran[OPERATION["math"]] == attentions(made)

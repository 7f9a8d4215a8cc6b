"""Attention kernels on a card: each computes the plain formula, and is the one that runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_families import Case, case
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from accvideo_core.errors import AccVideoError
from accvideo_core.models import fastest
from accvideo_core.models.attention import attention
from accvideo_core.models.fastest import CANDIDATES, Shape
from accvideo_core.models.kernels import KERNELS, Numbers, Run, ready
from accvideo_core.models.sparse import Radial, block_mask, token_mask

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

OPERATION = {
    "cudnn": "aten::_scaled_dot_product_cudnn_attention",
    "flash": "aten::_scaled_dot_product_flash_attention",
    "efficient": "aten::_scaled_dot_product_efficient_attention",
}


def numbers(head_size: int = 128) -> Numbers:
    return Numbers(device=DEVICE, dtype=torch.bfloat16, head_size=head_size)


def runs(kernel: str, head_size: int = 128) -> Run:
    try:
        return ready(KERNELS[kernel], numbers(head_size))
    except AccVideoError as error:
        pytest.skip(str(error))


def tokens(count: int, head_size: int = 128) -> tuple[Tensor, ...]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    size = (3, 2, count, 4, head_size)
    return torch.randn(size, generator=generator, device=DEVICE).to(torch.bfloat16).unbind()


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def on_device(name: str) -> Case:
    made = case(name)
    made.model.module.to(DEVICE, torch.bfloat16)
    return made


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_a_kernel_computes_the_formula(kernel: str, head_size: int) -> None:
    run = runs(kernel, head_size)
    q, k, v = tokens(1000, head_size)
    expected = KERNELS["math"].load(DEVICE)(q.double(), k.double(), v.double(), None)
    assert difference(run(q, k, v, None), expected) < (0.01 if KERNELS[kernel].exact else 0.1)


@pytest.mark.parametrize("kernel", list(OPERATION))
def test_the_kernel_that_is_asked_for_runs(kernel: str) -> None:
    run = runs(kernel)
    q, k, v = tokens(256)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run(q, k, v, None)
    ran = {event.key for event in seen.key_averages()}
    assert {operation for operation in OPERATION.values() if operation in ran} == {
        OPERATION[kernel]
    }


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if nothing had been measured yet."""
    monkeypatch.setattr(fastest, "_found", {})
    yield


def test_auto_takes_a_kernel_that_runs_and_measures_once(
    forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape.near(numbers(), heads=24, tokens=8000)
    found = fastest.fastest(shape)
    assert found.name in (*CANDIDATES, "sdpa")
    monkeypatch.setattr(fastest, "_measured", None)  # would fail if it were called
    assert fastest.fastest(shape) is found


@pytest.mark.parametrize("name", ["hunyuan_video", "wan_i2v", "cogvideox_5b"])
def test_a_question_about_whole_texts_waits_for_nothing(name: str) -> None:
    made = on_device(name)
    model, x = made.model, made.x.to(DEVICE)
    expected = model.velocity(x, 0.4, made.condition)
    with attention(model), model.steady(), torch.no_grad():
        condition = model.prepared(made.condition)
        model.answer(x, 0.4, condition)
        torch.cuda.set_sync_debug_mode("error")
        try:
            v = model.answer(x, 0.4, condition)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert difference(v, expected) < 1e-2


@pytest.mark.parametrize("text", [0, 77])
def test_the_sparse_pattern_is_what_its_mask_says(text: int) -> None:
    run = runs("flex")
    pattern, grid = Radial(), (12, 16, 20)
    q, k, v = tokens(12 * 16 * 20 + text)
    found = run(q, k, v, block_mask(pattern, grid, text, DEVICE))
    expected = KERNELS["sdpa"].load(DEVICE)(q, k, v, token_mask(pattern, grid, text, DEVICE))
    assert difference(found, expected) < 0.01
    assert difference(expected, run(q, k, v, None)) > 0.01


@pytest.mark.parametrize("kernel", [*CANDIDATES, "sage", "flex"])
def test_compiled_blocks_use_the_kernel(kernel: str) -> None:
    runs(kernel, 16)
    made = on_device("hunyuan_video")
    expected = made.velocities(made.model)
    with attention(made.model, kernel):
        for block in made.model.family.blocks(made.model.module):
            block.forward = torch.compile(block.forward)
        assert difference(made.velocities(made.model), expected) < 0.1

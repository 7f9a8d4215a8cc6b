"""What one sampling step costs, on a card: it waits for nothing, is replayed, compiled, in fp8."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from tiny_families import Case, case

from accvideo_core.flow import time_grid
from accvideo_core.guidance import Cfg, Guided
from accvideo_core.models.compiling import compiled_blocks
from accvideo_core.models.cuda_graphs import graphed
from accvideo_core.models.fp8 import (
    CAPABILITY,
    FP8,
    fp8_products,
    product_for,
    rounded_rows,
    scaled_afterwards,
    scaled_rows,
)
from accvideo_core.monitor import Progress
from accvideo_core.sampling import HasVelocity, sample
from accvideo_core.solvers import SOLVERS

DEVICE = torch.device("cuda")
TIMES = time_grid(4, 2.0)
FAMILIES = ["hunyuan_video", "wan_i2v", "wan22_t2v", "wan22_ti2v", "cogvideox_2b", "cogvideox_1_5"]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_device(name: str) -> Case:
    made = case(name)
    made.model.module.to(DEVICE)
    return made


def negative_of(made: Case) -> Guided:
    one = made.condition.select(0)
    return Guided(made.model, replace(one, text=-one.text), Cfg(3.0))


def sampled_without_waiting(asked: HasVelocity, made: Case, solver: str = "euler") -> torch.Tensor:
    """Every wait after the first step is an error."""
    with ExitStack() as loop:
        loop.callback(torch.cuda.set_sync_debug_mode, "default")

        def monitor(progress: Progress) -> None:
            # The last step is followed by the check of what came out, which waits.
            last = progress.step == progress.total
            torch.cuda.set_sync_debug_mode("default" if last else "error")

        return sample(asked, made.condition, made.x, TIMES, monitor, solver=solver)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_waits_for_the_device(name: str):
    made = on_device(name)
    assert sampled_without_waiting(made.model, made).device.type == "cpu"
    sampled_without_waiting(negative_of(made), made)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_waits_for_the_device(solver: str):
    made = on_device("wan_t2v")
    found = sampled_without_waiting(made.model, made, solver)
    made.model.module.to("cpu")
    expected = sample(made.model, made.condition, made.x, TIMES, solver=solver)
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_give_what_the_network_gives(name: str):
    made = on_device(name)
    other = made.condition.select([1, 0])
    expected = [sample(made.model, cond, made.x, TIMES) for cond in (made.condition, other)]
    with graphed(made.model):
        found = [sample(made.model, cond, made.x, TIMES) for cond in (made.condition, other)]
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(found, expected, strict=True))


def test_compiled_blocks_are_captured_too():
    made = on_device("wan_t2v")
    expected = sample(made.model, made.condition, made.x, TIMES)
    with compiled_blocks(made.model, training=False), graphed(made.model):
        found = sample(made.model, made.condition, made.x, TIMES)
    assert (found - expected).abs().max() < 1e-3


def test_both_questions_are_asked_at_once_where_there_is_room():
    made = on_device("wan_t2v")
    sizes: list[int] = []
    made.model.module.register_forward_pre_hook(
        lambda _m, _args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    asked = negative_of(made)
    found = sample(asked, made.condition, made.x, TIMES)
    assert sizes == [2, 2, 4, 4, 4]
    expected = sample(replace(asked, batched="in turn"), made.condition, made.x, TIMES)
    assert (found - expected).abs().max() < 1e-3


fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY,
    reason="needs a card that multiplies fp8",
)


@fp8
def test_both_ways_to_scale_fp8_products_agree():
    product = product_for(DEVICE)
    generator = torch.Generator().manual_seed(0)
    x, x_scale = rounded_rows(torch.randn(300, 256, generator=generator).to(DEVICE))
    w, w_scale = rounded_rows(torch.randn(128, 256, generator=generator).to(DEVICE))
    exact = (x.float() * x_scale) @ (w.float() * w_scale).t()
    assert x.dtype == FP8 and product in (scaled_rows, scaled_afterwards)
    for one in {product, scaled_afterwards}:
        found = one(x, x_scale, w, w_scale).float()
        assert (found - exact).norm() < 0.01 * exact.norm()


@fp8
@pytest.mark.parametrize("compiled", [False, True])
def test_products_in_fp8_are_near_those_in_bfloat16(compiled: bool):
    made = on_device("cogvideox_5b")
    made.model.module.to(torch.bfloat16)
    exact = sample(made.model, made.condition, made.x, TIMES)
    with ExitStack() as stack:
        stack.enter_context(fp8_products(made.model))
        if compiled:
            stack.enter_context(compiled_blocks(made.model, training=False))
        found = sample(made.model, made.condition, made.x, TIMES)
    assert 1e-3 < (found - exact).norm() / exact.norm() < 0.2

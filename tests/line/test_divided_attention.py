"""Chosen attention kernels in two processes that divide a sample's tokens: the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from accvideo_core.errors import AccVideoError
from accvideo_core.models.attention import attention
from accvideo_core.models.context_parallel import divide_sequence
from accvideo_core.models.kernels import KERNELS, Limits
from accvideo_core.models.sparse import Radial
from accvideo_core.ranks import ALONE, Ranks
from tests.processes import Pair
from tests.tiny_families import case

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("pair")) as processes:
        yield processes


def asked(ranks: Ranks, name: str, lengths: tuple[int, ...]) -> tuple[Any, ...]:
    """A model, divided where there are two, a state of 8 frames and texts of such lengths."""
    made = case(name)
    made.model.module.double()
    generator = torch.Generator().manual_seed(7)
    size = made.condition.text.shape[2]
    condition = replace(
        made.condition.select([0] * len(lengths)),
        text=torch.randn(len(lengths), 5, size, generator=generator),
        mask=torch.arange(5) < torch.tensor(lengths)[:, None],
    )
    frames = made.x.shape[2] if condition.image is not None else 8
    x = torch.randn(len(lengths), made.x.shape[1], frames, *made.x.shape[3:], generator=generator)
    model = made.model if ranks.size == 1 else divide_sequence([made.model], ranks)[0]
    return model, x.double(), condition


def answers(
    ranks: Ranks, name: str, lengths: tuple[int, ...], kernel: str, pattern: Any = "dense"
) -> dict[str, Any]:
    """Velocity, and its gradient by a weight of the first attention."""
    model, x, condition = asked(ranks, name, lengths)
    block: Any = model.family.blocks(model.expert(0.6))[0]
    weight = next(m for m in block.modules() if hasattr(m, "processor")).to_q.weight
    weight.requires_grad_(True)
    with attention(model, kernel, pattern):
        v = model.velocity(x, 0.6, condition)
        (gradient,) = torch.autograd.grad(v.square().sum(), weight)
    return {"v": v.detach().numpy(), "gradient": gradient.numpy()}


def answers_without_masks(ranks: Ranks, *args: Any) -> dict[str, Any]:
    """The same by a kernel that takes no mask."""
    math = KERNELS["math"]
    KERNELS["math"] = replace(math, limits={"any": Limits()})
    try:
        return answers(ranks, *args)
    finally:
        KERNELS["math"] = math


def refusal(ranks: Ranks) -> str:
    """What is said to one who divides a sequence too late."""
    made = case("wan_t2v")
    with attention(made.model, "math"):
        try:
            divide_sequence([made.model], ranks)
        except AccVideoError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("kernel", ["sdpa", "math"])
@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("hunyuan_video", (5,)),  # padded to 6, which two can divide
        ("hunyuan_video", (4, 4)),
        ("hunyuan_video", (5, 3, 3)),
        ("hunyuan_video_i2v_replace", (5,)),
        ("wan_i2v", (5, 3)),
    ],
)
def test_kernels_compute_the_same_over_divided_tokens(
    pair: Pair, name: str, lengths: tuple[int, ...], kernel: str
) -> None:
    expected = answers(ALONE, name, lengths, kernel)
    work = answers_without_masks if kernel == "math" else answers
    one, other = pair(work, name, lengths, kernel, sequence=2)
    for found in (one, other):
        assert abs(found["v"] - expected["v"]).max() < 1e-12
    # Each process has the gradient that comes from its own part of the tokens.
    summed = one["gradient"] + other["gradient"]
    assert abs(summed - expected["gradient"]).max() < 1e-12 * abs(summed).max()


@pytest.mark.parametrize("name", ["hunyuan_video", "wan_t2v"])
def test_sparse_patterns_are_the_same_over_divided_tokens(pair: Pair, name: str) -> None:
    pattern = Radial(block=4)
    expected = answers(ALONE, name, (5, 3), "math", pattern)
    dense = answers(ALONE, name, (5, 3), "math", Radial(block=1000))
    assert abs(dense["v"] - expected["v"]).max() > 1e-3
    for found in pair(answers, name, (5, 3), "math", pattern, sequence=2):
        assert abs(found["v"] - expected["v"]).max() < 1e-12


def test_a_sequence_is_divided_before_a_kernel_is_chosen(pair: Pair) -> None:
    for said in pair(refusal, sequence=2):
        assert said.endswith("divide it before")

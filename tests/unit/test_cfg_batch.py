"""Classifier-free guidance asks twice, in one batch or in turn, with one result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_families
import torch
from torch import Tensor, nn

from accvideo_core import guidance
from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.errors import AccVideoError
from accvideo_core.flow import time_grid
from accvideo_core.guidance import Cfg, Guided, fits_twice, guided
from accvideo_core.models.experts import networks_of
from accvideo_core.models.video_model import VideoModel
from accvideo_core.sampling import sample

TIMES = time_grid(3, 3.0)


class Batches:
    """How many samples each call of a model's networks had."""

    def __init__(self, model: VideoModel) -> None:
        self.sizes: list[int] = []
        for network in networks_of(model.module).values():
            network.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self.sizes.append(len(kwargs["sample" if "sample" in kwargs else "hidden_states"]))


def negative_of(cond: Condition, length: int | None = None) -> Condition:
    """Another text for one sample, of `length` tokens."""
    one = cond.select(0)
    text = -one.text[:, :length]
    return replace(one, text=text, mask=None if one.mask is None else one.mask[:, :length])


@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_both_ways_give_the_same(name: str):
    case = tiny_families.case(name)
    batches = Batches(case.model)
    ends = {}
    for batched in ("in turn", "batched"):
        asked = Guided(case.model, negative_of(case.condition), Cfg(3.0), batched)
        ends[batched] = sample(asked, case.condition, case.x, TIMES)
    assert batches.sizes == [2] * 6 + [4] * 3
    bound = 1e-5 if case.model.family.joint else 1e-4  # a UNet's rounding is larger
    assert (ends["batched"] - ends["in turn"]).abs().max() < bound
    case_v = case.model.velocity(case.x, 0.5, case.condition)
    assert case_v.abs().max() < 100  # of ordinary size, for which that bound is one


@pytest.mark.parametrize("name", ["hunyuan_video", "wan_t2v", "cogvideox_5b"])
def test_one_velocity_is_the_same_to_a_millionth(name: str):
    case = tiny_families.case(name)
    ways = [
        Guided(case.model, negative_of(case.condition), Cfg(2.0), batched).velocity(
            case.x, 0.5, case.condition
        )
        for batched in ("in turn", "batched")
    ]
    assert (ways[0] - ways[1]).abs().max() < 1e-6 * max(1, float(ways[0].abs().max()))


@pytest.mark.parametrize("name", ["hunyuan_video", "wan_t2v"])
def test_texts_of_different_lengths_may_be_batched(name: str):
    case = tiny_families.case(name)
    negative = negative_of(case.condition, length=2)
    ways = [
        Guided(case.model, negative, Cfg(2.0), batched).velocity(case.x, 0.5, case.condition)
        for batched in ("in turn", "batched")
    ]
    assert (ways[0] - ways[1]).abs().max() < 1e-6 * max(1, float(ways[0].abs().max()))


def test_of_two_experts_one_without_guidance_is_asked_once():
    case = tiny_families.case("wan22_t2v")
    batches = Batches(case.model)
    asked = Guided(case.model, negative_of(case.condition), Cfg(3.0, low=1.0), "batched")
    sample(asked, case.condition, case.x, (1.0, 0.9, 0.4, 0.0))
    assert batches.sizes == [4, 4, 2]


class Card:
    """As much of torch.cuda as is asked for a decision."""

    def __init__(self, most: int, free: int, spare: int = 0) -> None:
        self.most, self.free, self.spare = most, free, spare

    def memory_allocated(self, device: Any) -> int:
        return 100

    def max_memory_allocated(self, device: Any) -> int:
        return self.most

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return self.free, 1000

    def memory_reserved(self, device: Any) -> int:
        return 100 + self.spare


@pytest.mark.parametrize(
    ("card", "fits"),
    [
        (Card(most=150, free=100), True),
        (Card(most=150, free=99), False),
        # What the allocator holds without using it is free as well.
        (Card(most=150, free=60, spare=40), True),
        (Card(most=151, free=60, spare=40), False),
    ],
)
def test_a_question_fits_twice_where_twice_its_need_is_free(
    card: Card, fits: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "cuda", card)
    assert fits_twice(100, torch.device("cuda")) is fits


class Elsewhere(VideoModel):
    """A model on the CPU that says it is on a GPU."""

    @property
    def device(self) -> Any:
        class Device:
            type = "cuda"

        return Device()

    def prepared(self, cond: Condition) -> Condition:
        return self.family.fill(cond.unmasked())

    def answer(self, x_t: Tensor, t: float, ready: Condition) -> Tensor:
        times = torch.full((len(x_t),), t)
        return self.family.forward(self.expert(t), x_t, times, ready)


@pytest.mark.parametrize(
    ("name", "length", "fits", "sizes"),
    [
        # In turn first, which shows what it needs.
        ("wan_t2v", None, True, [2, 2, 4, 4]),
        ("wan_t2v", None, False, [2] * 6),
        # Wan fills all texts up to one length.
        ("wan_t2v", 2, True, [2, 2, 4, 4]),
        # HunyuanVideo would need a mask.
        ("hunyuan_video", 2, True, [2] * 6),
        ("hunyuan_video", None, True, [2, 2, 4, 4]),
    ],
)
def test_auto_batches_on_a_gpu_what_fits_and_needs_no_mask(
    name: str, length: int | None, fits: bool, sizes: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(guidance, "fits_twice", lambda before, device: fits)
    case = tiny_families.case(name)
    model = Elsewhere(case.model.module, case.model.family, case.model.latent_spec)
    batches = Batches(model)
    asked = Guided(model, negative_of(case.condition, length), Cfg(3.0))
    with asked.asking(case.condition) as velocity, torch.no_grad():
        for t in TIMES[:-1]:
            velocity(case.x, t)
    assert batches.sizes == sizes


def test_auto_asks_in_turn_on_a_cpu():
    case = tiny_families.case("wan_t2v")
    batches = Batches(case.model)
    sample(Guided(case.model, negative_of(case.condition), Cfg(3.0)), case.condition, case.x, TIMES)
    assert batches.sizes == [2] * 6


def test_an_unknown_way_is_refused():
    case = tiny_families.case("wan_t2v")
    negative = Prompt.of("bad", negative_of(case.condition))
    with pytest.raises(AccVideoError, match="batched is 'both'; choose one of auto, batched, in"):
        guided(case.model, negative, Cfg(3.0), batched="both")

"""Samplings that do not fit are refused with settings that fit, each of them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_wan
import torch
from diffusers import HunyuanVideoTransformer3DModel
from memory_cases import packed, wide

from accvideo_core.conditioning import Prompt
from accvideo_core.errors import AccVideoError
from accvideo_core.guidance import Cfg, guided
from accvideo_core.models import FAMILIES, VideoModel
from accvideo_core.models.fitting import Sampling, Savings, check_memory
from accvideo_core.models.footprint import Unplannable, tensor_bytes, tensors_of
from accvideo_core.models.swapping import SLOTS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZE = (5, 96, 96)


@pytest.fixture(scope="module")
def plain() -> Sampling:
    """Of a network whose weights outweigh what comes and goes."""
    return Sampling(wide(torch.bfloat16), tiny.condition(1), SIZE, CUDA)


@pytest.fixture(scope="module")
def deep() -> Sampling:
    """Of a network of ten blocks."""
    module: Any = HunyuanVideoTransformer3DModel(
        in_channels=tiny.CHANNELS,
        out_channels=tiny.CHANNELS,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=9,
        num_refiner_layers=1,
        text_embed_dim=tiny.TEXT,
        pooled_projection_dim=tiny.POOLED,
        rope_axes_dim=(4, 6, 6),
        guidance_embeds=True,
    )
    model = VideoModel(module.to(torch.bfloat16), FAMILIES["hunyuan_video"], tiny.SPEC)
    return Sampling(model, tiny.condition(1), (5, 32, 32), CUDA)


@pytest.fixture(scope="module")
def guided_twice() -> Sampling:
    wan = tiny_wan.video_model("wan_t2v")
    negative = Prompt.of("no", tiny_wan.condition("wan_t2v", 1, seed=3))
    asked = guided(wan, negative, Cfg(5.0), "batched")
    return Sampling(asked, tiny_wan.condition("wan_t2v", 1), (5, 128, 128), CUDA)


def peak(sampling: Sampling, **settings: Any) -> int:
    return sampling.takes(Savings(**settings)).peak


def refusal(sampling: Sampling, savings: Savings, room: int) -> str:
    with pytest.raises(AccVideoError) as refused:
        check_memory(sampling, savings, room)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def named(message: str, **known: Any) -> dict[str, Any]:
    """The settings of a message, in the types that they have."""
    found = re.findall(r"(\w+) to ([\w ]+?)(?=,| or| and|$)", message.partition("; set ")[2])
    return {name: known.get(name, int)(value) for name, value in found}


def test_what_fits_is_told_and_not_refused(plain: Sampling) -> None:
    needed = plain.takes(Savings())
    assert check_memory(plain, Savings(), needed.peak) == needed
    assert needed.peak == needed.weights + needed.working
    with pytest.raises(AccVideoError):
        check_memory(plain, Savings(), needed.peak - 1)


def test_every_setting_that_is_named_fits_by_itself(plain: Sampling) -> None:
    now = Savings(batch=4)
    room = max(peak(plain, batch=2), peak(plain, batch=4, weights="fp8"))
    message = refusal(plain, now, room)
    needed = peak(plain, batch=4) / 1e6
    assert message.startswith(
        f"sampling 4 videos at once, 5 frames of 96 x 96 pixels, takes {needed:.1f} MB, "
        f"and cuda has {room / 1e6:.1f} MB for it; set batch to "
    )
    settings = named(message, weights=str)
    assert {"batch", "weights"} <= settings.keys() and " or " in message
    for name, value in settings.items():
        assert plain.takes(replace(now, **{name: value})).peak <= room


def test_the_batch_that_is_named_is_the_largest_that_fits(plain: Sampling) -> None:
    room = peak(plain, batch=3)
    settings = named(refusal(plain, Savings(batch=9), room), weights=str)
    assert settings["batch"] == 3


def test_no_more_blocks_are_swapped_than_needed(deep: Sampling) -> None:
    sizes = [peak(deep, swap_blocks=count) for count in range(11)]
    assert sizes[10] < sizes[7] < sizes[6] < sizes[0]
    message = refusal(deep, Savings(), sizes[7])
    assert named(message, weights=str)["swap_blocks"] == 7
    model = deep.model
    blocks = [tensor_bytes(tensors_of(b)) for b in model.family.blocks(model.module)]
    assert sizes[0] - sizes[10] == sum(blocks) - SLOTS * max(blocks)


def test_guidance_in_turn_is_named_where_its_halves_are_batched(guided_twice: Sampling) -> None:
    in_turn = peak(guided_twice, cfg_batch="in turn")
    assert in_turn < 0.75 * peak(guided_twice, cfg_batch="batched")
    message = refusal(guided_twice, Savings(cfg_batch="batched"), in_turn)
    assert message.endswith("set cfg_batch to in turn")


def test_settings_that_only_together_fit_are_named_together(deep: Sampling) -> None:
    together = Savings(batch=1, weights="fp8", swap_blocks=9)
    room = deep.takes(together).peak
    now = Savings(batch=2)
    message = refusal(deep, now, room)
    assert " and " in message and " or " not in message.partition("; set ")[2]
    assert deep.takes(replace(now, **named(message, weights=str))).peak <= room


def test_what_cannot_fit_is_told_to_be_smaller(deep: Sampling) -> None:
    message = refusal(deep, Savings(batch=2), 1000)
    assert message.endswith(", and choose smaller or shorter videos")
    settings = named(message, weights=str)
    assert settings["batch"] == 1 and settings["swap_blocks"] == 10


def test_weights_on_the_device_are_no_obstacle_to_themselves() -> None:
    model = wide()
    here = Sampling(model, tiny.condition(1), SIZE)
    needed = here.takes(Savings())
    free = needed.peak - tensor_bytes(tensors_of(model.module))
    assert check_memory(here, Savings(), free) == needed


def test_a_cpu_is_never_told_to_swap() -> None:
    here = Sampling(wide(torch.bfloat16), tiny.condition(1), SIZE, CPU)
    message = refusal(here, Savings(batch=4), 1)
    assert "swap_blocks" not in message and "batch to 1" in message
    blocks = here.takes(Savings(swap_blocks=2))
    assert blocks.waiting == 0 and blocks.peak > here.takes(Savings()).peak


def test_packed_weights_are_not_told_to_be_packed() -> None:
    message = refusal(Sampling(packed(), tiny.condition(1), SIZE, CUDA), Savings(), 1)
    assert "weights" not in message.partition(";")[2]


def test_fp8_products_are_counted_with_their_copies(plain: Sampling) -> None:
    alone, products = plain.takes(Savings()), plain.takes(Savings(fp8=True))
    assert products.weights > alone.weights
    both = plain.takes(Savings(fp8=True, weights="fp8"))
    assert both.weights == plain.takes(Savings(weights="fp8")).weights < alone.weights


def test_what_needs_values_cannot_be_planned() -> None:
    model = wide()
    tell = model.family.forward

    def picky(module: Any, x: Any, t: Any, cond: Any) -> Any:
        return tell(module, x, t, cond) + 0 * x[x > 0].sum()

    strange: VideoModel = replace(model, family=replace(model.family, forward=picky))
    with pytest.raises(Unplannable, match="cannot be planned, because it asks for values"):
        check_memory(Sampling(strange, tiny.condition(1), SIZE), Savings(), 1)

"""What sampling and decoding were counted to take, against what torch's profiler saw them take."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_cogvideox
import tiny_vaes
import tiny_wan
import torch
from memory_cases import allocated, conditions, packed, small, wide

from accvideo_core.conditioning import Prompt
from accvideo_core.guidance import Cfg, guided
from accvideo_core.models.footprint import footprint, tensor_bytes, tensors_of
from accvideo_core.models.vae_footprint import DecodeFootprint
from accvideo_core.models.vae_tiling import Cut, Tiling, whole
from accvideo_core.sampling import sample

WITHIN = 0.15

CASES: dict[str, tuple[Any, tuple[int, int], str | None]] = {
    "HunyuanVideo, two videos": (small, (5, 96), None),
    "HunyuanVideo in bf16": (lambda: wide(torch.bfloat16), (5, 96), None),
    "HunyuanVideo in fp8": (packed, (5, 48), None),
    "Wan, guided in one batch": (lambda: tiny_wan.video_model("wan_t2v"), (5, 128), "batched"),
    "Wan, guided in turn": (lambda: tiny_wan.video_model("wan_t2v"), (5, 128), "in turn"),
    "two experts": (lambda: tiny_wan.video_model("wan22_t2v"), (5, 128), None),
    "CogVideoX": (lambda: tiny_cogvideox.video_model("cogvideox_5b"), (9, 64), None),
}


@pytest.mark.parametrize("case", CASES)
def test_sampling_takes_what_was_counted(case: str) -> None:
    make, (frames, size), batched = CASES[case]
    model = make()
    cond, negative = conditions(model)
    asked = guided(model, Prompt.of("no", negative), Cfg(3.0), batched) if batched else model
    shape = (2, *model.latent_spec.shape(frames, size, size))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with allocated() as peaks:
        sample(asked, cond, noise, (1.0, 0.5, 0.2, 0.0))
    counted = footprint(asked, cond, shape)
    assert counted.all_weights == tensor_bytes(tensors_of(model.module))
    assert counted.working == pytest.approx(peaks[0], rel=WITHIN)
    assert counted.peak == pytest.approx(peaks[0] + counted.all_weights, rel=WITHIN)


def test_a_text_takes_as_much_as_the_longest_one() -> None:
    model = small()
    short, long = conditions(model)
    shape = (1, *model.latent_spec.shape(5, 16, 16))
    assert long.text.shape[1] > short.text.shape[1]
    assert footprint(model, long, shape).working > footprint(model, short, shape).working


def test_nothing_of_the_network_is_read_or_changed() -> None:
    model = small()
    before = {name: x.clone() for name, x in model.module.state_dict().items()}
    cond, shape = conditions(model)[0], (1, *model.latent_spec.shape(5, 16, 16))
    counted = footprint(model, cond, shape)
    assert all(torch.equal(x, before[n]) for n, x in model.module.state_dict().items())
    model.module.to("meta")
    assert footprint(model, cond, shape, torch.device("cpu")) == counted


# Decoding -------------------------------------------------------------------------------------

PIXELS = (96, 64)


def ways(name: str) -> list[Tiling]:
    """At once, in tiles, and in parts of the clip."""
    stride = tiny_vaes.MAKERS[name][1]
    h, w = (size // stride for size in PIXELS)
    everything = Tiling(Cut(h, h), Cut(w, w))
    quarter = Tiling(Cut(h // 2 + 1, h // 2), Cut(w // 2 + 1, w // 2))
    if name != "hunyuan_video":
        return [everything, quarter]
    parts = Cut(5, 3)
    return [
        everything,
        quarter,
        Tiling(everything.h, everything.w, parts),
        Tiling(quarter.h, quarter.w, parts),
    ]


@pytest.mark.parametrize("name", tiny_vaes.MAKERS)
def test_decoding_takes_what_was_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny_vaes.vae(name)
    stride = vae.spec.stride_hw
    x = tiny_vaes.latents(7, PIXELS[0] // stride, PIXELS[1] // stride)
    counted = DecodeFootprint(vae.module, 4, stride)
    for way in ways(name):
        monkeypatch.setattr(DecodeFootprint, "choose", lambda *_, way=way: way)
        with allocated() as peaks:
            vae.decode(x, free=1)
        assert counted.needed(tuple(x.shape), way) == pytest.approx(peaks[0], rel=WITHIN), way


def test_a_long_clip_takes_what_a_few_frames_and_its_pictures_take() -> None:
    vae = tiny_vaes.vae("wan")
    counted = DecodeFootprint(vae.module, 4, 8)
    short, long = (1, 4, 5, 8, 8), (1, 4, 21, 8, 8)
    more = counted.needed(long, whole(long)) - counted.needed(short, whole(short))
    frame = 64 * 64 * 3 * 4
    assert 64 * frame <= more <= 3 * 64 * frame + 16 * 4 * 64 * 8

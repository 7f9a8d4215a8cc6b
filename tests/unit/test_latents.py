"""LatentSpec and seeded noise."""

from __future__ import annotations

import json

import pytest
import torch

from accvideo_core.errors import AccVideoError
from accvideo_core.latents import LatentSpec, key_generator, seeded_noise

HUNYUAN = LatentSpec(16, stride_t=4, stride_hw=8, scale=(0.476986,), patch=2)
PER_CHANNEL = LatentSpec(2, stride_t=4, stride_hw=8, scale=(0.5, 2.0), shift=(1.0, -1.0))


def test_shape_of_accvideos_clip():
    assert HUNYUAN.shape(93, 544, 960) == (16, 24, 68, 120)
    assert HUNYUAN.shape(1, 16, 16) == (16, 1, 2, 2)


def test_latent_frames_are_rounded_up_to_whole_tokens_and_cropped_again():
    spec = LatentSpec(2, stride_t=4, stride_hw=8, patch=2, patch_t=2)
    assert [spec.shape(frames, 16, 16)[1] for frames in (1, 5, 81, 85)] == [2, 2, 22, 22]
    x = torch.arange(22.0).reshape(1, 1, 22, 1, 1)
    assert spec.crop(x, 81).flatten().tolist() == list(range(1, 22))
    assert torch.equal(spec.crop(x, 85), x)
    assert spec.fill(x[:, :, 1:], 81).flatten().tolist() == [1.0, *range(1, 22)]
    assert torch.equal(spec.fill(x, 85), x) and torch.equal(HUNYUAN.fill(x, 85), x)


def test_model_space_is_shifted_and_scaled_per_channel():
    x = torch.ones(1, 2, 1, 1, 1)
    assert PER_CHANNEL.to_model(x).flatten().tolist() == [0.0, 4.0]
    assert HUNYUAN.to_model(torch.ones(1, 16, 1, 1, 1)).unique().item() == pytest.approx(0.476986)


def test_from_model_inverts_to_model():
    x = torch.randn(2, 2, 3, 4, 4, generator=key_generator("x"), dtype=torch.float64)
    assert torch.allclose(PER_CHANNEL.from_model(PER_CHANNEL.to_model(x)), x)


def test_json_round_trip():
    for spec in (HUNYUAN, PER_CHANNEL):
        assert LatentSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16, 544, 960), r"16 frames do not fit.*4k\+1.*use 13 or 17"),
        ((0, 544, 960), "0 frames do not fit"),
        ((93, 540, 960), "height 540 is not a multiple of 16; use 528 or 544"),
        ((93, 544, 8), "width 8 is not a multiple of 16; use 16 or 32"),
    ],
)
def test_sizes_that_do_not_fit_name_the_ones_that_do(size, message):
    with pytest.raises(AccVideoError, match=message):
        HUNYUAN.shape(*size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "channels is 0"),
        ({"patch": -1}, "patch is -1"),
        ({"scale": (1.0, 2.0, 3.0)}, "scale has 3 values"),
        ({"shift": ()}, "shift has 0 values"),
    ],
)
def test_a_spec_checks_itself(change, message):
    with pytest.raises(AccVideoError, match=message):
        LatentSpec(**{"channels": 16, "stride_t": 4, "stride_hw": 8, **change})


def test_check_refuses_foreign_shapes_and_nan():
    good = torch.zeros(1, 2, 1, 2, 2)
    assert PER_CHANNEL.check(good) is good
    with pytest.raises(AccVideoError, match=r"shape \(1, 3, 1, 2, 2\); expected \[B, 2"):
        PER_CHANNEL.check(torch.zeros(1, 3, 1, 2, 2))
    with pytest.raises(AccVideoError, match="records hold NaN"):
        PER_CHANNEL.check(torch.full((1, 2, 1, 2, 2), float("nan")), "records")


def test_noise_follows_from_its_key_alone():
    torch.manual_seed(0)
    first = seeded_noise((2, 3), 7, "prompt", 0)
    torch.manual_seed(1)
    assert torch.equal(first, seeded_noise((2, 3), 7, "prompt", 0))
    others = [
        seeded_noise((2, 3), *key) for key in ((8, "prompt", 0), (7, "p", 0), (7, "prompt", 1))
    ]
    assert not any(torch.equal(first, other) for other in others)


def test_noise_is_the_same_in_every_release():
    # Records on disk carry no noise: it has to come out the same for ever.
    expected = torch.randn(3, generator=torch.Generator().manual_seed(8361073936044032514))
    assert torch.equal(seeded_noise((3,), 0, "prompt", 0), expected)


def test_noise_is_standard_normal():
    x = seeded_noise((200_000,), "statistics")
    assert x.mean().abs() < 0.01 and (x.std() - 1).abs() < 0.01

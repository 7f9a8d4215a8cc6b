"""Tiles of VAEs: the sizes that are asked for, what tiled videos look like, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_vaes
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLWan
from torch import Tensor

from accvideo_core.errors import AccVideoError
from accvideo_core.evaluate import world
from accvideo_core.models import vae_footprint, vae_tiling
from accvideo_core.models.loading import load_teacher
from accvideo_core.models.tiny import embedded_teacher_path
from accvideo_core.models.vae import VideoVAE
from accvideo_core.models.vae_footprint import DecodeFootprint
from accvideo_core.models.vae_tiling import KINDS, Cut, Tiling, tiled, tilings, whole

GB = 10**9
NAMES = tuple(tiny_vaes.MAKERS)
SHAPE = (1, 16, 33, 90, 160)  # 129 frames of 1280 x 720 pixels


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10((a - b).square().mean().item())


# Geometry -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [33, 60, 68, 90, 104, 120, 160])
@pytest.mark.parametrize("count", range(1, 9))
def test_equal_pieces_cover_everything_once(length: int, count: int) -> None:
    cut = Cut.equal(length, count, 8)
    starts = range(0, length, cut.stride)
    assert len(starts) == len(cut.sizes(length)) <= count
    assert starts[-1] + cut.sizes(length)[-1] == length
    assert cut.size - cut.stride == (0 if count == 1 else 8)


def test_work_counts_overlaps_each_time() -> None:
    assert whole(SHAPE).work(SHAPE) == 33 * 90 * 160
    halves = Tiling(Cut(90, 90), Cut(88, 80), Cut(18, 16))
    assert halves.work(SHAPE) == (18 + 17 + 1) * 90 * (88 + 80)
    assert halves.tiles(SHAPE) == 2


def test_ways_go_from_large_tiles_to_small_ones_with_and_without_parts_of_the_clip() -> None:
    lists = tilings(KINDS["AutoencoderKLHunyuanVideo"], SHAPE, 8)
    assert [ways[0].t for ways in lists] == [None, Cut(18, 16), Cut(10, 8), Cut(6, 4)]
    for ways in lists:
        sizes = [way.h.size * way.w.size for way in ways]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] == 90 * 160
        pieces = [x for way in ways for x in (*way.h.sizes(90), *way.w.sizes(160))]
        assert min(pieces) >= 8  # none is a sliver, which would see nothing but its own edge
    assert len(tilings(KINDS["AutoencoderKLWan"], SHAPE, 8)) == 1


def test_the_wider_side_is_cut_first() -> None:
    two = tilings(KINDS["AutoencoderKLWan"], SHAPE, 8)[0][1]
    assert (two.h, two.w) == (Cut(90, 90), Cut(88, 80))


def test_cogvideoxs_overlap_survives_both_of_its_roundings() -> None:
    module = tiny_vaes.vae("cogvideox").module
    for stride in range(8, 200):
        cut = Cut(stride + 8, stride)
        with tiled(module, Tiling(cut, cut)):
            factor = module.tile_overlap_factor_width
            assert int(module.tile_latent_min_width * (1 - factor)) == stride
            assert int(module.tile_sample_min_width * factor) == 64


# Videos ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> tuple[VideoVAE, Tensor]:
    """The embedded teacher's VAE, and latents of a mosaic of its clips, 96 x 64 pixels."""
    vae = load_teacher(embedded_teacher_path()).vae
    generator = torch.Generator().manual_seed(0)
    clips = world.render(world.sample_specs(6, generator), generator)
    mosaic = clips[:, :, :5].unflatten(0, (3, 2)).permute(3, 0, 4, 1, 5, 2)
    return vae, vae.encode(mosaic.reshape(1, 5, 96, 64, 3) / 2 + 0.5)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_tiling, "OVERLAP", 16)
    monkeypatch.setattr(vae_tiling, "SMALLEST", 16)


def forced(vae: VideoVAE, x: Tensor, way: Tiling, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(DecodeFootprint, "choose", lambda *_: way)
    return vae.decode(x, free=1)


@pytest.mark.usefixtures("small_tiles")
def test_tiled_frames_are_those_of_one_pass_within_the_blending(
    real: tuple[VideoVAE, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, x = real
    shape = tuple(x.shape)
    one = forced(vae, x, whole(shape), monkeypatch)
    ways = tilings(KINDS["AutoencoderKLHunyuanVideo"], shape, 4)[0][1:4]
    assert len(ways) == 3
    for way in ways:
        many = forced(vae, x, way, monkeypatch)
        assert many.shape == one.shape and psnr(many, one) > 30
        assert (many - one).abs().mean() < 0.02


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_vae_takes_its_tiles_and_is_left_as_it_was(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = tiny_vaes.vae(name)
    x = tiny_vaes.latents(7 if name == "hunyuan_video" else 3, 6, 4)
    before = {
        key: value for key, value in vars(vae.module).items() if "tile" in key or "use" in key
    }
    plain = vae.decode(x)
    widths: list[tuple[int, ...]] = []
    decoder = vae.module.decoder
    decoder.register_forward_pre_hook(lambda _m, args: widths.append(tuple(args[0].shape[2:])))
    kind = KINDS[type(vae.module).__name__]
    for ways in tilings(kind, tuple(x.shape), vae.spec.stride_hw):
        way = ways[-1]
        widths.clear()
        frames = forced(vae, x, way, monkeypatch)
        assert frames.shape == plain.shape
        assert {shape[1:] for shape in widths} <= {
            (h, w) for h in way.h.sizes(6) for w in way.w.sizes(4)
        }
        assert max(shape[1:] for shape in widths) == (way.h.size, way.w.size)
        if kind.in_time:
            parts = [7] if way.t is None else way.t.sizes(7)
            assert {shape[0] for shape in widths} == set(parts)
    assert {key: getattr(vae.module, key) for key in before} == before


def test_settings_come_back_after_an_error() -> None:
    module = tiny_vaes.vae("wan").module
    with pytest.raises(KeyError), tiled(module, whole((1, 4, 3, 60, 60))):
        assert module.tile_sample_min_height == 480
        raise KeyError
    assert module.tile_sample_min_height == 256


# Choosing -------------------------------------------------------------------------------------


def meta_footprint(cls: Any, dtype: torch.dtype = torch.bfloat16) -> DecodeFootprint:
    """Of a family's own VAE on a GPU, without its values."""
    with torch.device("meta"):
        module = cls()
    return DecodeFootprint(module.to(dtype), 4, 8, torch.device("cuda"))


@pytest.mark.parametrize(
    "cls", [AutoencoderKLHunyuanVideo, AutoencoderKLWan, AutoencoderKLCogVideoX]
)
def test_the_largest_tiles_that_fit_are_chosen(cls: Any) -> None:
    footprint, shape = meta_footprint(cls), (1, 16, 5, 40, 64)
    most = footprint.needed(shape, whole(shape))
    assert footprint.choose(shape, most) == whole(shape)
    work = whole(shape).work(shape)
    for part in (0.95, 0.5):
        way = footprint.choose(shape, int(part * most))
        assert footprint.needed(shape, way) <= part * most
        assert way.work(shape) > work
        work = way.work(shape)
    with pytest.raises(AccVideoError) as refused:
        footprint.choose(shape, 1000)
    assert str(refused.value).startswith("decoding 17 frames of 512 x 320 pixels takes ")
    assert "cuda has 0.0 MB for it; use a tiny decoder" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_half_the_bits_take_half_the_memory_and_tensors_stay_countable() -> None:
    wide = meta_footprint(AutoencoderKLHunyuanVideo, torch.float32)
    narrow = meta_footprint(AutoencoderKLHunyuanVideo)
    way = tilings(wide.kind, SHAPE, 8)[1][4]
    assert narrow.needed(SHAPE, way) == pytest.approx(wide.needed(SHAPE, way) / 2, rel=0.1)
    everything = whole(SHAPE)
    assert narrow.needed(SHAPE, everything) > 200 * GB
    assert not narrow.fits(SHAPE, everything, 10**15)
    assert narrow._pass(SHAPE).convolved > vae_footprint.INDEXED


def test_what_did_not_fit_after_all_is_tried_in_smaller_tiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vae = tiny_vaes.vae("hunyuan_video")
    x = tiny_vaes.latents(1, 16, 32)
    assert vae.footprint is not None
    decode, tried = vae.module.decode, []

    def failing(z: Tensor, **options: Any) -> Any:
        tried.append(vae.module.tile_sample_min_width)
        if len(tried) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return decode(z, **options)

    monkeypatch.setattr(vae.module, "decode", failing)
    assert vae.decode(x, free=GB).shape == (1, 1, 128, 256, 3)
    assert len(tried) == 2 and tried[1] < tried[0] == 256
    assert "were too little to decode; trying less" in caplog.text


def test_bytes_are_those_that_a_video_file_gets() -> None:
    from accvideo_core.video import _pixels

    vae = tiny_vaes.vae("wan")
    x = tiny_vaes.latents(2, 2, 2)
    pixels = vae.decode_bytes(x)
    assert pixels.dtype == torch.uint8 and pixels.shape == (1, 5, 16, 16, 3)
    assert torch.equal(pixels[0], _pixels(vae.decode(x)[0], 1))


def test_a_vae_of_another_class_decodes_by_itself() -> None:
    vae = tiny_vaes.vae("wan")
    vae.module.__class__ = type("AutoencoderOfSomeone", (type(vae.module),), {})
    assert vae.footprint is None
    assert vae.decode(tiny_vaes.latents(1, 2, 2), free=1).shape == (1, 1, 16, 16, 3)

"""The tiny decoder against frame-by-frame arithmetic on the file's tensors, and its refusals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accvideo_core.errors import AccVideoError
from accvideo_core.latents import LatentSpec
from accvideo_core.models import FAMILIES
from accvideo_core.models.tiny_decoder import PUBLISHED, TinyDecoder, load_tiny_decoder
from accvideo_core.models.video_model import VideoModel
from tests import tiny
from tests.tiny_decoders import Weights, weights, write

FILES = {  # name: family, channels, patch
    "taehv.pth": ("hunyuan_video", 16, 1),
    "taew2_1.safetensors": ("wan_t2v", 16, 1),
    "taew2_2.pth": ("wan22_ti2v", 48, 2),
    "taecvx.safetensors": ("cogvideox_5b", 16, 1),
    "lighttaew2_1.safetensors": ("wan22_i2v", 16, 1),
}


def model(family: str, channels: int = 16) -> VideoModel:
    """Of a family's geometry; its network is of no use."""
    entry = FAMILIES[family]
    sizes = {"in_channels": channels, "out_channels": channels}
    return VideoModel(tiny.network(), entry, entry.latent_spec(sizes, {}))


def decoder(name: str, folder: Path) -> TinyDecoder:
    family, channels, patch = FILES[name]
    return load_tiny_decoder(
        write(folder / name, weights(channels, patch)), model(family, channels)
    )


def reference(w: Weights, latents: Tensor) -> Tensor:
    """[T, C, H, W] -> every frame [T', 3, H', W'], one frame through one layer at a time."""

    def conv(name: str, x: Tensor, padding: int = 1) -> Tensor:
        weight, bias = w[f"decoder.{name}.weight"], w.get(f"decoder.{name}.bias")
        return F.conv2d(x, weight, bias, padding=padding)

    seen: dict[int, Tensor] = {}

    def block(index: int, x: Tensor) -> Tensor:
        before, seen[index] = seen.get(index, torch.zeros_like(x)), x
        y = conv(f"{index}.conv.0", torch.cat([x, before], 1)).relu()
        y = conv(f"{index}.conv.4", conv(f"{index}.conv.2", y).relu())
        return (y + x).relu()

    def stages(x: Tensor, stage: int) -> list[Tensor]:
        if stage == 3:
            patch = int((w["decoder.22.weight"].shape[0] // 3) ** 0.5)
            return [F.pixel_shuffle(conv("22", x.relu()), patch)]
        for index in range(3 + 6 * stage, 6 + 6 * stage):
            x = block(index, x)
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        grown = conv(f"{7 + 6 * stage}.conv", x, 0).split(x.shape[1], 1)
        return [f for y in grown for f in stages(conv(f"{8 + 6 * stage}", y), stage + 1)]

    frames = [stages(conv("1", 3 * (z[None] / 3).tanh()).relu(), 0) for z in latents]
    return torch.cat([frame for each in frames for frame in each])


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_plain_arithmetic(name: str, tmp_path: Path) -> None:
    family, channels, patch = FILES[name]
    ours = decoder(name, tmp_path)
    x = tiny_latents(channels, frames=3)
    in_vae_space = name.startswith(("taecvx", "light"))
    z = ours.spec.from_model(x) if in_vae_space else x
    expected = torch.stack([reference(weights(channels, patch), each.movedim(1, 0)) for each in z])
    expected = expected.clamp(0, 1).permute(0, 1, 3, 4, 2)[:, 3:]
    frames = ours.decode(x)
    size = 8 * patch
    assert frames.shape == (2, 9, 3 * size, 2 * size, 3) and frames.dtype == torch.float32
    assert frames.std() > 0.05
    assert torch.allclose(frames, expected, atol=1e-5)


def tiny_latents(channels: int, frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, channels, frames, 3, 2, generator=generator)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_pieces_of_a_clip_fit_together(at_once: int, tmp_path: Path) -> None:
    ours = decoder("taehv.pth", tmp_path)
    x = tiny_latents(16, frames=5)
    assert torch.allclose(ours.decode(x, at_once), ours.decode(x), atol=1e-5)


@pytest.mark.parametrize(("latent_frames", "frames"), [(1, 1), (4, 16), (5, 17)])
def test_cogvideox_keeps_all_frames_of_whole_pairs(
    latent_frames: int, frames: int, tmp_path: Path
) -> None:
    ours = decoder("taecvx.safetensors", tmp_path)
    assert ours.decode(tiny_latents(16, latent_frames)).shape[1] == frames


def test_a_file_may_have_any_name_and_half_precision(tmp_path: Path) -> None:
    half = {name: x.half() for name, x in weights(16, 1).items()}
    renamed = write(tmp_path / "mine.pth", half)
    named = write(tmp_path / "taew2_1.pth", half)
    x, wan = tiny_latents(16, 2), model("wan_t2v")
    frames = load_tiny_decoder(renamed, wan, dtype=torch.float32).decode(x)
    again = load_tiny_decoder(named, wan)
    assert next(again.module.parameters()).dtype == torch.float16
    assert (again.decode(x) - frames).abs().max() < 0.02


def test_what_inference_mode_gives_can_be_trained_on(tmp_path: Path) -> None:
    with torch.inference_mode():
        frames = decoder("taehv.pth", tmp_path).decode(tiny_latents(16, 1))
    assert not frames.is_inference()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def without(name: str) -> Weights:
    return {n: x for n, x in weights(16, 1).items() if not n.startswith(name)}


BAD: dict[str, tuple[Weights, str]] = {
    "taehv.safetensors": (without("decoder.22"), "is no tiny decoder that can be read, but none"),
    "taehv.pth": (without("decoder.9.conv.2"), "lacks weights of a tiny decoder"),
    "taew2_1.pth": (weights(16, 1), "of another model than HunyuanVideo; choose taehv"),
    "taehv1_5.pth": (weights(32, 2), r"latents of 32 channels to 4 frames of 16 x 16 pixels"),
    "taehv_super.pth": (
        {**without("decoder.1."), "decoder.0.weight": torch.ones(8, 16, 1, 1)},
        "the larger variant of one; choose one of taehv",
    ),
    "taehv_other.pth": (
        {**weights(16, 1), "decoder.3.conv.0.weight": torch.ones(16, 16, 3, 3)},
        "has some of other shapes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    tensors, message = BAD[name]
    with pytest.raises(AccVideoError, match=message) as refused:
        load_tiny_decoder(write(tmp_path / name, tensors), model("hunyuan_video"))
    assert name in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["taehv.pth", "taehv.safetensors"])
def test_a_truncated_file_is_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, weights(16, 1))
    cut(path)
    with pytest.raises(AccVideoError, match="damaged or cut short"):
        load_tiny_decoder(path, model("hunyuan_video"))


def test_a_missing_file_and_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AccVideoError, match="does not exist"):
        load_tiny_decoder(tmp_path / "taehv.pth", model("hunyuan_video"))
    ours = decoder("taehv.pth", tmp_path)
    with pytest.raises(AccVideoError, match="at_once is 0"):
        ours.decode(tiny_latents(16, 1), 0)
    with pytest.raises(AccVideoError, match=r"expected \[B, 16"):
        ours.decode(tiny_latents(4, 1))


def test_every_family_but_svd_has_a_file_that_fits_its_latents() -> None:
    for name, family in FAMILIES.items():
        assert name == "svd" or any(name.startswith(each.families) for each in PUBLISHED), name
        assert isinstance(family.latent_spec({}, {}), LatentSpec)


@pytest.mark.parametrize("name", ["taehv.pth", "taew2_2.pth", "taecvx.safetensors"])
def test_frames_are_the_official_networks(name: str, tmp_path: Path) -> None:
    """Set ACCVIDEO_TAEHV to a checkout of github.com/madebyollin/taehv."""
    folder = os.environ.get("ACCVIDEO_TAEHV")
    if folder is None:
        pytest.skip("ACCVIDEO_TAEHV names no checkout of the official network")
    family, channels, patch = FILES[name]
    official = official_network(Path(folder) / "taehv.py")
    theirs: Any = official(None, patch_size=patch, latent_channels=channels)
    theirs.is_cogvideox = family.startswith("cogvideox")
    wide = weights(channels, patch, widths=(256, 128, 64, 64))
    theirs.decoder.load_state_dict(
        {n.removeprefix("decoder."): x for n, x in wide.items() if n.startswith("decoder.")}
    )
    ours = load_tiny_decoder(write(tmp_path / name, wide), model(family, channels))
    x = tiny_latents(channels, frames=4)
    z = ours.spec.from_model(x) if theirs.is_cogvideox else x
    with torch.no_grad():
        expected = theirs.decode_video(z.movedim(1, 2), show_progress_bar=False)
    assert torch.allclose(ours.decode(x), expected.movedim(2, -1), atol=1e-4)


def official_network(path: Path) -> Any:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("taehv", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TAEHV

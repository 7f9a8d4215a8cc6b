"""Images as they are read, and as they are brought to a video's size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from accvideo_core.errors import AccVideoError
from accvideo_core.images import fitted, read_image
from tests.video_files import write_frames


def test_images_keep_their_values_and_stand_upright(tmp_path: Path):
    path = tmp_path / "a.png"
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    Image.fromarray(pixels).save(path)
    upright = torch.from_numpy(pixels.astype(np.float32) / 255)
    assert torch.equal(read_image(path), upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter further clockwise
    Image.fromarray(pixels).save(path, exif=exif)
    assert torch.equal(read_image(path), upright.rot90(-1))


def test_transparency_is_put_on_black(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (1, 1), (200, 100, 50, 128)).save(path)
    expected = torch.tensor([200, 100, 50]) * 128 / 255 / 255
    assert torch.allclose(read_image(path)[0, 0], expected, atol=1 / 255)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([255, 255, 255])
    palette.save(path, transparency=0)
    assert read_image(path).max() == 0
    Image.new("LA", (1, 1), (200, 0)).save(path)
    assert read_image(path).max() == 0


def test_sixteen_bits_of_grey_are_kept(tmp_path: Path):
    path = tmp_path / "a.png"
    grey = np.array([[0, 1, 300, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(path)
    expected = torch.from_numpy(grey.astype(np.float32) / 65535)
    assert torch.equal(read_image(path), expected[..., None].expand(-1, -1, 3))


@pytest.mark.parametrize("clear", [False, True], ids=["opaque", "transparent"])
def test_sixteen_bits_of_colour_become_eight_and_no_other(tmp_path: Path, clear: bool):
    deep = np.zeros((1, 16, 20, 4 if clear else 3), dtype=np.uint16)
    deep[..., 0], deep[..., 1], deep[..., 3:] = 65535, 300 * 257 // 3, 65535
    deep[:, :8, :, 3:] = 0
    kinds = ("rgba64be", "rgba64le") if clear else ("rgb48be", "rgb48le")
    path = tmp_path / "a.png"
    write_frames(path, deep, codec="png", pix_fmt=kinds[0], given=kinds[1])
    found = read_image(path)
    assert found.shape == (16, 20, 3)
    expected = torch.from_numpy(deep[0, 8, 0, :3].astype(np.float32)) / 65535
    assert torch.allclose(found[8:], expected.expand(8, 20, 3), atol=1 / 255)
    assert found[:8].max() == (0 if clear else 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (900, 2), (2000, 1500), (31, 33)], ids=str)
def test_images_of_any_size_fit_any_video(tmp_path: Path, size: tuple[int, int]):
    path = tmp_path / "a.png"
    Image.new("RGBA", size, (200, 100, 50, 255)).save(path)
    for height, width in ((32, 48), (48, 32)):
        found = fitted(read_image(path), height, width)
        colour = torch.tensor([200, 100, 50]) / 255
        assert torch.allclose(found, colour.expand(height, width, 3), atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_every_mode_becomes_three_colours(tmp_path: Path, mode: str):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (4, 2), (255, 255, 255)).convert(mode).save(path)
    assert torch.equal(read_image(path), torch.ones(2, 4, 3))


def test_what_is_no_image_is_refused(tmp_path: Path):
    with pytest.raises(AccVideoError, match="there is no image .*none.png"):
        read_image(tmp_path / "none.png")
    path = tmp_path / "b.png"
    Image.new("RGB", (300, 300), (255, 0, 0)).save(path)
    data = path.read_bytes()
    for content in (data[:60], b"", b"<html>", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        path.write_bytes(content)
        with pytest.raises(AccVideoError, match="b.png is no image that can be read"):
            read_image(path)


def test_the_middle_is_cut_to_the_videos_shape_and_size():
    stripes = torch.zeros(40, 100, 3)
    stripes[:, 30:70, 0] = 1  # exactly what a square video keeps of it
    assert torch.allclose(fitted(stripes, 20, 20), torch.tensor([1.0, 0, 0]).expand(20, 20, 3))
    tall = fitted(stripes.transpose(0, 1), 80, 80)
    assert torch.allclose(tall, torch.tensor([1.0, 0, 0]).expand(80, 80, 3), atol=1e-6)
    same = torch.rand(32, 48, 3)
    assert fitted(same, 32, 48) is same
    # A picture that is linear stays linear: nothing is shifted, and shrinking averages.
    ramp = torch.linspace(0, 1, 64)[None, :, None].expand(32, 64, 3)
    small = fitted(ramp, 8, 16)
    expected = ramp[0, :, 0].reshape(16, 4).mean(dim=1)
    assert torch.allclose(small[0, 2:-2, 0], expected[2:-2], atol=1e-3)
    for shape in ((8, 8), (8, 8, 4), (0, 8, 3)):
        with pytest.raises(AccVideoError, match=r"expected \[height, width, 3\]"):
            fitted(torch.zeros(shape), 8, 8)

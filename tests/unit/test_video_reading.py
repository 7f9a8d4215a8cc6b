"""Videos of any origin: when their frames are shown, and what is in them."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from accvideo_core.video_reading import BrokenVideo, scan, timed_frames
from tests.video_files import (
    HALF,
    MIRRORED,
    QUARTER,
    THREE_QUARTERS,
    grey_clip,
    turned,
    write_frames,
    write_h264,
    write_sound,
)


def noise(count: int, height: int = 96, width: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, height, width, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def read(path: Path) -> Tensor:
    return torch.stack([frame.pixels() for frame in timed_frames(path)])


def test_lossless_frames_come_back_exactly(tmp_path: Path) -> None:
    frames = noise(5, 15, 22)
    path = write_frames(tmp_path / "a.mkv", frames, fps=8)
    assert torch.equal(read(path), frames.float() / 255)
    seen = scan(path)
    assert (seen.height, seen.width, seen.timing.frames) == (15, 22, 5)
    assert seen.timing.rate == pytest.approx(8, rel=1e-3)
    assert seen.timing.end == pytest.approx(5 / 8, abs=2e-3)


def test_frames_have_the_times_at_which_they_are_shown(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.2, 1.0, 1.05, 3.0]
    path = write_frames(tmp_path / "a.mkv", grey_clip(6), times=times)
    assert [frame.time for frame in timed_frames(path)] == pytest.approx(times)
    timing = scan(path).timing
    assert (timing.first, timing.last) == (0, 3) and timing.rate == pytest.approx(5 / 3)


def test_frames_between_others_are_in_the_order_they_are_shown(tmp_path: Path) -> None:
    """H.264 stores them in another order."""
    frames = grey_clip(24, 32, 32) * 10
    path = write_h264(tmp_path / "a.mp4", frames)
    shown = read(path).mean(dim=(1, 2, 3))
    assert torch.allclose(shown, frames[:, 0, 0, 0].float() / 255, atol=0.02)
    assert [f.time for f in timed_frames(path)] == pytest.approx([i / 8 for i in range(24)])


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (QUARTER, lambda x: x.rot90(-1)),
        (HALF, lambda x: x.rot90(2)),
        (THREE_QUARTERS, lambda x: x.rot90(1)),
        (MIRRORED, lambda x: x.flip(1)),
    ],
    ids=["quarter", "half", "three quarters", "mirrored"],
)
def test_turned_and_mirrored_videos_stand_upright(tmp_path: Path, matrix, expected) -> None:
    quadrants = torch.full((3, 32, 48, 3), 40, dtype=torch.uint8)
    quadrants[:, :16, :24, 0] = 250  # red at the top left, blue at the bottom right
    quadrants[:, 16:, 24:, 2] = 250
    path = write_h264(tmp_path / "a.mp4", quadrants)
    plain = read(path)[0]
    shown = read(turned(path, matrix))[0]
    assert torch.equal(shown, expected(plain)) and not torch.equal(shown, plain)
    assert (scan(path).height, scan(path).width) == shown.shape[:2]


def test_more_than_eight_bits_are_kept(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 64, dtype=np.uint16)
    frames = np.broadcast_to(levels[None, None, :, None], (2, 8, 64, 3)).copy()
    path = write_frames(tmp_path / "a.mkv", frames, pix_fmt="gbrp16le", given="rgb48le")
    expected = torch.from_numpy(frames.astype(np.float32)) / 65535
    assert torch.allclose(read(path), expected, atol=2e-5)
    ten = write_frames(tmp_path / "b.mkv", frames, pix_fmt="yuv420p10le", given="rgb48le")
    found = read(ten)
    assert (found - expected).abs().max() < 0.01
    assert len(found[0, 0, :, 0].unique()) == 64


@pytest.mark.parametrize("deep", [False, True], ids=["8 bit", "16 bit"])
def test_what_is_transparent_is_put_on_black(tmp_path: Path, deep: bool) -> None:
    most = 65535 if deep else 255
    frames = np.zeros((2, 8, 8, 4), np.uint16 if deep else np.uint8)
    frames[..., 0], frames[:, :, 4:, 3] = most, most
    frames[:, 4:, :4, 3] = most // 4
    kind = ("rgba64be", "rgba64le") if deep else ("rgba", "rgba")
    path = write_frames(tmp_path / "a.mov", frames, codec="png", pix_fmt=kind[0], given=kind[1])
    found = read(path)[0]
    assert torch.equal(found[:, 4:], torch.tensor([1.0, 0, 0]).expand(8, 4, 3))
    assert found[:4, :4].max() == 0
    assert torch.allclose(found[4:, :4, 0], torch.full((4, 4), 0.25), atol=0.01)


def test_animated_pictures_are_videos(tmp_path: Path) -> None:
    pictures = [Image.new("P", (16, 16), i) for i in range(4)]
    for picture in pictures:
        picture.putpalette([0, 0, 0, 80, 80, 80, 160, 160, 160, 240, 240, 240])
    more = {"save_all": True, "append_images": pictures[1:], "duration": 100}
    pictures[0].save(tmp_path / "a.gif", **more)
    levels = read(tmp_path / "a.gif")[:, 0, 0, 0] * 255
    assert levels.round().tolist() == [0, 80, 160, 240]
    assert scan(tmp_path / "a.gif").timing.rate == pytest.approx(10)


def test_anamorphic_pixels_become_square(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    kind: dict[str, Any] = {"codec": "libx264", "pix_fmt": "yuv420p"}
    write_frames(path, grey_clip(3, 16, 20), ratio=Fraction(2), **kind)
    assert (scan(path).height, scan(path).width) == (16, 40)
    write_frames(path, grey_clip(3, 16, 20), ratio=Fraction(900), **kind)  # beyond belief
    assert scan(path).width == 20


def test_sound_playlists_and_nonsense_are_no_videos(tmp_path: Path) -> None:
    """Nothing that a file names is opened, in particular no address."""
    path = tmp_path / "a.mp4"
    write_sound(path)
    with pytest.raises(BrokenVideo, match="a.mp4 has no video stream"):
        scan(path)
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n"
    for content in (playlist, b"", b"junk" * 100):
        path.write_bytes(content)
        with pytest.raises(BrokenVideo, match="a.mp4 is not a video that can be read"):
            scan(path)
    with pytest.raises(BrokenVideo, match="there is no video file"):
        scan(tmp_path / "none.mp4")


def test_a_video_that_breaks_off_gives_the_frames_before(tmp_path: Path) -> None:
    path = write_h264(tmp_path / "a.mp4", noise(30), first=True)
    whole = read(path)
    os.truncate(path, path.stat().st_size // 2)
    seen = scan(path)
    assert 0 < seen.timing.frames < 30 and seen.stated == 30
    found = []
    with pytest.raises(BrokenVideo, match=r"a\.mp4 is damaged after \d\.\d\d s"):
        for frame in timed_frames(path):
            found.append(frame.pixels())
    assert len(found) > 5 and torch.equal(torch.stack(found[:5]), whole[:5])
    os.truncate(path, 300)
    with pytest.raises(BrokenVideo, match="a.mp4 "):
        scan(path)


def test_avi_has_one_rate(tmp_path: Path) -> None:
    """It does not say when a frame between others is shown."""
    path, frames = tmp_path / "a.avi", grey_clip(24, 32, 32) * 10
    between = {"bf": "3", "b_strategy": "0"}
    write_frames(path, frames, codec="libx264", pix_fmt="yuv420p", options=between)
    assert [f.time for f in timed_frames(path)] == pytest.approx([i / 8 for i in range(24)])
    assert scan(path).timing.rate == pytest.approx(8)
    shown = read(path).mean(dim=(1, 2, 3))
    assert torch.allclose(shown, frames[:, 0, 0, 0].float() / 255, atol=0.02)


def test_frames_whose_times_go_backwards_are_refused(tmp_path: Path) -> None:
    """As where two recordings were put into one file."""
    path = tmp_path / "a.ts"
    write_frames(path, grey_clip(24, 32, 32), codec="libx264", pix_fmt="yuv420p")
    path.write_bytes(2 * path.read_bytes())
    with pytest.raises(BrokenVideo, match="times go backwards"):
        list(timed_frames(path))


@pytest.mark.parametrize(
    "name",
    ["new\nline", "ünïcödé \U0001f600", "x" * 240, "concat:a|b", "%03d", "-i", "http:", "a?b#c"],
)
def test_names_are_names_and_nothing_else(tmp_path: Path, name: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_frames(tmp_path / "plain.mkv", grey_clip(3))
    Path(f"{name}.mkv").write_bytes((tmp_path / "plain.mkv").read_bytes())
    assert scan(Path(f"{name}.mkv")).timing.frames == 3


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"bad\xff.mkv")
    try:
        path.write_bytes(write_frames(tmp_path / "plain.mkv", grey_clip(3)).read_bytes())
    except OSError:
        pytest.skip("this disk has no such names")
    assert scan(path).timing.frames == 3

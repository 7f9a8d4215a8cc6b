"""Video files: what is written is what is read, and what is wrong is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accvideo_core.errors import AccVideoError
from accvideo_core.video import read_video, side_by_side, write_lossless, write_video


def clip(frames: int = 5, height: int = 16, width: int = 24) -> torch.Tensor:
    """Flat coloured quadrants that move, so that chroma subsampling costs nothing."""
    video = torch.full((frames, height, width, 3), 0.1)
    for t in range(frames):
        video[t, : height // 2, 2 * t : 2 * t + 8, 0] = 0.9
        video[t, height // 2 :, :8] = torch.tensor([0.1, 0.3, 0.9])
    return video


def test_a_clip_comes_back_with_its_frames_rate_and_colours(tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", clip(), fps=8, upscale=4)
    frames, fps = read_video(path)
    assert fps == 8 and frames.shape == (5, 64, 96, 3)
    expected = clip().repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert (frames - expected).abs().mean() < 0.01
    assert (frames - expected).abs().quantile(0.99) < 0.08


def test_a_lossless_clip_comes_back_exactly(tmp_path: Path):
    noise = torch.randint(256, (5, 16, 24, 3), dtype=torch.uint8)
    frames, fps = read_video(write_lossless(tmp_path / "clip.mkv", noise, fps=7))
    assert fps == 7 and torch.equal((frames * 255).round().to(torch.uint8), noise)


def test_nearest_upscaling_keeps_pixels_crisp(tmp_path: Path):
    checks = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float()
    video = checks[None, :, :, None].expand(3, 16, 16, 3)
    frames, _ = read_video(write_video(tmp_path / "checks.mp4", video, fps=8, upscale=8))
    centres = frames[:, 4::8, 4::8]
    assert (centres - video).abs().max() < 0.05


@pytest.mark.parametrize(("height", "width"), [(15, 24), (16, 23), (15, 23), (1, 1)])
def test_odd_sizes_are_padded_by_their_last_pixels(tmp_path: Path, height: int, width: int):
    video = torch.full((2, height, width, 3), 0.75)
    frames, _ = read_video(write_video(tmp_path / "odd.mp4", video, fps=8))
    assert frames.shape == (2, height + height % 2, width + width % 2, 3)
    assert (frames - 0.75).abs().max() < 0.03


def test_fractional_rates_survive(tmp_path: Path):
    _, fps = read_video(write_video(tmp_path / "ntsc.mp4", clip(), fps=30000 / 1001))
    assert fps == pytest.approx(30000 / 1001, rel=1e-6)


def test_values_outside_the_range_are_clamped_and_the_input_is_left_alone(tmp_path: Path):
    video = torch.cat([torch.full((2, 8, 8, 3), 1.5), torch.full((2, 8, 8, 3), -0.5)])
    before = video.clone()
    frames, _ = read_video(write_video(tmp_path / "clamp.mp4", video, fps=8))
    assert frames[0].min() > 0.97 and frames[-1].max() < 0.03
    assert torch.equal(video, before)


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        (torch.zeros(4, 8, 8), {}, r"shape \(4, 8, 8\)"),
        (torch.zeros(4, 8, 8, 4), {}, r"\[T, H, W, 3\]"),
        (torch.zeros(0, 8, 8, 3), {}, "T >= 1"),
        (torch.full((2, 8, 8, 3), float("nan")), {}, "NaN"),
        (torch.zeros(2, 8, 8, 3), {"fps": 0}, "fps is 0"),
        (torch.zeros(2, 8, 8, 3), {"upscale": 0}, "upscale is 0"),
    ],
)
def test_what_is_no_video_is_refused_and_leaves_no_file(tmp_path: Path, frames, options, message):
    with pytest.raises(AccVideoError, match=message):
        write_video(tmp_path / "bad.mp4", frames, **{"fps": 8, **options})
    assert not list(tmp_path.iterdir())


def test_a_new_video_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "clip.mp4"
    write_video(path, clip(3), fps=8)
    write_video(path, clip(6), fps=8)
    assert len(read_video(path)[0]) == 6
    assert list(tmp_path.iterdir()) == [path]


def test_reading_what_is_not_a_video(tmp_path: Path):
    with pytest.raises(AccVideoError, match="no video file"):
        read_video(tmp_path / "missing.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("not a video at all" * 50)
    with pytest.raises(AccVideoError, match="is not a video that can be read"):
        read_video(text)


def test_reading_half_a_video(tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", clip(), fps=8)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(AccVideoError, match=r"clip\.mp4 is"):
        read_video(path)


def test_side_by_side():
    left, right = torch.zeros(2, 4, 6, 3), torch.full((2, 4, 6, 3), 0.5)
    joined = side_by_side([left, right], gap=3)
    assert joined.shape == (2, 4, 15, 3)
    assert torch.equal(joined[:, :, :6], left) and torch.equal(joined[:, :, 9:], right)
    assert (joined[:, :, 6:9] == 1).all()
    with pytest.raises(AccVideoError, match="equal shapes"):
        side_by_side([left, right[:1]])

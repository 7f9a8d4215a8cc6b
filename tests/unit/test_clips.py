"""Which frames of a video become which clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accvideo_core.errors import AccVideoError
from accvideo_core.trajectories.clips import Cutting, cut
from accvideo_core.video_reading import BrokenVideo, Timing, scan
from tests.video_files import grey_clip, write_frames


def numbers(path: Path, how: Cutting, frames: int, wanted: tuple[int, ...] | None = None):
    """Clip -> the numbers of the video's frames that it holds."""
    timing = scan(path).timing
    which = tuple(range(how.count(timing, frames))) if wanted is None else wanted
    found = {}
    for number, clip in cut(path, timing, how, (frames, 16, 16), which):
        assert clip.shape == (frames, 16, 16, 3) and clip.dtype == torch.float32
        found[number] = (clip[:, 0, 0, 0] * 255).round().int().tolist()
    return found


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """24 frames at 8 a second, each as bright as its number."""
    return write_frames(tmp_path / "a.mkv", grey_clip(24), fps=8)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Cutting(), {0: [0, 1, 2, 3, 4, 5, 6, 7, 8], 1: [*range(9, 18)]}),
        (Cutting(stride=2), {0: [*range(0, 18, 2)]}),
        (Cutting(fps=4), {0: [*range(0, 18, 2)]}),
        (Cutting(fps=8, stride=2), {0: [*range(0, 18, 2)]}),
        (Cutting(fps=16), {0: [0, 0, 1, 1, 2, 2, 3, 3, 4], 1: [4, 5, 5, 6, 6, 7, 7, 8, 8],
                           2: [9, 9, 10, 10, 11, 11, 12, 12, 13],
                           3: [13, 14, 14, 15, 15, 16, 16, 17, 17],
                           4: [18, 18, 19, 19, 20, 20, 21, 21, 22]}),
        (Cutting(spacing=0.5), {k: [*range(4 * k, 4 * k + 9)] for k in range(4)}),
        (Cutting(spacing=1.5), {0: [*range(9)], 1: [*range(12, 21)]}),
        (Cutting(fps=3), {0: [0, 2, 5, 8, 10, 13, 16, 18, 21]}),
        (Cutting(spacing=100), {0: [*range(9)]}),
    ],
    ids=str,
)  # fmt: skip
def test_clips_hold_what_is_shown_at_their_times(video: Path, how: Cutting, expected) -> None:
    assert numbers(video, how, 9) == expected


def test_a_clip_is_the_same_whichever_others_are_wanted(video: Path) -> None:
    how = Cutting(spacing=0.5)
    every = numbers(video, how, 9)
    assert numbers(video, how, 9, (2,)) == {2: every[2]}
    assert numbers(video, how, 9, (3, 1)) == {1: every[1], 3: every[3]}
    assert numbers(video, how, 9, ()) == {}


@pytest.mark.parametrize("rate", [24000 / 1001, 29.97, 50.0, 120.0])
def test_every_frame_is_taken_once_at_rates_that_files_round(tmp_path: Path, rate: float) -> None:
    """Matroska has whole thousandths of a second."""
    times = [i / rate for i in range(200)]
    path = write_frames(tmp_path / "a.mkv", grey_clip(200), times=times)
    assert numbers(path, Cutting(), 200) == {0: [*range(200)]}
    assert numbers(path, Cutting(), 50)[3] == [*range(150, 200)]
    assert numbers(path, Cutting(fps=rate), 49)[0] == [*range(49)]


def test_changing_rates_are_resampled_by_time(tmp_path: Path) -> None:
    """Half a second at 20 frames a second, a second of one frame, then 10 frames a second."""
    times = [*(i / 20 for i in range(10)), *(1.5 + i / 10 for i in range(10))]
    path = write_frames(tmp_path / "a.mkv", grey_clip(20), times=times)
    found = numbers(path, Cutting(fps=10), 21)[0]
    assert found[:5] == [0, 2, 4, 6, 8]
    assert found[5:15] == [9] * 10
    assert found[15:] == [10, 11, 12, 13, 14, 15]
    mean = numbers(path, Cutting(), 20)[0]  # 20 frames over the same 2.4 s
    assert (mean[0], mean[-1], mean.count(9)) == (0, 19, 8)
    assert numbers(path, Cutting(), 21) == {}


def test_a_video_has_as_many_clips_as_fit(video: Path) -> None:
    timing = scan(video).timing
    assert [Cutting().count(timing, frames) for frames in (1, 5, 8, 12, 24, 25)] == [
        24, 4, 3, 2, 1, 0
    ]  # fmt: skip
    assert Cutting(fps=4).count(timing, 13) == 0, "the last frame ends at 3 s"
    one = Timing(1, 0.0, 0.0, 25.0)
    assert Cutting().count(one, 1) == 1 and Cutting().count(one, 2) == 0


def test_pictures_are_cut_to_the_middle_and_resized(tmp_path: Path) -> None:
    wide = torch.zeros(3, 20, 60, 3, dtype=torch.uint8)
    wide[:, :, 20:40] = torch.tensor([200, 100, 50], dtype=torch.uint8)
    path = write_frames(tmp_path / "a.mkv", wide)
    for size in (8, 40):
        _, clip = next(cut(path, scan(path).timing, Cutting(), (3, size, size), (0,)))
        assert clip.shape == (3, size, size, 3)
        assert torch.allclose(clip, torch.tensor([200.0, 100, 50]) / 255, atol=1e-5)


def test_a_video_that_ends_before_its_time_is_broken(video: Path) -> None:
    longer = Timing(40, 0.0, 39 / 8, 8.0)
    clips = cut(video, longer, Cutting(), (9, 16, 16), (0, 1, 2))
    assert [next(clips)[0], next(clips)[0]] == [0, 1]
    with pytest.raises(BrokenVideo, match=r"a\.mkv ends earlier than its file says"):
        next(clips)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fps": 0.0}, "fps is 0.0; it must be a positive number"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"spacing": -1.0}, "spacing is -1.0; it must be a positive number"),
        ({"spacing": float("inf")}, "spacing is inf"),
        ({"stride": 0}, "stride is 0; it must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(given, message: str) -> None:
    with pytest.raises(AccVideoError, match=message):
        Cutting(**given)


def test_settings_say_themselves() -> None:
    assert str(Cutting()) == "frames at their own rate, clips one after another"
    told = str(Cutting(fps=12.5, stride=3, spacing=2))
    assert told == "12.5 frames a second, 1 in 3 of them, clips every 2 s"

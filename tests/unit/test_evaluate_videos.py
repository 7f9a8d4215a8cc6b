"""Videos judged by others: pairs by name, one sentence for what cannot be measured, going on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accvideo_core.cli import main
from accvideo_core.errors import AccVideoError
from accvideo_core.evaluate import yardsticks
from accvideo_core.evaluate.clips import Clip, VideoFile, clips_of, clips_of_batch
from accvideo_core.evaluate.evaluate_videos import Tools, evaluate_videos
from accvideo_core.evaluate.fvd import Detector
from accvideo_core.evaluate.metrics import frechet_distance, psnr
from accvideo_core.evaluate.video_evaluation import sample_groups
from accvideo_core.evaluate.video_page import write_evaluation
from accvideo_core.monitor import Cancelled, Progress
from accvideo_core.video import read_video, write_video
from tests import tiny_i3d

FRAMES = 17


@pytest.fixture(autouse=True)
def without_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it takes seconds, and what it computes is tested elsewhere."""
    monkeypatch.setattr(yardsticks, "ssim_measure", lambda: lambda a, b: torch.ones(len(a)))


def moving(seed: int, frames: int = FRAMES, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    picture = F.interpolate(torch.rand(1, 3, 8, 8, generator=generator), (size, size))[0]
    return torch.stack([picture.movedim(0, -1).roll(t, dims=1) for t in range(frames)])


def blurred(frames: Tensor) -> Tensor:
    return F.avg_pool2d(frames.movedim(-1, 1), 3, 1, 1, count_include_pad=False).movedim(1, -1)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two samples of two prompts of a teacher, and the same blurred."""
    for seed, name in enumerate(("a dog-0", "a dog-1", "a cat-0", "a cat-1")):
        write_video(tmp_path / "teacher" / f"{name}.mp4", moving(seed), 8)
        write_video(tmp_path / "student" / f"{name}.mp4", blurred(moving(seed)), 8)
    return tmp_path / "teacher", tmp_path / "student"


def test_videos_of_one_name_are_compared_frame_by_frame(folders: tuple[Path, Path]) -> None:
    found = evaluate_videos(*map(clips_of, folders), folders[0].parent / "report")
    assert list(found.pairs) == ["a cat-0", "a cat-1", "a dog-0", "a dog-1"]
    for name, figures in found.pairs.items():
        a, b = (read_video(folder / f"{name}.mp4")[0] for folder in folders)
        torch.testing.assert_close(figures["PSNR"], psnr(a, b))
    rows = {row.name: row for row in found.rows()}
    assert list(rows) == ["sharpness", "motion", "saturation", "flicker", "diversity"]
    ratio = rows["sharpness"].ratio
    assert ratio is not None and ratio.high < 1
    assert rows["sharpness"].judged.value == pytest.approx(
        ratio.value * rows["sharpness"].reference.value
    )
    assert found.left_out == []


def test_diversity_of_equal_samples_is_0_and_of_independent_ones_is_not(tmp_path: Path) -> None:
    named = {"dog-0": moving(0), "dog-1": moving(0), "cat-0": moving(0), "cat-1": moving(1)}
    clips = [clips_of_batch(frames, 8.0)[0] for frames in named.values()]
    clips = [type(x)(x.frames, x.fps, name) for name, x in zip(named, clips, strict=True)]
    found = evaluate_videos(clips, clips, tmp_path)
    values = found.reference.values("diversity")
    assert values["dog"] == 0 and values["cat"] > 0.1


def test_samples_are_told_by_the_number_at_the_end_of_a_name() -> None:
    names = ["a dog-0", "a dog-1", "x_3", "x_4", "alone-0", "ComfyUI_00001", "ComfyUI_00002", "7"]
    assert sample_groups(names) == {"a dog": ["a dog-0", "a dog-1"], "x": ["x_3", "x_4"]}


def test_what_has_no_partner_or_cannot_be_read_is_said_and_the_rest_measured(
    folders: tuple[Path, Path],
) -> None:
    teacher, student = folders
    (student / "a dog-1.mp4").unlink()
    (student / "a cat-0.mp4").write_bytes(b"no video")
    write_video(student / "extra.mp4", moving(9), 8)
    write_video(student / "a cat-1.mp4", moving(9, frames=9), 8)
    found = evaluate_videos(*map(clips_of, folders), teacher.parent / "report")
    assert list(found.pairs) == ["a dog-0"]
    assert list(found.judged.figures) == ["a cat-1", "a dog-0"] == list(found.reference.figures)
    told = "\n".join(found.left_out)
    assert "a dog-1 is among the reference's videos only" in told
    assert "extra is among the judged videos only" in told
    assert "a cat-0.mp4 is not a video that can be read" in told
    assert (
        "a cat-1 frame by frame: the reference has 17 frames of 32 x 32 and the judged one 9 frames"
        in told
    )
    assert len(found.left_out) == 4


def test_other_sizes_and_rates_are_noted(tmp_path: Path) -> None:
    write_video(tmp_path / "a" / "x.mp4", moving(0), 8)
    write_video(tmp_path / "b" / "x.mp4", moving(0, size=48), 16)
    found = evaluate_videos(clips_of(tmp_path / "a"), clips_of(tmp_path / "b"), tmp_path / "out")
    assert found.pairs == {}
    notes = "\n".join(found.notes)
    assert "have 8 frames per second and the judged ones 16" in notes and "sizes differ" in notes


def test_sets_without_common_names_are_compared_as_sets(folders: tuple[Path, Path]) -> None:
    teacher, student = folders
    for number, path in enumerate(sorted(student.iterdir())):
        path.rename(student / f"other{number}.mp4")
    found = evaluate_videos(*map(clips_of, folders), teacher.parent / "report")
    assert found.pairs == {} and len(found.judged.figures) == 4
    assert "only the two sets are compared" in found.notes[0]
    write_evaluation(found, teacher.parent / "report", players=2)
    page = (teacher.parent / "report" / "index.html").read_text()
    assert page.count("<video") == 4


def test_two_files_are_a_pair_whatever_their_names(folders: tuple[Path, Path]) -> None:
    one, other = folders[0] / "a dog-0.mp4", folders[1] / "a cat-0.mp4"
    found = evaluate_videos(clips_of(one), clips_of(other), folders[0].parent / "report")
    assert list(found.pairs) == ["a cat-0"]


@pytest.fixture
def detector(tmp_path: Path) -> Detector:
    return Detector(tiny_i3d.save(tmp_path / "i3d.pt"))


def test_fvd_is_the_frechet_distance_of_the_networks_features(
    folders: tuple[Path, Path], detector: Detector
) -> None:
    sides = [clips_of(folder) for folder in folders]
    found = evaluate_videos(*sides, folders[0].parent / "out", Tools(detector=detector))
    features = [torch.stack([detector.features(clip) for clip in side]) for side in sides]
    assert found.fvd == pytest.approx(frechet_distance(*features))
    assert "FVD of 4 videos is mostly the bias of so few" in found.notes[-1]


def test_a_video_too_short_for_fvd_has_its_other_figures(
    tmp_path: Path, detector: Detector
) -> None:
    clips = [clips_of_batch(moving(seed, frames=9), 8.0)[0] for seed in (0, 1)]
    found = evaluate_videos(*([clip] for clip in clips), tmp_path, Tools(detector=detector))
    assert found.fvd is None and len(found.pairs) == 1
    assert "has 9 frames, but FVD looks at 16" in found.left_out[0]


def test_cancelled_work_goes_on_and_measures_nothing_twice(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    plain = VideoFile.opened

    def counting(self: VideoFile) -> Any:
        opened.append(self.name)
        return plain(self)

    def stop(progress: Progress) -> None:
        assert progress.total == 12
        if progress.step == 10:
            raise Cancelled

    monkeypatch.setattr(VideoFile, "opened", counting)
    out = folders[0].parent / "report"
    with pytest.raises(Cancelled):
        evaluate_videos(*map(clips_of, folders), out, monitor=stop)
    assert len(opened) == 8 + 2 * 2
    evaluate_videos(*map(clips_of, folders), out)
    assert len(opened) == 8 + 2 * 4
    for folder in folders:
        for path in folder.iterdir():
            path.rename(path.with_name(f"new {path.name}"))
    evaluate_videos(*map(clips_of, folders), out)
    assert len(opened) == 8 + 2 * 4, "a name is no content"


def test_one_command_makes_a_page_that_needs_nothing_outside_its_folder(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = folders[0].parent / "report"
    command = ["evaluate", *map(str, folders), "--out", str(out), "--players", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^PSNR +\d", printed, re.MULTILINE)
    assert (out / "table.txt").read_text() in printed
    page = (out / "index.html").read_text()
    sources = re.findall(r'src="([^"]+)"', page)
    videos = [source for source in sources if not source.startswith("data:image/png;base64,")]
    assert len(videos) == 6 and len(sources) == 7 and "http" not in page
    assert all(read_video(out / source)[0].shape == (FRAMES, 32, 32, 3) for source in videos)
    report = json.loads((out / "report.json").read_text())
    assert report["pairs"]["PSNR"]["of_each"].keys() == report["videos"]["judged"].keys()
    least = min(report["pairs"]["PSNR"]["of_each"].items(), key=lambda item: item[1])[0]
    assert f'<div class="pair"><p>{least}:' in page, "the least alike pair comes first"
    assert report["figures"]["sharpness"]["ratio"]["value"] < 1


def test_names_are_shown_and_not_run(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)> & co"
    for side in ("a", "b"):
        write_video(tmp_path / side / f"{name}.mp4", moving(0), 8)
    sides: list[list[Clip]] = [list(clips_of(tmp_path / side)) for side in ("a", "b")]
    write_evaluation(evaluate_videos(*sides, tmp_path / "out"), tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt; &amp; co" in page


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "there are no videos in .*a .*; check the path"),
        (["x.mp4", "x.webm"], "has both x.mp4 and x.webm, and videos are matched by name"),
    ],
)
def test_folders_that_cannot_be_used(files: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for file in files:
        (tmp_path / "a" / file).touch()
    with pytest.raises(AccVideoError, match=message):
        clips_of(tmp_path / "a")


def test_what_cannot_be_evaluated_is_one_sentence(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student = map(str, folders)
    assert main(["evaluate", teacher, f"{student}/none"]) == 2
    assert "there is no video or folder" in capsys.readouterr().err
    assert main(["evaluate", teacher, f"{student}/a dog-0.mp4"]) == 2
    assert "are a folder and a file; give two of a kind" in capsys.readouterr().err
    for path in folders[1].iterdir():
        path.write_bytes(b"no video")
    out = str(folders[0].parent / "report")
    assert main(["evaluate", teacher, student, "--out", out]) == 2
    told = capsys.readouterr().err
    assert "no video can be measured; of the last one it is said: " in told
    with pytest.raises(AccVideoError, match="9 frames are no whole number of clips of 4 frames"):
        clips_of_batch(moving(0, frames=9), 8.0, 4)

"""Pictures of a trajectory, and a dataset's page: opened from the disk, harmless, complete."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from accvideo_core.conditioning import Prompt
from accvideo_core.evaluate import trajectory_pictures
from accvideo_core.evaluate.trajectory_pictures import record_sheet, write_record
from accvideo_core.evaluate.trajectory_report import write_dataset_page
from accvideo_core.monitor import Progress
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record
from accvideo_core.trajectories.stats import dataset_stats, record_curves
from accvideo_core.video import read_video
from tests.analytic import condition, gaussian_model

HOSTILE = 'a bird <script>alert(1)</script> "><img src=x onerror=alert(2)>'


def decode(x: Tensor) -> Tensor:
    """[1, C, T, H, W] -> 5 frames of 32 x 32."""
    small = torch.sigmoid(x[:, :1, :1].mean(dim=(1, 2), keepdim=False))
    big = torch.nn.functional.interpolate(small[:, None].float(), size=(32, 32))[:, 0]
    return big[:, None, :, :, None].expand(-1, 5, -1, -1, 3).contiguous()


@pytest.fixture
def dataset(tmp_path: Path) -> TrajectoryDataset:
    prompts = [Prompt.of(text, condition()) for text in ("a cat", HOSTILE, "a dog " * 60)]
    spec = RecordSpec(5, 16, 16, steps=4, kept=2)
    return record(gaussian_model(), prompts, spec, tmp_path / "clips")


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_page_needs_nothing_but_its_folder(dataset: TrajectoryDataset, tmp_path: Path):
    folder = tmp_path / "page"
    path = write_dataset_page(dataset, dataset_stats(dataset, decode), folder, decode, previews=2)
    page = Page(path.read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "link", "object", "embed"}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "video"]
    assert len(sources) == 2 and not re.search(r"https?://", path.read_text())
    for source in sources:
        frames, _ = read_video(folder / str(source))
        assert frames.shape[0] == 5
    assert json.loads((folder / "stats.json").read_text())["records"] == 3


def test_page_says_what_is_there(dataset: TrajectoryDataset, tmp_path: Path):
    stats = dataset_stats(dataset)
    path = write_dataset_page(dataset, stats, tmp_path / "page", decode, previews=3)
    page = Page(path.read_text())
    assert HOSTILE in page.words, "a prompt is shown as it is, and does nothing"
    for phrase in ("3 of 3 prompts", "5 frames of 16 x 16", "Words in a prompt", "100 to 150"):
        assert phrase in page.words
    bars = [attrs for tag, attrs in page.tags if tag == "rect"]
    assert len(bars) >= 5  # three lengths in words and in characters, and the paper's band


def test_page_names_what_could_not_be_made(dataset: TrajectoryDataset, tmp_path: Path):
    stats = replace(dataset_stats(dataset), missing=1, skipped={"abc": "<b>not finite</b>"})
    page = Page(write_dataset_page(dataset, stats, tmp_path / "page").read_text())
    assert "1 more were asked for and are not there" in page.words
    assert "abc: <b>not finite</b>" in page.words and "b" not in {tag for tag, _ in page.tags}


def test_previews_are_kept_and_made_anew_for_another_dataset(
    dataset: TrajectoryDataset, tmp_path: Path
):
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == 2:
            raise KeyboardInterrupt

    folder, stats, decoded = tmp_path / "page", dataset_stats(dataset), []

    def counted(x: Tensor) -> Tensor:
        decoded.append(x)
        return decode(x)

    with pytest.raises(KeyboardInterrupt):
        write_dataset_page(dataset, stats, folder, counted, monitor=stop)
    assert [(p.stage, p.step, p.total) for p in seen] == [("preview", 1, 3), ("preview", 2, 3)]
    write_dataset_page(dataset, stats, folder, counted)
    assert len(decoded) == 3
    spec = RecordSpec(5, 16, 16, steps=4, kept=2)
    other = record(gaussian_model(std=0.5), dataset.prompts(), spec, tmp_path / "other")
    assert other.ids() == dataset.ids()
    write_dataset_page(other, stats, folder, counted)
    assert len(decoded) == 6


def test_curves_are_as_wide_as_their_steps(
    dataset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
):
    drawn: dict[str, dict[str, list[tuple[float, float]]]] = {}
    monkeypatch.setattr(
        trajectory_pictures, "panels", lambda lines, *_args, **_options: drawn.update(lines)
    )
    curves = record_curves(dataset.read(dataset.ids()[0]))
    trajectory_pictures.record_plot(curves, dataset.info.time_grid)
    speed, _, _, numbers = (line for panel in drawn.values() for line in panel.values())
    (noise, middle, data), (first, second) = curves.times, curves.speed
    assert speed == [(data, second), (middle, second), (middle, first), (noise, first)]
    assert [number for _, number in numbers] == [4, 3, 2, 1, 0]


def test_sheet_tells_of_every_clip_and_can_be_stopped(dataset: TrajectoryDataset):
    seen: list[Progress] = []
    record_sheet(dataset.read(dataset.ids()[0]), decode, monitor=seen.append)
    assert [(p.step, p.total) for p in seen] == [(i, 5) for i in (1, 2, 3, 4, 5)]


def test_page_without_a_decoder_has_no_previews(dataset: TrajectoryDataset, tmp_path: Path):
    path = write_dataset_page(dataset, dataset_stats(dataset), tmp_path / "page")
    assert "video" not in {tag for tag, _ in Page(path.read_text()).tags}


def test_record_is_written_as_pictures_and_numbers(dataset: TrajectoryDataset, tmp_path: Path):
    trajectory = dataset.read(dataset.ids()[0])
    paths = write_record(dataset, trajectory, tmp_path / "one", decode)
    assert [path.name for path in paths] == ["curves.json", "curves.png", "states.png"]
    facts = json.loads(paths[0].read_text())
    assert facts["prompt"] == dataset.prompt(trajectory.prompt_id).text
    assert len(facts["speed"]) == 2 and len(facts["times"]) == 3
    assert facts["kept"] == [0, 2, 4] and len(facts["time_grid"]) == 5
    for path in paths[1:]:
        with Image.open(path) as picture:
            assert min(picture.size) > 100
    assert [p.name for p in write_record(dataset, trajectory, tmp_path / "two", None)] == [
        "curves.json",
        "curves.png",
    ]


def test_sheet_has_a_row_for_each_kept_time(dataset: TrajectoryDataset):
    trajectory = dataset.read(dataset.ids()[0])
    heights = []
    for kept in (2, 3):
        part = replace(
            trajectory, latents=trajectory.latents[-kept:], times=trajectory.times[-kept:]
        )
        heights.append(record_sheet(part, decode, frames=2, size=64).height)
    assert heights[1] - heights[0] == pytest.approx(64 + 12, abs=2)

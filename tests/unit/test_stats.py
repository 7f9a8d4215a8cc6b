"""Figures of trajectories and datasets, against paths and clips whose figures are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accvideo_core.conditioning import Prompt
from accvideo_core.errors import AccVideoError
from accvideo_core.monitor import Progress
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record
from accvideo_core.trajectories.stats import (
    chosen_record,
    contrast,
    dataset_stats,
    predicted_clean,
    record_curves,
    saturation,
)
from accvideo_core.trajectories.store import Trajectory
from tests.analytic import condition, gaussian_model, mixture_model

SPEC = RecordSpec(5, 16, 16, steps=8, kept=4, dtype="float32", shift=1.0)


def trajectory(points: list[list[float]], times: tuple[float, ...]) -> Trajectory:
    """States of two numbers, in the shape of latents."""
    latents = torch.tensor(points).reshape(len(points), 2, 1, 1, 1)
    return Trajectory("a" * 32, latents, times, 0, "p", 0)


@pytest.fixture
def dataset(tmp_path: Path) -> TrajectoryDataset:
    texts = ["a cat", "a dog that runs", "a <script>alert(1)</script> bird"]
    prompts = [Prompt.of(text, condition(offset=float(i))) for i, text in enumerate(texts)]
    spec = replace(SPEC, samples_per_prompt=2)
    return record(gaussian_model(), prompts, spec, tmp_path / "clips")


def test_a_straight_path_has_no_bend():
    curves = record_curves(trajectory([[2, 0], [1, 0], [0, 0]], (1.0, 0.5, 0.0)))
    assert curves.cosine == pytest.approx((1, 1)) and curves.bend == pytest.approx(0)
    # |v| = 2 along one of two axes.
    assert curves.speed == pytest.approx((math.sqrt(2), math.sqrt(2)))
    assert curves.change == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))


def test_a_corner_bends_as_computed_by_hand():
    # x_1 - x_0 = (1, 1); the steps' velocities are (2, 0) and (0, 2).
    curves = record_curves(trajectory([[1, 1], [0, 1], [0, 0]], (1.0, 0.5, 0.0)))
    assert curves.cosine == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    assert curves.bend == pytest.approx(1.0)  # |(1, 1) - (2, 0)|^2 = 2 = |(1, 1)|^2


def test_predicted_clean_sample_of_a_straight_path_is_its_end():
    straight = trajectory([[3, -1], [2, 0], [1, 1]], (1.0, 0.5, 0.0))
    expected = torch.tensor([1.0, 1.0]).reshape(1, 2, 1, 1, 1).expand(2, -1, -1, -1, -1)
    assert torch.allclose(predicted_clean(straight), expected)


def test_data_at_two_points_bends_the_path_more_than_data_at_one(tmp_path: Path):
    prompt = Prompt.of("x", condition())
    bends = []
    for name, model in (("point", gaussian_model(1.0, 0.01)), ("mixture", mixture_model())):
        made = record(model, [prompt], replace(SPEC, kept=8), tmp_path / name)
        bends.append(record_curves(made.read(made.ids()[0])).bend)
    assert bends[0] < 0.01 < bends[1]


def test_counts_lengths_and_storage(dataset: TrajectoryDataset):
    stats = dataset_stats(dataset)
    assert (stats.records, stats.prompts, stats.clips) == (6, 3, 6)
    assert stats.records_per_prompt == {2: 3}
    assert stats.words == (2, 3, 4) and stats.characters == tuple(sorted((5, 15, 32)))
    size = sum(path.stat().st_size for path in dataset.folder.glob("records/*/*"))
    assert stats.bytes_total == size and stats.bytes_per_state == pytest.approx(size / 6 / 5)
    assert json.loads(json.dumps(stats.as_dict()))["records"] == 6


def test_figures_of_decoded_clips(dataset: TrajectoryDataset):
    def decode(x: Tensor) -> Tensor:
        """Frames that blink between grey 0.25 and pure red."""
        frames = torch.full((1, 4, 2, 2, 3), 0.25)
        frames[:, 1::2] = torch.tensor([1.0, 0.0, 0.0])
        return frames

    stats = dataset_stats(dataset, decode, samples=2)
    assert stats.clips == 2 and stats.figures["saturation"].mean == pytest.approx(0.5)
    assert stats.figures["contrast"].mean == pytest.approx(0)
    moved = math.sqrt((0.75**2 + 2 * 0.25**2) / 3)
    assert stats.figures["motion"].mean == pytest.approx(moved)
    assert stats.figures["motion"].std == pytest.approx(0, abs=1e-6)


def test_saturation_and_contrast_of_known_frames():
    frames = torch.zeros(2, 1, 1, 2, 3)
    frames[0, 0, 0, 1] = torch.tensor([1.0, 0.5, 0.5])
    frames[1] = 0.7
    assert saturation(frames).tolist() == pytest.approx([0.25, 0])
    half = (0.299 + 0.5 * 0.587 + 0.5 * 0.114) / 2
    assert contrast(frames).tolist() == pytest.approx([half, 0])


def test_same_texts_and_same_clips_are_found(tmp_path: Path):
    same = [Prompt("1" * 16, "a cat", condition()), Prompt("2" * 16, "a cat", condition())]
    made = record(gaussian_model(), same, SPEC, tmp_path / "clips")
    first, second = made.ids()
    copied = made.read(first)
    other = replace(made.read(second), latents=copied.latents)
    made.record_path(second).unlink()
    made.write(other)
    stats = dataset_stats(TrajectoryDataset.open(made.folder))
    assert stats.same_text == (("a cat", 2),)
    assert [(a, b) for a, b, _ in stats.same_clip] == [(first, second)]


def test_measuring_tells_its_progress_and_stops_when_told(dataset: TrajectoryDataset):
    seen: list[Progress] = []
    dataset_stats(dataset, samples=3, monitor=seen.append)
    assert [(p.step, p.total) for p in seen] == [(1, 3), (2, 3), (3, 3)]

    def stop(_progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset_stats(dataset, monitor=stop)


def test_records_are_chosen_by_number_id_or_place(dataset: TrajectoryDataset):
    ids = dataset.ids()
    for which, expected in (("first", 0), ("last", 5), ("2", 2), (3, 3), (ids[4], 4)):
        assert chosen_record(dataset, which) == ids[expected]
    assert chosen_record(dataset, ids[1][:12]) == ids[1]
    for which in ("6", "-1", "nothing", 99):
        with pytest.raises(AccVideoError, match="has no record .* give a number from 0 to 5"):
            chosen_record(dataset, which)

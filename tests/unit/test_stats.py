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
from accvideo_core.files import write_json
from accvideo_core.monitor import Progress
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record, stats
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
    found = dataset_stats(dataset)
    assert (found.records, found.prompts, found.clips) == (6, 3, 6)
    assert found.records_per_prompt == {2: 3}
    assert found.words == (2, 3, 4) and found.characters == tuple(sorted((5, 15, 32)))
    size = sum(path.stat().st_size for path in dataset.folder.glob("records/*/*"))
    assert found.bytes_total == size and found.bytes_per_state == pytest.approx(size / 6 / 5)
    assert json.loads(json.dumps(found.as_dict()))["records"] == 6


def test_figures_of_decoded_clips(dataset: TrajectoryDataset):
    def decode(x: Tensor) -> Tensor:
        """Frames that blink between grey 0.25 and pure red."""
        frames = torch.full((1, 4, 2, 2, 3), 0.25)
        frames[:, 1::2] = torch.tensor([1.0, 0.0, 0.0])
        return frames

    found = dataset_stats(dataset, decode, samples=2)
    assert found.clips == 2 and found.figures["saturation"].mean == pytest.approx(0.5)
    assert found.figures["contrast"].mean == pytest.approx(0)
    moved = (0.75 + 2 * 0.25) / 3
    assert found.figures["motion"].mean == pytest.approx(moved)
    assert found.figures["motion"].std == pytest.approx(0, abs=1e-6)


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
    found = dataset_stats(TrajectoryDataset.open(made.folder))
    assert found.same_text == (("a cat", 2),)
    assert [(a, b) for a, b, _ in found.same_clip] == [(first, second)]


def test_measuring_tells_its_progress_and_stops_when_told(dataset: TrajectoryDataset):
    seen: list[Progress] = []
    dataset_stats(dataset, samples=3, monitor=seen.append)
    assert [(p.step, p.total) for p in seen] == [(1, 3), (2, 3), (3, 3)]

    def stop(_progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset_stats(dataset, monitor=stop)


def test_measuring_goes_on_where_it_was_stopped(dataset: TrajectoryDataset, tmp_path: Path):
    notes, decoded = tmp_path / "measured.jsonl", []

    def decode(x: Tensor) -> Tensor:
        decoded.append(x)
        return x.mean().sigmoid().expand(1, 2, 4, 4, 3)

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset_stats(dataset, decode, monitor=stop, notes=notes)
    with notes.open("a") as file:
        file.write('{"dataset": "torn')  # and the next line stands on its own
    whole = dataset_stats(dataset, decode, notes=notes)
    assert len(decoded) == 6 and whole == dataset_stats(dataset, decode)
    # Notes of another dataset, with records of the same ids, are not taken for this one's.
    spec = replace(SPEC, samples_per_prompt=2)
    other = record(gaussian_model(std=0.5), dataset.prompts(), spec, tmp_path / "other")
    assert other.ids() == dataset.ids()
    assert dataset_stats(other, decode, notes=notes).figures == dataset_stats(other, decode).figures


def test_clips_are_compared_by_a_part_of_their_elements(
    dataset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stats, "COMPARED", 8)
    ids = dataset.ids()
    for id in ids[1:3]:
        copied = replace(dataset.read(id), latents=dataset.read(ids[0]).latents)
        dataset.record_path(id).unlink()
        dataset.write(copied)
    found = dataset_stats(TrajectoryDataset.open(dataset.folder)).same_clip
    assert {(ids[0], ids[1]), (ids[0], ids[2]), (ids[1], ids[2])} <= {(a, b) for a, b, _ in found}


def test_records_that_are_not_there_are_counted_and_explained(dataset: TrajectoryDataset):
    assert dataset_stats(dataset).missing == 0
    lost = dataset.ids()[0]
    dataset.record_path(lost).unlink()
    notes = {lost: "not finite", dataset.ids()[1]: "made since"}
    write_json(dataset.folder / ".claims" / "0.skipped", notes)
    (dataset.folder / ".claims" / "1.skipped").write_text("torn")
    found = dataset_stats(dataset)
    assert found.missing == 1 and found.skipped == {lost: "not finite"}


def test_records_are_chosen_by_number_id_or_place(dataset: TrajectoryDataset):
    ids = dataset.ids()
    for which, expected in (("first", 0), ("last", 5), ("2", 2), (3, 3), (ids[4], 4)):
        assert chosen_record(dataset, which) == ids[expected]
    assert chosen_record(dataset, ids[1][:12]) == ids[1]
    assert len({chosen_record(dataset, "random") for _ in range(60)} & set(ids)) > 1
    for which in ("6", "-1", "nothing", 99):
        with pytest.raises(AccVideoError, match="has no record .* give a number from 0 to 5"):
            chosen_record(dataset, which)

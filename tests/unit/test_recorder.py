"""Recording in the background and side by side: nothing is lost, done twice, or different."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from accvideo_core.errors import AccVideoError
from accvideo_core.monitor import Cancelled, Progress
from accvideo_core.trajectories import Trajectory, TrajectoryDataset, record
from accvideo_core.trajectories.claims import Claims
from accvideo_core.trajectories.record import Outcome, Recorder, plan, prepare
from tests.analytic import analytic_model, gaussian_model, prompts
from tests.unit.test_record import Breaks, snapshot, spec


def test_batches_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    model, given, settings = gaussian_model(), prompts(7, True), spec(samples_per_prompt=2)
    whole = snapshot(record(model, given, settings, tmp_path / "whole").folder)
    dataset = prepare(model, given, settings, tmp_path / "d")
    assert len(dataset) == 0 and dataset.samples_per_prompt == 2
    batches = plan(dataset, None, dataset.samples_per_prompt)
    assert batches == plan(dataset, given, 2) and len(batches) == 8
    told: list[Outcome] = []
    with Recorder(model, dataset) as recorder:
        for batch in [*reversed(batches), batches[3]]:
            recorder.do(batch, stored=told.append)
    assert snapshot(dataset.folder) == whole
    assert [outcome.written for outcome in told] == [1, 2, 2, 2, 1, 2, 2, 2, 0]


def test_a_recorder_with_another_teacher_is_refused(tmp_path: Path) -> None:
    dataset = prepare(gaussian_model(std=0.25), prompts(1), spec(), tmp_path / "d")
    with pytest.raises(AccVideoError, match="is of teacher .* load the teacher"):
        Recorder(gaussian_model(std=0.26), dataset)


def test_the_next_batch_is_computed_while_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_step = threading.Event()
    write = TrajectoryDataset.write

    def slow(self: TrajectoryDataset, trajectory: Trajectory) -> None:
        assert next_step.wait(30), "writing and computing take turns"
        write(self, trajectory)

    monkeypatch.setattr(TrajectoryDataset, "write", slow)

    def watch(progress: Progress) -> None:
        if progress.step == 5:  # of the second batch
            next_step.set()

    dataset = record(gaussian_model(), prompts(4), spec(), tmp_path / "d", watch)
    assert len(dataset) == 4


def test_what_fails_while_writing_stops_the_recording_and_nothing_else_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = gaussian_model(), prompts(20)
    whole = snapshot(record(model, given, spec(), tmp_path / "whole").folder)
    write, tried = TrajectoryDataset.write, []

    def full(self: TrajectoryDataset, trajectory: Trajectory) -> None:
        tried.append(trajectory.id)
        if len(tried) == 3:
            raise AccVideoError("cannot write (No space left on device)")
        write(self, trajectory)

    monkeypatch.setattr(TrajectoryDataset, "write", full)
    with pytest.raises(AccVideoError, match="No space left"):
        record(model, given, spec(), tmp_path / "d")
    assert len(tried) < 12  # at most the batches in flight were computed in vain
    found = TrajectoryDataset.open(tmp_path / "d")
    stored = [id for number, id in enumerate(tried) if number not in (2, 3)]
    assert set(stored) <= set(found.ids()) and found.verify() == []
    monkeypatch.undo()
    assert snapshot(record(model, given, spec(), tmp_path / "d").folder) == whole


def test_a_batch_that_another_is_at_is_waited_for_and_cancelling_still_works(
    tmp_path: Path,
) -> None:
    model, given = gaussian_model(), prompts(4)
    dataset = prepare(model, given, spec(), tmp_path / "d")
    first, second = plan(dataset, given, 1)
    other = Claims(dataset.folder)
    assert other.take(first)
    waits: list[Progress] = []

    def watch(progress: Progress) -> None:
        waits.append(progress)
        if progress.metrics["records_done"] == 2 and len(waits) > 6:
            raise Cancelled

    with pytest.raises(Cancelled):
        record(model, given, spec(), dataset.folder, watch)
    assert set(dataset.ids()) == set(second.ids(0))
    with Recorder(model, dataset) as recorder:  # the other one comes to its end
        recorder.do(first)
    computed: list[Progress] = []
    record(model, given, spec(), dataset.folder, computed.append)
    assert len(dataset) == 4 and [progress.step for progress in computed] == [8]


def test_a_recorder_that_stood_still_leaves_its_batch_to_who_took_it_over(tmp_path: Path) -> None:
    model, given = gaussian_model(), prompts(2)
    dataset = prepare(model, given, spec(), tmp_path / "d")
    (batch,) = plan(dataset, given, 1)
    steps: list[int] = []

    def stand_still(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step == 2 and len(steps) == 2:
            claim = Claims(dataset.folder)._path(batch)
            os.utime(claim, (0, 0))
            with Claims(dataset.folder) as other, Recorder(model, dataset) as recorder:
                assert other.take(batch)
                recorder.do(batch)

    record(model, given, spec(), dataset.folder, stand_still)
    assert len(dataset) == 2 and steps == [1, 2, 0, 4]  # 0: it waits


def test_what_another_found_not_finite_is_not_tried_again_but_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, given = analytic_model(Breaks(0.5, 0.25)), prompts(4, offsets=True)
    steps: list[int] = []

    def other_comes(progress: Progress) -> None:
        if not steps:
            steps.append(0)
            record(model, given[2:], spec(samples_per_prompt=1), tmp_path / "d")
        steps.append(progress.step)

    given = [given[0], given[2], given[3], given[1]]  # what breaks is in the second batch
    with Claims(prepare(model, given, spec(), tmp_path / "d").folder):
        dataset = record(model, given, spec(), tmp_path / "d", other_comes)
    assert len(dataset) == 3 and steps[1:] == [1, 2, 3, 4, 8]
    assert sum("1 of" in message for message in caplog.messages) == 2

"""A crew of workers in threads: the files of one process, whatever happens to the workers."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from accvideo_core.errors import AccVideoError
from accvideo_core.monitor import Cancelled, Monitor, Progress, silent
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record
from accvideo_core.trajectories.cluster import Cluster, connected
from accvideo_core.trajectories.crew import Crew, Patience, WorkerReport
from accvideo_core.trajectories.leases import LARGEST_LEASE, Answer, Ledger
from accvideo_core.trajectories.record import Batch, plan, prepare
from accvideo_core.trajectories.worker import Worker
from tests.analytic import gaussian_model, prompts
from tests.cluster_teacher import STEPS, Accidents

SPEC = RecordSpec(5, 16, 16, samples_per_prompt=2, steps=STEPS, kept=2, batch_size=2)
PROMPTS = prompts(11, offsets=True)
"""6 batches of each sample, the last of them with one record: 12 batches, 22 records."""


class InThreads:
    """A worker that lives in this process. Its calls run in threads that nobody waits for."""

    def __init__(self, source: Accidents, folder: Path) -> None:
        self.worker, self.dead = Worker(source, folder), False

    def call(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                if self.dead:
                    raise RuntimeError("the worker is dead")
                future.set_result(getattr(self.worker, method)(*args))
            except BaseException as error:
                # A process takes its writer along. Here that is at an end before death is noticed.
                if self.worker._recorder is not None:
                    self.worker._recorder.flush()
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def kill(self) -> None:
        self.dead = True


def snapshot(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process records."""
    return snapshot(record(gaussian_model(), PROMPTS, SPEC, tmp_path_factory.mktemp("w")).folder)


@pytest.fixture
def dataset(tmp_path: Path) -> TrajectoryDataset:
    return prepare(gaussian_model(), PROMPTS, SPEC, tmp_path / "clips")


@pytest.fixture
def source(tmp_path: Path) -> Accidents:
    (tmp_path / "notes").mkdir()
    return Accidents(tmp_path / "notes", seconds=0.002)


def missing(dataset: TrajectoryDataset) -> list[Batch]:
    batches = plan(dataset, None, SPEC.samples_per_prompt)
    return [b for b in batches if not all(map(dataset.has, b.ids(dataset.info.seed)))]


def run(
    dataset: TrajectoryDataset,
    source: Accidents,
    monitor: Monitor = silent,
    hire: Callable[[], InThreads] | None = None,
    workers: int = 3,
    **patience: float,
) -> tuple[list[WorkerReport], Ledger]:
    batches, left = plan(dataset, None, SPEC.samples_per_prompt), missing(dataset)
    ledger = Ledger(batches, [batch for batch in batches if batch not in left])
    made = hire or (lambda: InThreads(source, dataset.folder))
    waits = Patience(**{"lease_seconds": 5, "start_seconds": 5, "tick": 0.01, **patience})  # type: ignore[arg-type]
    crew = Crew(made, workers, ledger, lambda: missing(dataset), STEPS, monitor, waits)
    return crew.run(), ledger


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_makes_the_files_of_one_process(
    dataset: TrajectoryDataset, source: Accidents, whole: dict[str, bytes], workers: int
) -> None:
    seen: list[Progress] = []
    reports, ledger = run(dataset, source, seen.append, workers=workers)
    assert snapshot(dataset.folder) == whole
    assert len(source.loaded) == workers
    assert sum(r.records for r in reports) == 22 == ledger.records_done
    assert all(r.home and r.seconds > 0 for r in reports)
    assert {p.total for p in seen} == {12 * STEPS}
    assert max(p.metrics["workers"] for p in seen) == workers


def test_a_worker_that_crashes_is_replaced_and_nothing_is_lost_or_done_twice(
    dataset: TrajectoryDataset, source: Accidents, whole: dict[str, bytes]
) -> None:
    source.plan("crash")
    reports, ledger = run(dataset, source)
    assert snapshot(dataset.folder) == whole
    assert sum(r.restarts for r in reports) == 1 and len(source.loaded) == 4
    assert ledger.finished and ledger.records_done == 22


def test_a_worker_that_hangs_loses_its_lease_to_the_others(
    dataset: TrajectoryDataset, source: Accidents, whole: dict[str, bytes], caplog: Any
) -> None:
    source.plan("hang")
    reports, _ = run(dataset, source, lease_seconds=1.0)
    assert snapshot(dataset.folder) == whole
    assert sum(r.restarts for r in reports) == 1
    assert "made no teacher step in 1 seconds" in caplog.text


def test_slow_steps_are_life(
    dataset: TrajectoryDataset, source: Accidents, whole: dict[str, bytes]
) -> None:
    slow = Accidents(source.folder, seconds=0.15)
    begun = time.monotonic()
    reports, _ = run(dataset, slow, lease_seconds=1.5)
    assert time.monotonic() - begun > 1.5, "no lease was long enough to expire"
    assert sum(r.restarts for r in reports) == 0 and snapshot(dataset.folder) == whole


def test_when_every_worker_keeps_crashing_one_sentence_ends_it_and_the_next_run_goes_on(
    dataset: TrajectoryDataset, source: Accidents, whole: dict[str, bytes]
) -> None:
    source.plan("every crash")
    with pytest.raises(AccVideoError) as raised:
        run(dataset, source, workers=2, restarts=1)
    done = len(dataset)
    text = str(raised.value)
    assert f"no worker is left, {done} of 22 records are done, and the same command goes on" in text
    assert text.endswith("RuntimeError: CUDA error: an illegal memory access")
    assert 0 < done < 22
    (source.folder / "every crash").unlink()
    before = len(source.loaded)
    reports, _ = run(dataset, source, workers=2)
    assert sum(r.records for r in reports) == 22 - done
    assert snapshot(dataset.folder) == whole and len(source.loaded) == before + 2


def test_a_teacher_that_no_worker_can_load_is_one_sentence(
    dataset: TrajectoryDataset, source: Accidents
) -> None:
    source.plan("refuse")
    with pytest.raises(AccVideoError, match="0 of 22 .*'gone' does not exist; check the path$"):
        run(dataset, source)


def test_a_worker_that_does_not_see_the_dataset_says_so(
    dataset: TrajectoryDataset, source: Accidents, tmp_path: Path
) -> None:
    with pytest.raises(AccVideoError, match="does not see the dataset .*elsewhere; put it on"):
        run(dataset, source, hire=lambda: InThreads(source, tmp_path / "elsewhere"))


def test_another_teacher_than_the_datasets_is_refused(
    dataset: TrajectoryDataset, source: Accidents, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Accidents):
        def load(self) -> Any:
            return type("Loaded", (), {"model": gaussian_model(0.7)})

    other = Other(source.folder)
    with pytest.raises(AccVideoError, match="0 of 22 .*teacher"):
        run(dataset, other, hire=lambda: InThreads(other, dataset.folder))


def test_workers_that_no_machine_has_a_place_for_are_one_sentence(
    dataset: TrajectoryDataset, source: Accidents
) -> None:
    class Nowhere(InThreads):
        def call(self, method: str, *args: Any) -> Future[Any]:
            return Future()

    with pytest.raises(AccVideoError, match="0 of 22 .*no machine had a place for it in 0.2 sec"):
        run(dataset, source, hire=lambda: Nowhere(source, dataset.folder), start_seconds=0.2)


def test_cancelling_stops_all_within_a_step_and_the_next_run_goes_on(
    dataset: TrajectoryDataset, source: Accidents, whole: dict[str, bytes]
) -> None:
    slow = Accidents(source.folder, seconds=0.03)

    def cancel(progress: Progress) -> None:
        if progress.metrics["records_done"] >= 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(dataset, slow, cancel)
    files = snapshot(dataset.folder)
    assert files.items() < whole.items() and len(missing(dataset)) > 0
    time.sleep(0.2)
    assert snapshot(dataset.folder) == files, "a worker went on"
    run(dataset, source)
    assert snapshot(dataset.folder) == whole


def test_records_that_vanish_while_recording_are_recorded_again(
    dataset: TrajectoryDataset, source: Accidents, whole: dict[str, bytes]
) -> None:
    lost: list[str] = []

    def lose(progress: Progress) -> None:
        if not lost and len(dataset) > 4:
            lost.extend(dataset.ids()[:1])
            dataset.record_path(lost[0]).unlink()

    run(dataset, source, lose)
    assert lost and snapshot(dataset.folder) == whole


def test_leases_are_small_at_the_end() -> None:
    ledger = Ledger([Batch(0, (f"{i}",)) for i in range(20)])
    sizes = []
    while ledger.open:
        sizes.append(len(ledger.take(workers=2)))
    assert sizes[0] == LARGEST_LEASE and sizes[-3:] == [1, 1, 1] and sum(sizes) == 20


def test_what_a_lease_left_goes_last_and_comes_back() -> None:
    batches = [Batch(0, (f"{i}",)) for i in range(4)]
    ledger = Ledger(batches, done=batches[:1])
    assert list(ledger.open) == batches[1:] and ledger.records_done == 1
    first = ledger.take(1)
    ledger.finish(first, Answer())
    assert list(ledger.open) == [batches[2], batches[3], batches[1]] and not ledger.finished
    ledger.finish((), Answer(done=tuple(batches[1:]), skipped={"a": "b"}))
    assert ledger.finished and ledger.records_done == 3


def test_without_ray_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(AccVideoError, match=r"needs Ray, .* pip install \"accvideo\[cluster\]\""):
        with connected(Cluster()):
            pass


def test_impossible_patience_is_refused() -> None:
    with pytest.raises(AccVideoError, match="lease_seconds is 0; it must be more than 0"):
        Patience(lease_seconds=0)
    with pytest.raises(AccVideoError, match="restarts is -1"):
        Patience(restarts=-1)

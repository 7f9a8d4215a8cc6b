"""Recording with Ray on this machine: two workers make the files of one process, come what may."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from accvideo_core.cli import main
from accvideo_core.errors import AccVideoError
from accvideo_core.models.source import TeacherSource
from accvideo_core.monitor import Cancelled, Monitor, Progress, silent
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record
from accvideo_core.trajectories.cluster import Cluster, ClusterReport, connected, record_on_cluster
from accvideo_core.trajectories.crew import Patience
from accvideo_core.trajectories.record import plan, prepare
from tests.analytic import gaussian_model, prompts
from tests.cluster_teacher import STEPS, Accidents
from tests.tiny import save_random_pipeline

ray: Any = pytest.importorskip("ray", reason='needs Ray: pip install "accvideo[cluster]"')

SPEC = RecordSpec(5, 16, 16, samples_per_prompt=2, steps=STEPS, kept=2, batch_size=2)
PROMPTS = prompts(11, offsets=True)
"""6 batches of each sample, the last of them with one record: 12 batches, 22 records."""
TWO = Cluster(workers=2, patience=Patience(tick=0.02))


def snapshot(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One Ray for all tests here; starting it takes seconds."""
    with connected(TWO):
        yield


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
    return Accidents(tmp_path / "notes", seconds=0.02, together=2)


def run(
    dataset: TrajectoryDataset, source: Accidents, monitor: Monitor = silent, cluster: Cluster = TWO
) -> ClusterReport:
    return record_on_cluster(source, dataset, plan(dataset, None, 2), cluster, monitor)


def test_two_workers_share_the_work_and_make_the_files_of_one_process(
    dataset: TrajectoryDataset, source: Accidents, whole: dict[str, bytes]
) -> None:
    seen: list[Progress] = []
    report = run(dataset, source, seen.append)
    assert snapshot(dataset.folder) == whole
    assert len(report.workers) == len(set(source.loaded)) == 2
    assert all(w.records > 0 and w.home for w in report.workers)
    assert sum(w.records for w in report.workers) == 22 and report.skipped == {}
    assert seen[-1].total == 12 * STEPS and max(p.metrics["workers"] for p in seen) == 2


def test_a_killed_worker_is_replaced_and_every_record_is_there_once(
    dataset: TrajectoryDataset, source: Accidents, whole: dict[str, bytes]
) -> None:
    source.plan("kill")
    report = run(dataset, source)
    assert snapshot(dataset.folder) == whole and dataset.verify() == []
    assert len(dataset) == 22 and sum(w.restarts for w in report.workers) == 1
    assert len(report.workers) == 2


def test_a_worker_that_hangs_past_its_lease_is_ended_and_replaced(
    dataset: TrajectoryDataset, source: Accidents, whole: dict[str, bytes]
) -> None:
    source.plan("hang")
    patience = Patience(lease_seconds=3.0, tick=0.02)
    report = run(dataset, source, cluster=Cluster(workers=2, patience=patience))
    assert snapshot(dataset.folder) == whole
    assert sum(w.restarts for w in report.workers) >= 1
    for pid in source.loaded:
        _wait_until_gone(pid)


def test_cancelling_leaves_a_dataset_that_the_next_run_finishes(
    dataset: TrajectoryDataset, source: Accidents, whole: dict[str, bytes]
) -> None:
    def cancel(progress: Progress) -> None:
        if progress.metrics["records_done"] >= 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(dataset, source, cancel)
    assert 0 < len(dataset) < 22 and snapshot(dataset.folder).items() < whole.items()
    again = run(dataset, source)
    assert sum(w.records for w in again.workers) < 22 and snapshot(dataset.folder) == whole
    assert run(dataset, source).workers == (), "there was nothing left to do"


def test_a_teacher_that_the_workers_cannot_load_is_one_sentence(
    dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    gone = TeacherSource(path=tmp_path / "gone")
    with pytest.raises(AccVideoError, match="no worker is left, 0 of 22 .*gone' does not exist"):
        record_on_cluster(gone, dataset, plan(dataset, None, 2), TWO)


def test_more_workers_than_fit_are_refused(dataset: TrajectoryDataset, source: Accidents) -> None:
    with pytest.raises(AccVideoError, match="1000 workers do not fit, .*; ask for at most"):
        run(dataset, source, cluster=Cluster(workers=1000))
    with pytest.raises(AccVideoError, match="the cluster has 0 GPUs"):
        run(dataset, source, cluster=Cluster(device="cuda"))


def test_the_command_makes_the_same_files_with_two_workers_as_with_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = save_random_pipeline(tmp_path / "teacher")
    command = ["--teacher", str(teacher), "--frames", "5", "--height", "16", "--width", "16"]
    command += ["--steps", "2", "--keep", "2", "--samples", "2", "--batch", "1", "--threads", "1"]
    command += ["--prompt", "a red circle", "--prompt", "a blue square", "--device", "cpu"]
    assert main(["record", str(tmp_path / "one"), *command]) == 0
    monkeypatch.chdir(tmp_path)  # paths are made absolute before they travel
    assert main(["record", "two", *command, "--cluster", "--workers", "2"]) == 0
    assert snapshot(tmp_path / "two") == snapshot(tmp_path / "one")
    out = capsys.readouterr().out
    assert "4 trajectories are in two" in out and "worker 1" in out


def test_workers_without_a_cluster_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "x", "--prompt", "a", "--workers", "2"]) == 2
    assert "--workers 2 needs --cluster" in capsys.readouterr().err


def _wait_until_gone(pid: int) -> None:
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        signal.sigtimedwait([], 0.02)
    raise AssertionError(f"worker {pid} is still there")

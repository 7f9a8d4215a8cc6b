"""Recording on a cluster: a crew of workers that Ray starts, one per GPU, on one machine or many.

Whoever records has prepared the dataset already, on storage that every machine sees under the same
path: its settings, its encoded prompts and the plan. A worker is told nothing but where the dataset
and the teacher lie and which batches to record. It writes its records itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..errors import AccVideoError
from ..files import remove_leftovers
from ..monitor import Monitor, silent
from .crew import Crew, Patience, WorkerReport
from .leases import Ledger
from .record import Batch
from .rollout import not_stored
from .store import TrajectoryDataset
from .worker import Source, Worker

logger = logging.getLogger(__name__)

LOCAL = "local"
_STORE_BYTES = 100 * 2**20
"""Of Ray's object store, through which only plans and counts go."""
_JOIN_SECONDS = 60.0
_QUIET = {"log_to_driver": False, "logging_level": logging.ERROR}


@dataclass(frozen=True, slots=True)
class Cluster:
    """Which workers to record with."""

    address: str = LOCAL
    """ "local" starts Ray on this machine for the while; otherwise that of a Ray that runs."""
    workers: int | None = None
    """None is one per GPU, or without GPUs one per machine."""
    device: str | None = None
    """None is cuda where the cluster has GPUs."""
    threads: int = 1
    """CPU threads of a worker that has no GPU. The last bits may depend on it, so it does not
    follow from the number of workers."""
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AccVideoError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """What came of it."""

    workers: tuple[WorkerReport, ...]
    skipped: Mapping[str, str]
    """Records that are not stored because a state of theirs is not finite: id and one sentence."""


def record_on_cluster(
    source: Source,
    dataset: TrajectoryDataset,
    batches: Sequence[Batch],
    cluster: Cluster = Cluster(),
    monitor: Monitor = silent,
) -> ClusterReport:
    """Record what is missing of `batches` of a prepared dataset; all of it is there afterwards.

    The files are the ones that `record` makes, whatever the number of workers and whatever happens
    to them. When the monitor raises, all finished batches are on the disk.

    Raises AccVideoError when Ray is not there or does not answer, when the cluster is too small,
    when no worker is left, and when
    no trajectory at all is finite.
    """
    dataset = TrajectoryDataset(dataset.folder.absolute(), dataset.info)
    remove_leftovers(dataset.folder)
    gone = set(_missing(dataset, batches))
    ledger = Ledger(batches, [batch for batch in batches if batch not in gone])
    if ledger.finished:
        return ClusterReport((), {})
    with connected(cluster) as ray:
        size, options = _places(ray, cluster)
        remote = ray.remote(Worker).options(**options)
        crew = Crew(
            lambda: _Actor(ray, remote.remote(source, dataset.folder)),
            min(size, len(ledger.open)),
            ledger,
            lambda: _missing(dataset, batches, ledger.skipped),
            len(dataset.info.time_grid) - 1,
            monitor,
            cluster.patience,
        )
        reports = crew.run()
    _tell_skipped(ledger)
    return ClusterReport(tuple(reports), ledger.skipped)


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, connected for the block, or as it is already.

    Raises AccVideoError when Ray is not installed or does not answer.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise AccVideoError(
            "recording on a cluster needs Ray, which is not installed; run "
            'pip install "accvideo[cluster]"'
        ) from None
    if ray.is_initialized():
        yield ray
        return
    # Ray's own lines would run through the progress line.
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        (_start if cluster.address == LOCAL else _join)(ray, cluster)
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AccVideoError(
            f"Ray does not answer at {cluster.address!r} ({line.rstrip('.')}); start it there with "
            "`ray start`, or leave the address out to record on this machine alone"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _start(ray: Any, cluster: Cluster) -> None:
    """Start Ray on this machine, for this process."""
    cpus = max(os.cpu_count() or 1, (cluster.workers or 1) * cluster.threads)
    ray.init(
        LOCAL, num_cpus=cpus, object_store_memory=_STORE_BYTES, include_dashboard=False, **_QUIET
    )


def _join(ray: Any, cluster: Cluster) -> None:
    """Connect to a Ray that runs. Where none does, Ray itself would try for many minutes."""
    failed: list[BaseException] = []

    def join() -> None:
        try:
            ray.init(cluster.address, **_QUIET)
        except BaseException as error:
            failed.append(error)

    # Never for a Ray of our own: its processes end with the thread that started them.
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(_JOIN_SECONDS)
    if failed:
        raise failed[0]
    if thread.is_alive():
        raise ConnectionError(f"no connection in {_JOIN_SECONDS:g} seconds")


class _Actor:
    """A worker that Ray keeps somewhere."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor

    def call(self, method: str, *args: Any) -> Future[Any]:
        return getattr(self._actor, method).remote(*args).future()

    def kill(self) -> None:
        self._ray.kill(self._actor)


def _places(ray: Any, cluster: Cluster) -> tuple[int, dict[str, Any]]:
    """How many workers there will be, and what Ray has to give each."""
    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
    on_gpu = gpus > 0 if cluster.device is None else cluster.device.startswith("cuda")
    room = gpus if on_gpu else cpus // cluster.threads
    machines = len([node for node in ray.nodes() if node["Alive"]])
    size = cluster.workers or max(1, room if on_gpu else min(machines, room))
    if size > room:
        raise AccVideoError(
            f"{size} workers do not fit, because the cluster has {gpus} GPUs and {cpus} CPUs and "
            f"each needs {'a GPU' if on_gpu else f'{cluster.threads} CPU'}; ask for at most {room}"
        )
    return size, {
        "num_cpus": 1 if on_gpu else cluster.threads,
        "num_gpus": 1 if on_gpu else 0,
        "max_concurrency": 2,  # one thread works, one says how it goes
        "max_restarts": 0,  # the crew hires anew itself, and counts
        "scheduling_strategy": "SPREAD",
    }


def _missing(
    dataset: TrajectoryDataset, batches: Sequence[Batch], skipped: Iterable[str] = ()
) -> list[Batch]:
    """Batches with records that are neither on the disk nor skipped."""
    there = set(dataset.ids()) | set(skipped)
    return [batch for batch in batches if not there.issuperset(batch.ids(dataset.info.seed))]


def _tell_skipped(ledger: Ledger) -> None:
    """Name what is not stored, in a warning or, when that is everything, in an error."""
    if not ledger.skipped:
        return
    text = not_stored(ledger.skipped, ledger.records_total)
    if len(ledger.skipped) == ledger.records_total:
        raise AccVideoError(text)
    logger.warning(text)

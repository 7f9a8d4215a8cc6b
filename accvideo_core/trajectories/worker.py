"""The far side of recording with many workers: one process with one teacher.

Nothing here knows how it is called from afar. Two threads call a Worker: one works, the other asks
how it goes, or tells it to stop.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import AccVideoError
from ..monitor import Cancelled
from ..speed import sped_up
from .leases import Answer, Home, Lease, Pulse
from .record import Batch, Outcome, Recorder
from .store import TrajectoryDataset

if TYPE_CHECKING:
    from ..models.video_model import VideoModel


class Source(Protocol):
    """Whatever can load a teacher, anywhere: `models.source.TeacherSource`, or a test's own.

    If it has a `speed`, the teacher is sped up by it.
    """

    def load(self) -> Any:
        """Something with a VideoModel as its `model`."""
        ...


class Worker:
    """Holds a teacher and records the leases it is given."""

    def __init__(self, source: Source, folder: Path) -> None:
        self._source = source
        self._folder = folder
        self._recorder: Recorder | None = None
        self._speed = ExitStack()
        self._pulse = Pulse()
        self._stopping = False

    def load(self) -> Answer:
        """Load the teacher and open the dataset."""
        try:
            # The dataset first: loading takes long.
            dataset = self._open()
            teacher = self._source.load()
            speed = getattr(self._source, "speed", None)
            # For as long as the process lives.
            fast = sped_up(teacher.model, speed, getattr(teacher, "device", None))
            model = self._speed.enter_context(fast)
            self._recorder = Recorder(model, dataset)
        except AccVideoError as error:
            return Answer(refused=str(error))
        return Answer(home=_home(model))

    def work(self, lease: Lease) -> Answer:
        """Record a lease."""
        assert self._recorder is not None, "load comes first"
        stored: dict[Batch, Outcome] = {}
        refused = ""
        try:
            for number, batch in enumerate(lease.batches):
                at = partial(Pulse, lease.number, number)
                self._at(at(0))
                self._recorder.do(
                    batch,
                    lambda step, _preview, at=at: self._at(at(step)),
                    partial(stored.__setitem__, batch),
                )
        except Cancelled:
            pass  # the batches before are finished, this one is left to the next run
        except AccVideoError as error:
            refused = str(error)
        refused = refused or _refusal(self._recorder.flush)
        return Answer(
            done=tuple(stored),
            written=sum(outcome.written for outcome in stored.values()),
            skipped={
                id: reason
                for outcome in stored.values()
                for id, reason in zip(outcome.skipped, outcome.reasons, strict=True)
            },
            refused=refused,
        )

    def pulse(self) -> Pulse:
        """How far the work is. A worker that hangs may still answer this, but always the same."""
        return self._pulse

    def stop(self) -> None:
        """Leave the work at its next step."""
        self._stopping = True

    def _at(self, pulse: Pulse) -> None:
        self._pulse = pulse
        if self._stopping:
            raise Cancelled

    def _open(self) -> TrajectoryDataset:
        if not (self._folder / "dataset.json").is_file():
            raise AccVideoError(
                f"{platform.node()} does not see the dataset {self._folder}; put it on storage "
                "that every machine has under the same path"
            )
        return TrajectoryDataset.open(self._folder)


def _refusal(call: Callable[[], None]) -> str:
    try:
        call()
    except AccVideoError as error:
        return str(error)
    return ""


def _home(model: VideoModel) -> Home:
    import torch

    on_gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if on_gpu else platform.machine()
    return Home(platform.node(), f"{device}, torch {torch.__version__}")

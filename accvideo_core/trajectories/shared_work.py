"""One process' part of recording: its way through the batches, and what it tells the monitor."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..errors import AccVideoError
from ..monitor import Monitor, Progress
from .rollout import Preview

if TYPE_CHECKING:
    from .record import Batch, Recorder

_log = logging.getLogger(__name__)


def share(recorder: Recorder, batches: Sequence[Batch], monitor: Monitor) -> None:
    """Record `batches`; returns once every record of theirs exists or was left out.

    Raises AccVideoError when every trajectory was left out, because none was finite.
    """
    work = _Work(recorder, batches, monitor)
    work.run()


class _Work:
    def __init__(self, recorder: Recorder, batches: Sequence[Batch], monitor: Monitor) -> None:
        self._recorder = recorder
        self._dataset = recorder.dataset
        self._batches = batches
        self._monitor = monitor
        self._steps = len(recorder.dataset.info.time_grid) - 1
        self._skipped: dict[str, str] = {}
        self._batches_done = self._records_done = self._computed = 0
        self._preview: Preview | None = None
        self._records_total = sum(len(batch.prompt_ids) for batch in batches)
        self._start = time.perf_counter()

    def run(self) -> None:
        for batch in self._batches:
            computed = not self._finished(batch)
            if computed:
                outcome = self._recorder.do(batch, partial(self._step, batch))
                self._skipped.update(zip(outcome.skipped, outcome.reasons, strict=True))
            self._finish(batch, computed)
        self._tell_skipped()

    def _finished(self, batch: Batch) -> bool:
        ids = batch.ids(self._dataset.info.seed)
        return all(id in self._skipped or self._dataset.has(id) for id in ids)

    def _step(self, batch: Batch, step: int, preview: Preview) -> None:
        """Tell of a teacher step; the last one is told once its batch is done."""
        self._preview = preview
        if step < self._steps:
            self._report(step, self._computed + len(batch.prompt_ids) * step / self._steps)

    def _finish(self, batch: Batch, computed: bool) -> None:
        self._batches_done += 1
        self._records_done += len(batch.prompt_ids)
        self._computed += len(batch.prompt_ids) if computed else 0
        last = self._batches_done == len(self._batches)
        if last:
            self._recorder.flush()
        if computed or last:
            self._report(0, self._computed)

    def _report(self, step: int, computed: float) -> None:
        elapsed = time.perf_counter() - self._start
        metrics = {
            "records_done": self._records_done - len(self._skipped),
            "records_total": self._records_total,
            "records_skipped": len(self._skipped),
            "seconds_per_record": elapsed / computed if computed else 0.0,
        }
        done, total = self._batches_done * self._steps + step, len(self._batches) * self._steps
        self._monitor(Progress("record", done, total, metrics, self._preview))

    def _tell_skipped(self) -> None:
        """Name what was left out, in a warning or, when that is everything, in an error."""
        if not self._skipped:
            return
        first = next(iter(self._skipped.values()))
        text = (
            f"{len(self._skipped)} of {self._records_total} trajectories are not finite and not "
            f"stored: {first}"
        )
        if len(self._skipped) == self._records_total:
            raise AccVideoError(text)
        _log.warning(text)

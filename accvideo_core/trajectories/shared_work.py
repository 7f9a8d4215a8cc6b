"""One process' part of recording: its way through the batches, and what it tells the monitor.

Processes that record into one folder share the work through claims. Each goes through the batches
in order, passes over what others are at, and comes back to that at the end, when it is done or its
claim is void. So all of them return when everything is recorded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..errors import AccVideoError
from ..monitor import Monitor, Progress
from .claims import Claims
from .rollout import Preview, not_stored

if TYPE_CHECKING:
    from .record import Batch, Outcome, Recorder

_log = logging.getLogger(__name__)


WAIT_SECONDS = 0.25
"""Pause between looks at what others are still at work on; cancelling takes no longer."""


def share(recorder: Recorder, batches: Sequence[Batch], monitor: Monitor) -> None:
    """Record `batches`; returns once every record of theirs exists or was left out.

    Raises AccVideoError when every trajectory was left out, because none was finite.
    """
    # The recorder comes last and goes first: what it still has to write is still claimed then.
    with Claims(recorder.dataset.folder) as claims, recorder:
        _Work(recorder, claims, batches, monitor).run()


class _TakenOver(Exception):
    """This process stood still so long that another has the batch now."""


class _Work:
    def __init__(
        self, recorder: Recorder, claims: Claims, batches: Sequence[Batch], monitor: Monitor
    ) -> None:
        self._recorder = recorder
        self._dataset = recorder.dataset
        self._claims = claims
        self._batches = batches
        self._monitor = monitor
        self._steps = len(recorder.dataset.info.time_grid) - 1
        self._known = set(recorder.dataset.ids())
        self._skipped: dict[str, str] = {}
        self._left_to_others: set[Batch] = set()
        self._batches_done = self._records_done = self._computed = 0
        self._preview: Preview | None = None
        self._records_total = sum(len(batch.prompt_ids) for batch in batches)
        self._start = time.perf_counter()

    def run(self) -> None:
        try:
            open_batches = [batch for batch in self._batches if not self._settle(batch)]
            while open_batches:
                time.sleep(WAIT_SECONDS)
                self._report(0, self._computed)
                open_batches = [batch for batch in open_batches if not self._settle(batch)]
        finally:
            if self._skipped and len(self._skipped) < self._records_total:
                _log.warning(not_stored(self._skipped, self._records_total))
        if self._skipped and len(self._skipped) == self._records_total:
            raise AccVideoError(not_stored(self._skipped, self._records_total))

    def _settle(self, batch: Batch) -> bool:
        """Do what is left to do of a batch; False when that is in another's hands."""
        if self._finished(batch):
            self._finish(batch, computed=False)
            return True
        if not self._claims.take(batch):
            return False
        if self._finished(batch):  # between the two questions
            self._claims.release(batch)
            self._finish(batch, computed=False)
            return True
        try:
            step, stored = partial(self._step, batch), partial(self._stored, batch)
            outcome = self._recorder.do(batch, step, stored)
        except _TakenOver:
            self._claims.release(batch)
            return False
        self._skipped.update(zip(outcome.skipped, outcome.reasons, strict=True))
        self._finish(batch, computed=True)
        return True

    def _finished(self, batch: Batch) -> bool:
        """Whether all records exist, but for those that cannot be made."""
        ids = batch.ids(self._dataset.info.seed)
        missing = [id for id in ids if id not in self._known and not self._dataset.has(id)]
        if missing:
            noted = self._claims.noted(batch)
            self._skipped.update((id, noted[id]) for id in missing if id in noted)
        return all(id in self._skipped for id in missing)

    def _step(self, batch: Batch, step: int, preview: Preview) -> None:
        """Tell of a teacher step; the last one is told once its batch is done."""
        self._preview = preview
        self._claims.renew()
        # Left to the other once: where every claim runs out, somebody has to come to an end.
        if batch not in self._left_to_others and not self._claims.holds(batch):
            self._left_to_others.add(batch)
            raise _TakenOver
        if step < self._steps:
            self._report(step, self._computed + len(batch.prompt_ids) * step / self._steps)

    def _stored(self, batch: Batch, outcome: Outcome) -> None:
        """Give a batch back that is on the disk; others need not try what cannot be made."""
        if outcome.skipped:
            self._claims.note(batch, dict(zip(outcome.skipped, outcome.reasons, strict=True)))
        self._claims.release(batch)

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

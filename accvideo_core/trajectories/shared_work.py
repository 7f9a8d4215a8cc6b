"""One process' part of recording or ingesting: its way through the batches, and what it tells.

Processes that write into one folder share the work through claims. Each goes through the batches
in order, passes over what others are at, and comes back to that at the end, when it is done or its
claim is void. So all of them return when everything is recorded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Protocol

from ..errors import AccVideoError
from ..monitor import Monitor, Progress
from .claims import Claims
from .rollout import Preview, Report

if TYPE_CHECKING:
    from .record import Batch, Outcome
    from .store import TrajectoryDataset

_log = logging.getLogger(__name__)


WAIT_SECONDS = 0.25
"""Pause between looks at what others are still at work on; cancelling takes no longer."""


class Maker(AbstractContextManager[object], Protocol):
    """Makes the records of a dataset, batch by batch: a `Recorder`, an `Ingester`."""

    @property
    def dataset(self) -> TrajectoryDataset: ...

    @property
    def stage(self) -> str:
        """What its work is called to the monitor."""
        ...

    def steps(self, batch: Batch, /) -> int:
        """How many steps a batch takes, of which `do` reports each."""
        ...

    def do(self, batch: Batch, report: Report, stored: Callable[[Outcome], None]) -> Outcome: ...

    def flush(self) -> None: ...

    def not_stored(self, skipped: Mapping[str, str], total: int) -> str:
        """One sentence on those of `total` records that are `skipped` (id: why)."""
        ...


def share(maker: Maker, batches: Sequence[Batch], monitor: Monitor) -> dict[str, str]:
    """Have `batches` made; returns once every record of theirs exists or was left out.

    Returns the ids of those that were left out, with the reason of each. Raises AccVideoError when
    that is every one.
    """
    # The maker comes last and goes first: what it still has to write is still claimed then.
    with Claims(maker.dataset.folder) as claims, maker:
        return _Work(maker, claims, batches, monitor).run()


class _TakenOver(Exception):
    """This process stood still so long that another has the batch now."""


class _Work:
    def __init__(
        self, maker: Maker, claims: Claims, batches: Sequence[Batch], monitor: Monitor
    ) -> None:
        self._maker = maker
        self._dataset = maker.dataset
        self._claims = claims
        self._batches = batches
        self._monitor = monitor
        self._steps_total = sum(map(maker.steps, batches))
        self._known = set(maker.dataset.ids())
        self._skipped: dict[str, str] = {}
        self._left_to_others: set[Batch] = set()
        self._batches_done = self._records_done = self._computed = 0
        self._steps_done = 0
        self._preview: Preview | None = None
        self._records_total = sum(len(batch.prompt_ids) for batch in batches)
        self._start = time.perf_counter()

    def run(self) -> dict[str, str]:
        try:
            open_batches = [batch for batch in self._batches if not self._settle(batch)]
            while open_batches:
                time.sleep(WAIT_SECONDS)
                self._report(0, self._computed)
                open_batches = [batch for batch in open_batches if not self._settle(batch)]
        finally:
            if self._skipped and len(self._skipped) < self._records_total:
                _log.warning(self._maker.not_stored(self._skipped, self._records_total))
        if self._skipped and len(self._skipped) == self._records_total:
            raise AccVideoError(self._maker.not_stored(self._skipped, self._records_total))
        return self._skipped

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
            outcome = self._maker.do(batch, step, stored)
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
        """Tell of a step; the last one is told once its batch is done."""
        self._preview = preview
        self._claims.renew()
        # Left to the other once: where every claim runs out, somebody has to come to an end.
        if batch not in self._left_to_others and not self._claims.holds(batch):
            self._left_to_others.add(batch)
            raise _TakenOver
        steps = self._maker.steps(batch)
        if step < steps:
            self._report(step, self._computed + len(batch.prompt_ids) * step / steps)

    def _stored(self, batch: Batch, outcome: Outcome) -> None:
        """Give a batch back that is on the disk; others need not try what cannot be made."""
        if outcome.skipped:
            self._claims.note(batch, dict(zip(outcome.skipped, outcome.reasons, strict=True)))
        self._claims.release(batch)

    def _finish(self, batch: Batch, computed: bool) -> None:
        self._batches_done += 1
        self._steps_done += self._maker.steps(batch)
        self._records_done += len(batch.prompt_ids)
        self._computed += len(batch.prompt_ids) if computed else 0
        last = self._batches_done == len(self._batches)
        if last:
            self._maker.flush()
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
        done = self._steps_done + step
        self._monitor(Progress(self._maker.stage, done, self._steps_total, metrics, self._preview))

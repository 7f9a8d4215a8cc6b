"""The near side of recording with many workers: who does what, until all of it is done.

A worker gets a lease, a few batches, and keeps it for as long as it shows life, which is a new
teacher step every `lease_seconds`. A worker that dies or hangs loses its lease: its batches go back
to the others, and another worker takes its seat. That is safe at any moment, because a record
follows from its id alone: who comes back late writes the same bytes under the same name.

How workers are reached does not matter here: `hire` starts one, and its calls are Futures.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import AccVideoError
from ..monitor import Monitor, Progress
from .leases import Answer, Home, Lease, Ledger, Pulse, records_in
from .record import Batch

logger = logging.getLogger(__name__)


class Member(Protocol):
    """A `Worker` that lives elsewhere."""

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Call a method of it. A dead worker's calls fail."""
        ...

    def kill(self) -> None:
        """End it, whatever it is doing."""
        ...


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a crew waits for a worker, and how often it takes on another for it."""

    lease_seconds: float = 900.0
    """Without a new teacher step, after which a worker loses its lease."""
    start_seconds: float = 1800.0
    """For a place on a machine, and again for loading the teacher."""
    restarts: int = 3
    """Replacements of one worker in a row that end with no record."""
    tick: float = 0.25
    """Seconds between two looks at the workers; Ctrl-C is noticed as quickly."""

    def __post_init__(self) -> None:
        for name in ("lease_seconds", "start_seconds", "tick"):
            if not getattr(self, name) > 0:
                raise AccVideoError(f"{name} is {getattr(self, name)}; it must be more than 0")
        if self.restarts < 0:
            raise AccVideoError(f"restarts is {self.restarts}; it must be at least 0")


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What one seat of the crew did, whoever sat in it."""

    home: Home | None
    records: int
    seconds: float
    """Since its first teacher was loaded."""
    restarts: int

    @property
    def records_per_hour(self) -> float:
        return 3600 * self.records / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        if self.home is None:
            return "never came to work"
        again = f", replaced {self.restarts} times" if self.restarts else ""
        return (
            f"on {self.home.node} ({self.home.kind}): {self.records} records, "
            f"{self.records_per_hour:,.1f} an hour{again}"
        )


@dataclass(eq=False)
class _Seat:
    """One place in the crew, and who sits there: waiting, loading, idle, working, or gone."""

    number: int
    member: Member
    state: str = "waiting"
    pending: Future[Any] | None = None
    pulse_asked: Future[Any] | None = None
    pulse: Pulse = Pulse()
    deadline: float = 0.0
    lease: Lease | None = None
    home: Home | None = None
    since: float = 0.0
    """When its first teacher was loaded."""
    written: int = 0
    restarts: int = 0
    in_a_row: int = 0
    """Restarts since the last records."""

    def begin(self, state: str, seconds: float, method: str, *args: Any) -> None:
        self.state, self.deadline = state, time.monotonic() + seconds
        self.pending = self.member.call(method, *args)

    @property
    def name(self) -> str:
        return f"worker {self.number}" + (f" on {self.home.node}" if self.home else "")

    @property
    def batches_begun(self) -> tuple[int, int]:
        """Whole batches of its lease that are computed, and steps of the next."""
        mine = self.lease is not None and self.pulse.lease == self.lease.number
        return (self.pulse.batch, self.pulse.step) if mine else (0, 0)


class Crew:
    """Workers who record what is open in a ledger."""

    def __init__(
        self,
        hire: Callable[[], Member],
        size: int,
        ledger: Ledger,
        missing: Callable[[], list[Batch]],
        steps: int,
        monitor: Monitor,
        patience: Patience,
    ) -> None:
        """`hire` starts a worker, `size` is how many, `steps` the teacher's per batch; `missing`
        looks at the disk for batches with records that are neither there nor skipped.
        """
        self.hire, self.size, self.ledger, self.missing = hire, size, ledger, missing
        self.steps, self.monitor, self.patience = steps, monitor, patience
        self.seats: list[_Seat] = []
        self._leases = 0
        self._steps_before = len(ledger.done) * steps

    def run(self) -> list[WorkerReport]:
        """Work until all is done and the disk agrees.

        When the monitor raises, workers leave their work at its next step. Raises AccVideoError
        when no worker is left.
        """
        try:
            for number in range(self.size):
                self.seats.append(_Seat(number, self.hire()))
                self._seat(self.seats[-1])
            self._finish()
            again = self.missing()
            if again:
                self.ledger.reopen(again)
                self._finish()
                self._check(self.missing())
        except BaseException:
            self._stop()
            raise
        finally:
            for seat in self._there():
                seat.member.kill()
        now = time.monotonic()
        return [
            WorkerReport(s.home, s.written, now - s.since if s.since else 0.0, s.restarts)
            for s in self.seats
        ]

    def _finish(self) -> None:
        """Until every batch is done."""
        while not self.ledger.finished:
            for seat in self._there():
                self._listen(seat)
                self._watch(seat)
                if seat.state == "idle" and self.ledger.open:
                    self._lease(seat)
            self._tell()
            asked = [s.pending for s in self._there() if s.pending]
            if asked:
                wait(asked, self.patience.tick, FIRST_COMPLETED)

    def _there(self) -> list[_Seat]:
        return [seat for seat in self.seats if seat.state != "gone"]

    def _seat(self, seat: _Seat) -> None:
        """A new worker's first call, which it answers once some machine has a place for it."""
        seat.begin("waiting", self.patience.start_seconds, "pulse")

    def _lease(self, seat: _Seat) -> None:
        self._leases += 1
        seat.lease = Lease(self._leases, self.ledger.take(len(self._there())))
        seat.begin("working", self.patience.lease_seconds, "work", seat.lease)

    def _listen(self, seat: _Seat) -> None:
        """Take a worker's answer, if there is one, and go on from it."""
        if seat.pulse_asked and seat.pulse_asked.done():
            asked, seat.pulse_asked = seat.pulse_asked, None
            pulse = seat.pulse if asked.exception() else asked.result()
            if pulse != seat.pulse and seat.state == "working":
                seat.pulse = pulse
                seat.deadline = time.monotonic() + self.patience.lease_seconds
        if seat.pending is None or not seat.pending.done():
            return
        pending, seat.pending = seat.pending, None
        error = pending.exception()
        if error is not None:
            self._lose(seat, _sentence(error))
        elif seat.state == "waiting":
            seat.begin("loading", self.patience.start_seconds, "load")
        else:
            self._answered(seat, pending.result())

    def _answered(self, seat: _Seat, answer: Answer) -> None:
        """A worker has loaded, or has come to the end of its lease."""
        if seat.lease is not None:
            self.ledger.finish(seat.lease.batches, answer)
            seat.lease = None
        seat.written += answer.written
        seat.in_a_row = 0 if answer.written else seat.in_a_row
        seat.state = "idle"
        if answer.home is not None:
            seat.home, seat.since = answer.home, seat.since or time.monotonic()
            self._compare(seat, answer.home)
        if answer.refused:
            self._lose(seat, answer.refused, for_good=True)

    def _watch(self, seat: _Seat) -> None:
        """Ask a worker how it goes, and give it up when it has been silent for too long."""
        if seat.state == "working" and seat.pulse_asked is None:
            seat.pulse_asked = seat.member.call("pulse")
        if seat.pending is None or time.monotonic() <= seat.deadline:
            return
        patience = self.patience
        if seat.state == "waiting":
            if all(other.state == "waiting" for other in self._there()):
                reason = f"no machine had a place for it in {patience.start_seconds:g} seconds"
                self._lose(seat, reason, for_good=True)
        elif seat.state == "loading":
            self._lose(seat, f"its teacher was not there after {patience.start_seconds:g} seconds")
        else:
            self._lose(seat, f"it made no teacher step in {patience.lease_seconds:g} seconds")

    def _lose(self, seat: _Seat, reason: str, for_good: bool = False) -> None:
        """Give a worker up, hand its batches to the others and, if it may help, its seat too.

        A worker that refused has told the user's error, which another would run into as well.
        """
        name = seat.name
        seat.member.kill()
        if seat.lease is not None:
            self.ledger.finish(seat.lease.batches, Answer())
        seat.pending = seat.pulse_asked = seat.lease = None
        again = not for_good and seat.in_a_row < self.patience.restarts
        logger.warning("%s was lost%s: %s", name, " and is replaced" if again else "", reason)
        if again:
            seat.restarts += 1
            seat.in_a_row += 1
            seat.member = self.hire()
            self._seat(seat)
            return
        seat.state = "gone"
        if not self._there():
            total = self.ledger.records_total
            # Lost workers did not tell of all they wrote.
            done = total - records_in(self.missing()) - len(self.ledger.skipped)
            raise AccVideoError(
                f"no worker is left, {done} of {total} records are done, and the same command "
                f"goes on from there; {name} was the last to be lost: {reason}"
            )

    def _compare(self, seat: _Seat, home: Home) -> None:
        others = (other for other in self._there() if other is not seat and other.home)
        other = next((o for o in others if o.home and o.home.kind != home.kind), None)
        if other and other.home:
            logger.warning(
                "workers compute with different things, so the last bits of a record depend on who "
                "records it: %s (%s) and %s (%s)",
                *(seat.name, home.kind, other.name, other.home.kind),
            )

    def _check(self, lost: Sequence[Batch]) -> None:
        if lost:
            raise AccVideoError(
                f"{records_in(lost)} records were recorded twice and are still not in the dataset; "
                "see that every machine has the same storage under its path, and run the same "
                "command to go on"
            )

    def _tell(self) -> None:
        """Tell the monitor; it may raise."""
        first = min((seat.since for seat in self.seats if seat.since), default=time.monotonic())
        seconds = time.monotonic() - first
        steps, begun = len(self.ledger.done) * self.steps, 0
        for seat in self._there():
            whole, step = seat.batches_begun
            steps += whole * self.steps + step
            begun += records_in(seat.lease.batches[:whole]) if seat.lease else 0
        total = self.ledger.records_total
        share = (steps - self._steps_before) / (len(self.ledger.batches) * self.steps)
        workers = [s for s in self._there() if s.state in ("idle", "working")]
        metrics = {
            "records_done": self.ledger.records_done + begun,
            "records_total": total,
            "seconds_per_record": seconds / (share * total) if share > 0 else 0.0,
            "records_per_hour": 3600 * share * total / seconds if seconds else 0.0,
            "workers": len(workers),
            "records_skipped": len(self.ledger.skipped),
            **{f"records_by_worker_{s.number}": s.written for s in workers},
        }
        self.monitor(Progress("record", steps, len(self.ledger.batches) * self.steps, metrics))

    def _stop(self) -> None:
        """Have all workers leave their work at its next step, and wait until they have."""
        working = [seat for seat in self._there() if seat.state == "working"]
        for seat in working:
            seat.member.call("stop")
        wait([seat.pending for seat in working if seat.pending], self.patience.lease_seconds)


def _sentence(error: BaseException) -> str:
    """What a call failed with, without the traces of two machines."""
    cause = getattr(error, "cause", None)
    error = cause if isinstance(cause, BaseException) else error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'without a word'}"

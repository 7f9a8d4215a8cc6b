"""What goes between a crew and its workers, and the ledger of who has what. All plain data."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .record import Batch

LARGEST_LEASE = 4
"""Batches. Of what a dead worker had, only the batch it was at is computed again."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A few batches that one worker has the right to record, for as long as it shows life."""

    number: int
    batches: tuple[Batch, ...]


@dataclass(frozen=True, slots=True)
class Home:
    """Where a worker lives and what it computes with."""

    node: str
    kind: str
    """Device and library; workers that differ in it make records that differ in the last bits."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of loading, or of a lease. Everything that it tells of is on the disk."""

    done: tuple[Batch, ...] = ()
    written: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Records that are not stored because a state of theirs is not finite: id and one sentence."""
    refused: str = ""
    """Why the worker cannot go on, as a sentence for the user."""
    home: Home | None = None


@dataclass(frozen=True, slots=True)
class Pulse:
    """How far a worker is: `step` of batch number `batch` of lease number `lease`."""

    lease: int = -1
    batch: int = 0
    step: int = 0


class Ledger:
    """Which batches are open and which are done; those in between are on lease."""

    def __init__(self, batches: Sequence[Batch], done: Iterable[Batch] = ()) -> None:
        self.batches = tuple(batches)
        self.done = set(done)
        self.open = deque(batch for batch in self.batches if batch not in self.done)
        self.skipped: dict[str, str] = {}

    @property
    def finished(self) -> bool:
        return len(self.done) == len(self.batches)

    @property
    def records_total(self) -> int:
        return records_in(self.batches)

    @property
    def records_done(self) -> int:
        """Records on the disk."""
        return records_in(self.done) - len(self.skipped)

    def take(self, workers: int) -> tuple[Batch, ...]:
        """The next few batches; fewer towards the end, so that nobody waits for one worker."""
        size = max(1, min(LARGEST_LEASE, len(self.open) // (2 * workers)))
        return tuple(self.open.popleft() for _ in range(min(size, len(self.open))))

    def finish(self, leased: Sequence[Batch], answer: Answer) -> None:
        """What a lease came to. What it left goes last: it may be what ends workers."""
        self.done.update(answer.done)
        self.skipped.update(answer.skipped)
        self.open.extend(batch for batch in leased if batch not in self.done)

    def reopen(self, batches: Sequence[Batch]) -> None:
        """Have finished batches recorded again."""
        self.done.difference_update(batches)
        self.open.extend(batches)


def records_in(batches: Iterable[Batch]) -> int:
    return sum(len(batch.prompt_ids) for batch in batches)

"""Writer: a background thread that writes records while the next ones are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

Job = Callable[[], None]


_Self = TypeVar("_Self", bound="Closing")


class Closing:
    """Closes itself where its block ends."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()


class Writer(Closing):
    """Runs jobs one after another in a thread of its own.

    At most `depth` of them are in flight (one at work, the others waiting), so memory is bounded:
    whoever brings one more waits. What a job raises comes out of the next call, once.
    """

    def __init__(self, depth: int = 2) -> None:
        self._depth = depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="accvideo-writer")
        self._jobs: deque[Future[None]] = deque()
        self._error: BaseException | None = None

    def put(self, job: Job) -> None:
        """Have `job` run, after waiting for room. Raises what an earlier job raised."""
        while len(self._jobs) >= self._depth:
            self._settle()
        self._jobs.append(self._pool.submit(job))
        self.check()

    def check(self) -> None:
        """Raise what an earlier job raised, without waiting."""
        while self._jobs and self._jobs[0].done():
            self._settle()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def flush(self) -> None:
        """Wait until every job has run. Raises what one of them raised."""
        while self._jobs:
            self._settle()
        self.check()

    def close(self) -> None:
        """`flush`, and let the thread end."""
        try:
            self.flush()
        finally:
            self._pool.shutdown()

    def _settle(self) -> None:
        """Wait for the oldest job and keep the first error."""
        error = self._jobs.popleft().exception()
        self._error = self._error or error

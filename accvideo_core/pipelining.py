"""Finishing: decoding and writing one clip in the background while the next one is sampled.

    with Finishing(finish, told=terminal.say) as finishing:
        for latents, path in ...:
            finishing.put((latents, path))

Clips are finished one after the other, in order; none is after one that could not be. One more
may wait: whoever samples faster than clips are finished waits too, so that memory does not fill up
with them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from .errors import AccVideoError

WAITING = 1
"""Clips that may wait behind the one that is being finished."""
_Clip = TypeVar("_Clip")
_Result = TypeVar("_Result")


def _nothing(_result: Any) -> None:
    pass


class Finishing(Generic[_Clip, _Result]):
    """Use as a context manager; leaving it waits for what is left.

    Where the block raises, a clip that waits is dropped and the one at work is finished: what
    writes its files whole or not at all leaves no part of one.
    """

    def __init__(
        self,
        finish: Callable[[_Clip], _Result],
        told: Callable[[_Result], None] = _nothing,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            finish: runs in a thread of its own.
            told: called with each result, in order, in the thread that puts clips.
            device: a GPU on which `finish` computes, on a stream beside the caller's.
        """
        self._finish, self._told = finish, told
        self._thread = ThreadPoolExecutor(1, "finishing")
        self._stream = torch.cuda.Stream(device) if device and device.type == "cuda" else None
        self._open: deque[Future[_Result]] = deque()
        self._failed = False

    def put(self, clip: _Clip) -> None:
        """Have a clip finished; waits while another one waits.

        Raises:
            AccVideoError: an earlier clip could not be finished; nothing is finished any more.
        """
        self._take(WAITING)
        ready = None if self._stream is None else torch.cuda.current_stream().record_event()
        self._open.append(self._thread.submit(self._run, clip, ready))

    def __enter__(self) -> Finishing[_Clip, _Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._take(0)
        finally:
            self._thread.shutdown(cancel_futures=True)

    def _take(self, left: int) -> None:
        """Tell the results that are there, and wait until at most `left` clips wait."""
        while self._open and (len(self._open) > left or self._open[0].done()):
            try:
                result = self._open.popleft().result()
            except AccVideoError:
                raise
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise AccVideoError(
                    f"a clip could not be decoded or written ({reason}); those before it are "
                    "finished, and the others can be sampled again"
                ) from error
            self._told(result)

    def _run(self, clip: _Clip, ready: Any) -> _Result:
        if self._failed:
            raise CancelledError  # nobody sees it: the error before it comes first
        try:
            with self._beside(ready):
                result = self._finish(clip)
                if self._stream is not None:
                    self._stream.synchronize()  # the clip's memory is given to others after this
                return result
        except BaseException:
            self._failed = True
            raise

    def _beside(self, ready: Any) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_event(ready)
        return torch.cuda.stream(self._stream)

"""Clips that are finished in the background: the same files in the same order, and no half ones."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accvideo_core.errors import AccVideoError
from accvideo_core.files import write_bytes
from accvideo_core.monitor import Cancelled
from accvideo_core.pipelining import WAITING, Finishing
from accvideo_core.video import read_video, write_video

SECONDS = 30
"""That nothing here takes; who waits so long waits in vain."""


class Gate:
    """A `finish` that goes on when it is told to."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.begins, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, clip: int) -> int:
        self.begun.append(clip)
        self.begins.release()
        assert self.go.acquire(timeout=SECONDS)
        return clip


def frames(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.rand(5, 16, 16, 3, generator=generator)


def test_files_and_their_order_are_those_of_doing_one_after_the_other(tmp_path: Path) -> None:
    told: list[Path] = []

    def finish(number: int) -> Path:
        time.sleep(0.02 * (number == 0))  # the first one takes longest
        return write_video(tmp_path / "beside" / f"{number}.mp4", frames(number), 8)

    with Finishing(finish, told.append) as finishing:
        for number in range(5):
            finishing.put(number)
    assert told == [tmp_path / "beside" / f"{number}.mp4" for number in range(5)]
    for number, path in enumerate(told):
        alone = write_video(tmp_path / "alone.mp4", frames(number), 8)
        assert torch.equal(read_video(path)[0], read_video(alone)[0])


def test_the_caller_goes_on_while_a_clip_is_finished_and_one_waits() -> None:
    gate, put = Gate(), []

    def sample() -> None:
        with Finishing(gate) as finishing:
            for clip in range(4):
                finishing.put(clip)
                put.append(clip)
                waits.release()

    waits = threading.Semaphore(0)
    caller = threading.Thread(target=sample)
    caller.start()
    for _ in range(1 + WAITING):
        assert waits.acquire(timeout=SECONDS)
    assert gate.begins.acquire(timeout=SECONDS)
    assert gate.begun == [0] and not waits.acquire(timeout=0.2)
    assert len(put) == 1 + WAITING  # and the third is not taken before the first is finished
    for _ in range(4):
        gate.go.release()
    caller.join(SECONDS)
    assert put == gate.begun == [0, 1, 2, 3]


def test_results_are_told_in_the_callers_thread() -> None:
    threads: list[str] = []
    with Finishing(
        lambda clip: clip, lambda _: threads.append(threading.current_thread().name)
    ) as (finishing):
        finishing.put(1)
    assert threads == [threading.current_thread().name]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AccVideoError("the disk is full; free space"), r"^the disk is full; free space$"),
        (RuntimeError("CUDA\nout of memory"), r"^a clip could not be .* \(CUDA out of memory\); "),
        (ValueError(), r"\(ValueError\)"),
    ],
)
def test_an_error_of_the_background_stops_the_caller_in_one_sentence(
    error: Exception, message: str
) -> None:
    finished: list[int] = []

    def finish(clip: int) -> None:
        if clip == 1:
            time.sleep(0.05)  # the next one waits already
            raise error
        finished.append(clip)

    with pytest.raises(AccVideoError, match=message) as stopped, Finishing(finish) as finishing:
        for clip in range(10):
            finishing.put(clip)
    assert "\n" not in str(stopped.value)
    assert finished == [0]


def test_an_error_of_the_last_clip_is_seen_too() -> None:
    def finish(_clip: int) -> None:
        raise AccVideoError("no space")

    with pytest.raises(AccVideoError, match="no space"), Finishing(finish) as finishing:
        finishing.put(0)


def test_a_cancel_drops_what_waits_and_leaves_no_half_file(tmp_path: Path) -> None:
    begun, go = threading.Event(), threading.Event()

    def finish(clip: int) -> None:
        begun.set()
        assert go.wait(SECONDS)
        write_bytes(tmp_path / str(clip), b"x" * 1000)

    with pytest.raises(Cancelled), Finishing(finish) as finishing:  # noqa: PT012
        finishing.put(0)
        assert begun.wait(SECONDS)
        finishing.put(1)
        go.set()
        raise Cancelled
    left = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert left in ({"0": 1000}, {"0": 1000, "1": 1000})


def test_nothing_is_left_behind_when_no_clip_was_put() -> None:
    with Finishing(lambda clip: clip):
        pass
    assert not [thread for thread in threading.enumerate() if "finishing" in thread.name]

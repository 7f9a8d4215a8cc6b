"""The background writer: in order, bounded, and no error is lost."""

from __future__ import annotations

import threading

import pytest

from accvideo_core.trajectories.writer import Writer


def test_jobs_run_in_order_in_another_thread_while_the_caller_goes_on() -> None:
    gate, ran, threads = threading.Event(), [], set()

    def job(number: int) -> None:
        assert gate.wait(10)
        ran.append(number)
        threads.add(threading.get_ident())

    with Writer(depth=3) as writer:
        for number in range(3):
            writer.put(lambda number=number: job(number))
        assert ran == []  # put has returned three times, and nothing has run
        gate.set()
    assert ran == [0, 1, 2] and len(threads) == 1 and threading.get_ident() not in threads


def test_no_more_than_depth_are_in_flight() -> None:
    gate, come = threading.Event(), threading.Event()
    writer = Writer(depth=2)
    writer.put(lambda: gate.wait(10) and None)
    writer.put(lambda: None)

    def third() -> None:
        writer.put(lambda: None)
        come.set()

    caller = threading.Thread(target=third)
    caller.start()
    assert not come.wait(0.1)  # it waits for room
    gate.set()
    assert come.wait(10)
    caller.join()
    writer.close()


def fail(gate: threading.Event, text: str) -> None:
    assert gate.wait(10)
    raise ValueError(text)


@pytest.mark.parametrize("call", ["put", "check", "flush", "close"])
def test_an_error_comes_out_of_the_next_call_once_and_later_jobs_still_run(call: str) -> None:
    gate, ran = threading.Event(), []
    writer = Writer(depth=1)
    writer.put(lambda: fail(gate, "disk full"))
    gate.set()
    if call == "check":
        writer._jobs[0].exception()  # waits
    with pytest.raises(ValueError, match="disk full"):
        if call == "put":
            writer.put(lambda: ran.append("later"))
        else:
            getattr(writer, call)()
    writer.close()  # the error does not come again
    assert ran == (["later"] if call == "put" else [])


def test_of_several_errors_the_first_counts() -> None:
    gate = threading.Event()
    writer = Writer(depth=2)
    for text in ("first", "second"):
        writer.put(lambda text=text: fail(gate, text))
    gate.set()
    with pytest.raises(ValueError, match="first"):
        writer.close()


def test_leaving_by_an_exception_still_writes_what_was_put() -> None:
    ran: list[int] = []
    with pytest.raises(KeyError), Writer() as writer:
        writer.put(lambda: ran.append(1))
        raise KeyError
    assert ran == [1]

"""Claims: one process at a time, void when its holder is dead or silent, and by no one's clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from accvideo_core.trajectories import claims as module
from accvideo_core.trajectories.claims import Claims
from accvideo_core.trajectories.record import Batch

A, B = Batch(0, ("p", "q")), Batch(1, ("p", "q"))


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / module.FOLDER).iterdir())


def the_claim_of(claims: Claims, batch: Batch) -> Path:
    return claims._path(batch)


def the_claim(folder: Path) -> Path:
    (path,) = (folder / module.FOLDER).glob("*.claim")
    return path


def test_a_batch_is_claimed_by_one_and_free_after_its_release(tmp_path: Path) -> None:
    first, second = Claims(tmp_path, "first"), Claims(tmp_path, "second")
    assert first.take(A) and first.take(A) and not second.take(A)
    assert second.take(B) and not first.take(B)
    assert first.holds(A) and not second.holds(A)
    assert json.loads(the_claim_of(first, A).read_text())["owner"].startswith("first ")
    first.release(A)
    assert not first.holds(A) and second.take(A)
    first.release(A)  # no longer its own: nothing happens
    assert second.holds(A)
    second.close()
    assert files(tmp_path) == []


def test_a_claim_that_is_not_renewed_is_taken_over_and_its_holder_notices(tmp_path: Path) -> None:
    slow, quick = Claims(tmp_path, seconds=100), Claims(tmp_path, seconds=100)
    assert slow.take(A)
    aged(the_claim(tmp_path), 99)
    assert not quick.take(A)
    aged(the_claim(tmp_path), 101)
    assert quick.take(A) and quick.holds(A) and not slow.holds(A)
    slow.release(A)
    slow.close()
    assert quick.holds(A) and not slow.take(A)


def aged(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_renewing_prolongs_what_is_held_and_nothing_else(tmp_path: Path) -> None:
    one, other = Claims(tmp_path, seconds=100), Claims(tmp_path, seconds=100)
    assert one.take(A)
    aged(the_claim(tmp_path), 90)
    one.renew()  # a quarter of the time has not passed: no file is touched
    assert time.time() - the_claim(tmp_path).stat().st_mtime > 80
    one._renewed -= 100
    one.renew()
    assert time.time() - the_claim(tmp_path).stat().st_mtime < 50
    aged(the_claim(tmp_path), 101)
    assert other.take(A)
    aged(the_claim(tmp_path), 90)
    one._renewed -= 100
    one.renew()
    assert time.time() - the_claim(tmp_path).stat().st_mtime > 80


@pytest.mark.parametrize("days", [-400, 400])
def test_a_wrong_clock_neither_frees_nor_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    right, wrong = Claims(tmp_path), Claims(tmp_path)
    assert right.take(A)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86400 * days)
    assert not wrong.take(A) and wrong.take(B)
    assert not right.take(B) and right.holds(A)
    monkeypatch.undo()
    aged(the_claim_of(right, A), -86400)  # the disk's clock was set back since
    assert wrong.take(A)


def test_claims_that_expire_at_once_block_nobody(tmp_path: Path) -> None:
    one, other = Claims(tmp_path, seconds=0), Claims(tmp_path, seconds=0)
    for _ in range(3):
        assert one.take(A) and other.take(A) and not one.holds(A)


HOLDER = """
import os, sys
from pathlib import Path
from accvideo_core.trajectories.claims import Claims
from accvideo_core.trajectories.record import Batch
claims = Claims(Path(sys.argv[1]))
assert claims.take(Batch(0, ("p", "q")))
print("taken", flush=True)
sys.stdin.read()
os._exit(9)
"""


def test_a_dead_holder_on_the_same_machine_is_noticed_at_once(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == b"taken\n"
        claims = Claims(tmp_path)
        assert not claims.take(A)
        holder.stdin.close()
        assert holder.wait(60) == 9
    assert claims.take(A)


def test_a_dead_holder_on_another_machine_is_waited_for(tmp_path: Path) -> None:
    gone, claims = Claims(tmp_path), Claims(tmp_path)
    gone._machine = "elsewhere"
    assert gone.take(A)
    gone._held.popitem()[1].close()  # as when the process died
    assert not claims.take(A)
    aged(the_claim(tmp_path), module.SECONDS + 1)
    assert claims.take(A)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"seconds": "x"}', bytes(300)])
def test_a_claim_that_cannot_be_read_holds_for_its_time(tmp_path: Path, content: bytes) -> None:
    """It may be one that is just being made."""
    claims = Claims(tmp_path)
    path = the_claim_of(claims, A)
    path.write_bytes(content)
    assert not claims.take(A)
    aged(path, module.SECONDS + 1)
    assert claims.take(A)


def test_of_two_that_take_over_at_once_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other finds a live claim where it saw the void one, and gives it back."""
    Claims(tmp_path).take(A)
    aged(the_claim(tmp_path), module.SECONDS + 1)
    quick, slow = Claims(tmp_path), Claims(tmp_path)
    rename: Callable[..., None] = os.rename

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        assert quick.take(A)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert not slow.take(A) and quick.holds(A)
    assert files(tmp_path) == [the_claim_of(quick, A).name]


def test_closing_clears_void_claims_of_others_and_leaves_live_ones(tmp_path: Path) -> None:
    dead, alive, last = Claims(tmp_path), Claims(tmp_path), Claims(tmp_path)
    assert dead.take(A) and alive.take(B)
    aged(the_claim_of(dead, A), module.SECONDS + 1)
    last.close()
    assert files(tmp_path) == [the_claim_of(alive, B).name]


def test_notes_count_for_those_who_had_begun(tmp_path: Path) -> None:
    before = Claims(tmp_path)
    assert before.noted(A) == {}
    before.note(A, {"id": "why"})
    assert before.noted(A) == {"id": "why"} and before.noted(B) == {}
    path = before._note_path(A)
    aged(path, 10)
    assert Claims(tmp_path).noted(A) == {}
    path.write_text("[]")
    assert before.noted(A) == {}

"""What power cuts, full disks, hanging networks and rotten disks do to a recording and its copies.

Short runs of `recorder.py`, `tools.py` and `rot.py`;
`python -m tests.faults.long` runs them at length.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from accvideo_core.errors import AccVideoError
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record
from tests.analytic import gaussian_model, prompts

ROOT = Path(__file__).parents[2]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")


def run(*args: object, module: str = "recorder") -> str:
    command = [sys.executable, "-m", f"tests.faults.{module}", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def work(folder: Path, samples: int = 1) -> TrajectoryDataset:
    spec = RecordSpec(5, 32, 32, samples, steps=4, kept=4, batch_size=2)
    return record(gaussian_model(), prompts(12), spec, folder)


@needs_fork
def test_sigkill_at_random_moments_changes_no_byte(tmp_path: Path) -> None:
    told = run("kill", tmp_path, "--times", 8).split()
    assert told[0] == "killed" and int(told[1]) >= 8 and told[-2:] == ["same", "bytes"]


@needs_fork
def test_sigkill_of_merge_subset_and_export_loses_doubles_and_touches_nothing(
    tmp_path: Path,
) -> None:
    told = run(tmp_path, "--times", 3, module="tools").splitlines()
    jobs = [line.partition(":")[0] for line in told]
    assert jobs == ["merge", "copy", "subset", "safetensors", "npy"]
    for line in told:
        words = line.split()
        assert words[1] == "killed" and int(words[2]) >= 3 and words[-2:] == ["same", "bytes"]


@needs_fork
def test_recorders_in_one_folder_do_no_batch_twice_whatever_their_clocks(tmp_path: Path) -> None:
    assert "same bytes, no batch twice" in run("race", tmp_path)


@needs_fork
def test_recorders_whose_claims_run_out_at_once_harm_nothing(tmp_path: Path) -> None:
    assert "same bytes" in run("expired", tmp_path)


@needs_fork
def test_work_of_a_recorder_that_hangs_is_taken_over_and_left_to_the_other(tmp_path: Path) -> None:
    assert "took over" in run("hang", tmp_path)


@needs_fork
def test_a_file_size_limit_is_one_sentence_and_resume_completes(tmp_path: Path) -> None:
    message = run("limit", tmp_path)
    assert message.startswith("cannot write ") and f"{tmp_path}/full/records" in message
    assert "File too large" in message and "free space there" in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KB; skips where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    yield folder
    # Lazily: a process that was just killed may still hold a file of it.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_sentence_and_resume_completes(tmp_path: Path, small_disk: Path) -> None:
    whole = snapshot(work(tmp_path / "whole", samples=2).folder)
    folder = small_disk / "clips"
    work(folder).add_prompts(prompts(12), 2)
    first = snapshot(folder)
    with open(small_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
        while True:
            filler.write(bytes(4096))
    os.truncate(small_disk / "filler", os.path.getsize(small_disk / "filler") - 5 * 4096)
    with pytest.raises(AccVideoError, match="cannot write .*No space left.*free space there"):
        work(folder, samples=2)
    left = snapshot(folder)
    assert first.items() <= left.items() <= whole.items()
    assert TrajectoryDataset.open(folder).verify() == []
    (small_disk / "filler").unlink()
    work(folder, samples=2)
    assert snapshot(folder) == whole


@needs_fork
@pytest.mark.parametrize("seed", range(3))
def test_rot_is_found_removed_and_recorded_again(tmp_path: Path, seed: int) -> None:
    from tests.faults.rot import rot

    assert rot(tmp_path, seed).startswith("11 faults found, mended and recorded again")

"""What power cuts, full disks and rotten disks do to a recording: nothing that is not noticed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from accvideo_core.errors import AccVideoError
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record
from tests.analytic import gaussian_model, prompts

SCRIPT = Path(__file__).parent / "recorder.py"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")


def run(*args: object) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def work(folder: Path, samples: int = 1) -> TrajectoryDataset:
    spec = RecordSpec(5, 32, 32, samples, steps=4, kept=4, batch_size=2)
    return record(gaussian_model(), prompts(12), spec, folder)


@needs_fork
def test_sigkill_at_random_moments_changes_no_byte(tmp_path: Path) -> None:
    assert "killed 10 times" in run("kill", tmp_path, "--times", 10)


@needs_fork
def test_two_recorders_in_one_folder_harm_nothing(tmp_path: Path) -> None:
    assert "same bytes" in run("race", tmp_path)


@needs_fork
def test_a_file_size_limit_is_one_sentence_and_resume_completes(tmp_path: Path) -> None:
    message = run("limit", tmp_path)
    assert message.startswith("cannot write ") and str(tmp_path) in message
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
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_sentence_and_resume_completes(tmp_path: Path, small_disk: Path) -> None:
    whole = snapshot(work(tmp_path / "whole", samples=2).folder)
    folder = small_disk / "clips"
    first = snapshot(work(folder).folder)
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


def test_rot_is_found_and_recording_again_mends_it(tmp_path: Path) -> None:
    folder = work(tmp_path / "clips").folder
    whole = snapshot(folder)
    chance = random.Random(0)
    for _ in range(5):
        files = [folder / name for name in whole if name.endswith(".safetensors")]
        damaged = chance.sample(sorted(files), 8)
        for path in damaged[:4]:
            data = bytearray(path.read_bytes())
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
        for path in damaged[4:]:
            os.truncate(path, chance.randrange(path.stat().st_size))
        faults = TrajectoryDataset.open(folder).verify()
        assert len(faults) == 8
        for path in damaged:
            assert sum(str(path) in fault for fault in faults) == 1
            path.unlink()
        assert work(folder).verify() == []
        assert snapshot(folder) == whole

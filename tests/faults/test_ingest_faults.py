"""What power cuts and full disks do to an ingestion. Short runs of `ingester.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")


def run(*args: object) -> str:
    command = [sys.executable, "-m", "tests.faults.ingester", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sigkill_at_random_moments_changes_no_byte(tmp_path: Path) -> None:
    told = run("kill", tmp_path, "--times", 5).split()
    assert told[0] == "killed" and int(told[1]) >= 5 and told[-2:] == ["same", "bytes"]


def test_several_in_one_folder_do_no_video_twice(tmp_path: Path) -> None:
    assert "same bytes, no video twice" in run("race", tmp_path)


def test_a_file_size_limit_is_one_sentence_and_resume_completes(tmp_path: Path) -> None:
    message = run("limit", tmp_path)
    assert message.startswith("cannot write ") and "File too large" in message
    assert "free space there" in message and len(message.splitlines()) == 1

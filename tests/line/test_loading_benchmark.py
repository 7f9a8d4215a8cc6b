"""The benchmark of loading runs and compares like with like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_benchmark_loads_the_same_weights_on_both_sides(root: Path, tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.loading", "--small", "--only", "fp32"]
    command += ["--folder", str(tmp_path), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["side"] for row in rows] == ["ours", "diffusers"]
    assert len({run["fingerprint"] for row in rows for run in row["runs"]}) == 1
    assert all(run["seconds"] > 0 and run["peak"] > 0 for row in rows for run in row["runs"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]  # the files are gone

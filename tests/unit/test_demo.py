"""The demo's harness: progress lines, the collected folder, and a server that dies."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from scripts.comfyui.client import Event
from scripts.comfyui.server import ComfyServer, ServerError
from scripts.demo import Progress, collect, duration

PROMPT = {
    "1": {"class_type": "AccVideoDistill", "inputs": {}, "_meta": {"title": "Distil"}},
    "2": {"class_type": "AccVideoCompare", "inputs": {}},
}


def write_report(output: Path, name: str, age: float = 0.0) -> Path:
    folder = output / "accvideo" / name
    folder.mkdir(parents=True)
    report = folder / "report.json"
    report.write_text(json.dumps({"rows": [{"name": name, "steps": 5}]}), encoding="utf-8")
    (folder / "clip.mp4").write_bytes(b"video")
    written = report.stat().st_mtime - age
    os.utime(report, (written, written))
    return report


def test_progress_names_node_steps_and_text() -> None:
    stream = io.StringIO()
    progress = Progress(PROMPT, stream)
    progress(Event("1"))
    progress(Event("1", value=30, total=120))
    assert progress.line(progress.started + 10) == "Distil  30/120  ETA 30 s"
    progress(Event("1", text="distill 30/120, loss 0.031, 30 s left"))
    assert progress.line(0) == "Distil  distill 30/120, loss 0.031, 30 s left"
    progress(Event("2"))
    progress.finish()
    written = stream.getvalue()
    assert "Distil: done in 0 s  distill 30/120, loss 0.031, 30 s left" in written
    assert "AccVideoCompare: done" in written


def test_duration_is_written_for_people() -> None:
    assert [duration(s) for s in (4.4, 60, 125)] == ["4 s", "1 min 00 s", "2 min 05 s"]


def test_only_what_this_run_wrote_is_collected(tmp_path: Path) -> None:
    out, output = tmp_path / "demo", tmp_path / "output"
    out.mkdir()
    (out / "stale.png").write_bytes(b"old")
    report = write_report(output, "new")
    write_report(output, "yesterday", age=86400.0)
    assert collect(output, report.stat().st_mtime, out) == [out]
    assert sorted(path.name for path in out.iterdir()) == ["clip.mp4", "report.json"]
    assert json.loads((out / "report.json").read_text())["rows"][0]["name"] == "new"


def test_several_comparisons_keep_their_folders(tmp_path: Path) -> None:
    out, output = tmp_path / "demo", tmp_path / "output"
    write_report(output, "a")
    write_report(output, "b")
    assert collect(output, 0.0, out) == [out / "a", out / "b"]
    assert (out / "b" / "clip.mp4").read_bytes() == b"video"


def test_a_dying_server_is_reported_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "ComfyUI"
    fake.mkdir()
    (fake / "main.py").write_text("raise SystemExit('no such model folder')\n", encoding="utf-8")
    monkeypatch.setenv("COMFYUI_PATH", str(fake))
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    with pytest.raises(ServerError, match="no such model folder"):
        ComfyServer(tmp_path / "base").start()


def test_a_folder_without_a_server_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(ServerError, match="set COMFYUI_PATH to a ComfyUI folder"):
        ComfyServer(tmp_path / "base").start()

"""`accvideo profile` on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accvideo_core import profiling
from accvideo_core.cli import main
from accvideo_core.models.tiny import embedded_teacher_path
from accvideo_core.profiling import Peaks
from accvideo_core.video import read_video

PEAKS = Peaks("a device", "float32", 8192, flops=1e11, bytes=1e10)
PROMPT = "a red circle moving left on a plain background"


@pytest.fixture(autouse=True)
def known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (embedded_teacher_path() / "model_index.json").is_file():
        pytest.skip("this checkout has no embedded teacher")
    monkeypatch.setattr(profiling.profiler, "measure_peaks", lambda *_: PEAKS)


def test_a_profile_is_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    size = ["--frames", "5", "--height", "16", "--width", "16"]
    assert main(["profile", str(out), "--prompt", PROMPT, "--steps", "2", *size]) == 0
    text = (out / "profile.txt").read_text(encoding="utf-8")
    shown = capsys.readouterr().out
    assert text.strip() in shown and str(out) in shown
    assert "step 2 (t 0." in text and "VAE decoder" in text and "text_encoder_2" in text
    found = json.loads((out / "profile.json").read_text(encoding="utf-8"))
    assert found["peaks"]["flops"] == 1e11 and found["groups"]["network"] > 0
    frames, _ = read_video(out / "clip.mp4")
    assert frames.shape == (5, 16, 16, 3)
    assert (out / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_a_setting_that_the_machine_lacks_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["profile", str(tmp_path / "out"), "--prompt", PROMPT, "--attention", "quick"]
    assert main(command) == 2
    assert "accvideo profile: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

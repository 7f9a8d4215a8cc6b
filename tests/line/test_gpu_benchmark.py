"""The benchmark for a GPU runs with tiny models on a CPU, row by row, and loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from accvideo_core.models.building import empty
from accvideo_core.models.pipeline_folder import diffusers_class
from accvideo_core.profiling import Peaks
from accvideo_core.speed import Speed
from benchmarks import gpu
from benchmarks.gpu_cases import CASES, TINY
from benchmarks.gpu_table import targets

PEAKS = Peaks("a device", "float32", 8192, flops=1e11, bytes=1e10)
pytestmark = pytest.mark.usefixtures("quick")
OURS, TINY_DECODER = "ours", "ours + fp8, tiny decoder"
DONE = {"text_s", "step_s", "denoise_s", "vae_s", "total_s", "share", "flops", "steps"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without a compiler, which takes a minute for every row; and known peaks."""
    monkeypatch.setattr(gpu, "BACKEND", "eager")
    monkeypatch.setattr(gpu, "measure_peaks", lambda *_: PEAKS)


def run(out: Path, *arguments: str) -> dict[str, Any]:
    assert gpu.main(["--tiny", "--out", str(out), *arguments]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_rows_of_every_model_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    run(out, "--rows", "diffusers")
    ours = {
        OURS: gpu.ROWS[OURS],
        TINY_DECODER: lambda b: gpu.our_row(b, Speed(fp8=True), tiny=True),
    }
    monkeypatch.setattr(gpu, "ROWS", ours)
    found = run(out, "--models", "Wan I2V")["models"]
    assert list(found) == [case.label for case in TINY]
    for label, rows in found.items():
        more = {OURS, TINY_DECODER} if label.startswith("Wan I2V") else set()
        # The earlier call's rows are still there.
        assert rows.keys() == {"diffusers, teacher", "diffusers, student"} | more
        teacher, student = rows["diffusers, teacher"], rows["diffusers, student"]
        assert teacher.keys() >= DONE and student.keys() >= DONE
        assert teacher["steps"] in (40, 50) and student["steps"] == 5
        assert student["total_s"] == pytest.approx(
            student["text_s"] + student["vae_s"] + 5 * student["step_s"]
        )
    wan = found[TINY[1].label]
    assert wan["diffusers, teacher"]["flops"] == 2 * wan["diffusers, student"]["flops"]
    assert wan[OURS].keys() >= DONE | {"cfg_step_s"}
    assert wan[TINY_DECODER].keys() >= DONE | {"error"}


def test_a_row_that_fails_says_why_and_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(_: object) -> dict[str, Any]:
        raise torch.OutOfMemoryError("Tried to allocate")

    def broken(_: object) -> dict[str, Any]:
        raise ValueError("no such\nkernel")

    rows = {"diffusers, teacher": too_large, "ours": broken, "ours + compile": gpu.ROWS["ours"]}
    monkeypatch.setattr(gpu, "ROWS", rows)
    found = run(tmp_path / "gpu.json", "--models", "Wan tiny")["models"][TINY[2].label]
    assert found["diffusers, teacher"] == {"failed": "does not fit"}
    assert found["ours"] == {"failed": "ValueError: no such kernel"}
    assert found["ours + compile"].keys() >= DONE
    assert "does not fit" in capsys.readouterr().out


def test_rows_that_no_time_is_left_for_are_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path / "gpu.json", "--models", "Wan tiny", "--seconds", "0")
    assert found["models"] in ({}, {TINY[2].label: {}})
    assert "no time is left for it" in capsys.readouterr().out


def test_targets_are_judged_by_what_was_measured() -> None:
    def rows(step: float, total: float, share: float) -> dict[str, Any]:
        return {
            "diffusers, teacher": {"total_s": 2000.0},
            "diffusers, student": {"total_s": 250.0},
            "ours": {"total_s": total, "share": share, "cfg_step_s": step},
        }

    label, wan = CASES[0].label, CASES[1].label
    found = targets({label: rows(9.0, 90.0, 0.7), wan: rows(5.1, 30.0, 0.5)})
    assert [met for _, _, met in found] == [True, True, True, True, False]
    assert [met for _, _, met in targets({label: rows(9.0, 130.0, 0.7)})][:3] == [
        False, False, None,
    ]  # fmt: skip


def test_the_released_shapes_have_the_released_sizes() -> None:
    """In billions of weights."""
    sizes = {"HunyuanVideo 13B": 12.8, "Wan I2V 14B": 16.4, "Wan 14B": 14.3, "Wan 1.3B": 1.42}
    for case in {case.name: case for case in CASES}.values():
        module = empty(diffusers_class(case.family.transformer_class), case.config)
        count = sum(p.numel() for p in module.parameters()) / 1e9
        assert count == pytest.approx(sizes[case.name], rel=0.01)


def test_random_networks_are_random_and_finite() -> None:
    case = TINY[0]
    made = [case.module(torch.device("cpu"), torch.float32) for _ in range(2)]
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all() and (a.numel() < 2 or a.std() > 0)

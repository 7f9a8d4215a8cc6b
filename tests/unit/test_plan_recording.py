"""The planning table: its arithmetic, against real files, and as it stands in the docs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accvideo_core.files import write_safetensors
from accvideo_core.trajectories import record_id
from scripts.plan_recording import OVERHEAD, PLANS, files_per_folder, main, prompt_bytes


def test_storage_is_what_a_file_of_that_shape_takes(tmp_path: Path) -> None:
    plan = replace(PLANS[0], size=(64, 96, 17))
    states = torch.zeros(6, 16, 5, 8, 12, dtype=torch.bfloat16)
    write_safetensors(tmp_path / "x.safetensors", {"latents": states})
    size = (tmp_path / "x.safetensors").stat().st_size
    assert 0 < size - plan.record_bytes(6) < 2000
    assert replace(plan, bytes_per_value=4).record_bytes(6) == 2 * plan.record_bytes(6)


def test_the_published_storage_figures_come_out() -> None:
    hunyuan, wan = PLANS[0], PLANS[2]
    assert round(hunyuan.record_bytes(6) / 1e6) == 38 and round(wan.record_bytes(6) / 1e6) == 25
    assert round(hunyuan.record_bytes(51) / 1e6) == 320
    assert 4.1 < hunyuan.storage(6) / 1e12 < 4.2 and 35 < hunyuan.storage(51) / 1e12 < 35.5


def test_hours_days_and_cost_follow_from_seconds() -> None:
    plan = replace(PLANS[0], seconds=3600.0, records=48, gpus=2, price=3.0)
    assert plan.gpu_hours == pytest.approx(48 * (1 + OVERHEAD))
    assert plan.days == pytest.approx(1 + OVERHEAD) and plan.cost == pytest.approx(3 * 48 * 1.03)
    assert plan.write_rate(6) == pytest.approx(2 * plan.record_bytes(6) / 3600)


def test_records_spread_over_the_folders_as_said() -> None:
    count = 20_000
    found = Counter(record_id(0, f"prompt {i}", 0)[:2] for i in range(count))
    mean, deviation = files_per_folder(count)
    assert len(found) == 256 and mean == pytest.approx(count / 256)
    spread = math.sqrt(sum((n - mean) ** 2 for n in found.values()) / 256)
    # The deviation of 256 draws is known to about 1 / sqrt(512) of itself; four times that.
    assert spread == pytest.approx(deviation, rel=0.18)


def test_prompts_are_float32_vectors() -> None:
    assert prompt_bytes(1000, 100) == 1000 * 100 * 4096 * 4


def test_own_figures_make_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    main("--seconds 360 --price 2 --records 1000 --gpus 10 --states 6 --size 480x832x81".split())
    out = capsys.readouterr().out
    assert "| 103 | 0.4 on 10 | 206 | 0.03 |" in out and "| given |" in out


def test_the_docs_hold_the_table(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    main([])
    page = (root / "docs" / "cluster.md").read_text(encoding="utf-8")
    missing = [line for line in capsys.readouterr().out.split("\n\n")[0].splitlines()
               if line not in page]  # fmt: skip
    assert missing == []

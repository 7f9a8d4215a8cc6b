"""The benchmarks of sampling run, compare like with like, and say what they did."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from accvideo_core.sampling import SamplePlan
from benchmarks import sampling
from benchmarks.sampling import SPEEDS, bench_speed, bench_tokens
from benchmarks.sampling_cases import cases, hunyuan
from benchmarks.sampling_pipelines import OurClip, diffusers_clip
from benchmarks.sampling_rows import SAME, Options, Result, difference, line

QUICK = Options(quick=True, repeats=1)


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    sampling.main(["--quick", "--out", str(out), *arguments])
    return json.loads(out.read_text(encoding="utf-8"))


def test_rows_hold_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "--only", "loop", "--only", "steps")
    assert found["machine"]["threads"] == torch.get_num_threads()
    names = [row["name"] for row in found["rows"]]
    assert [name.partition(":")[0] for name in names] == [
        "hunyuan_video",
        "wan_t2v",
        "wan_t2v, guidance",
        "a late step / an early step",
    ]
    for row in found["rows"]:
        assert row["ours"] > 0 and row["theirs"] > 0
        assert row["passed"] == (row["figure"] <= row["aim"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and ("PASS" in shown or "FAIL" in shown)


@pytest.mark.parametrize("family", ["hunyuan_video", "wan_t2v"])
def test_both_sides_make_the_same_clip(family: str, tmp_path: Path) -> None:
    case = cases(quick=True)[family]
    folder = case.save(tmp_path / "pipeline")
    ours, theirs = OurClip(case, folder, 3)(), diffusers_clip(case, folder, 3)()
    plan = case.plan
    assert ours.shape == (plan.frames, plan.height, plan.width, 3)
    apart = difference(ours, theirs)
    assert apart is not None and apart < SAME
    assert ours.std() > 0.01  # a clip of one colour would agree with anything


def test_a_different_result_fails_whatever_its_time() -> None:
    row = Result("x", 0.5, aim=1.0, difference=0.01)
    assert not row.passed and "FAIL" in line(row)
    assert Result("x", 0.5, aim=1.0, difference=1e-4).passed
    assert difference(torch.ones(2), torch.ones(3)) == math.inf


def test_operations_are_those_of_the_network_alone() -> None:
    """Twice the blocks add the same again."""
    plan = SamplePlan(5, 32, 32)

    def count(blocks: int) -> int:
        case = hunyuan(32, plan, num_layers=1, num_single_layers=blocks)
        return sampling.step_operations(case.model(), case.condition(), case.noise())

    assert count(3) - count(2) == count(2) - count(1) > 1e6


def test_exponents_follow_from_the_rows() -> None:
    whole, last = bench_tokens(QUICK)
    rows = whole.facts["rows"]
    tokens, flops = ([row[key] for row in rows[-2:]] for key in ("tokens", "flops"))
    expected = math.log(flops[1] / flops[0]) / math.log(tokens[1] / tokens[0])
    assert last.theirs == pytest.approx(expected) and 1 < expected < 2
    assert last.figure == pytest.approx((last.ours or 0) / expected)


def test_settings_are_compared_with_a_plain_model_of_the_same_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wan = cases(quick=True)["wan_t2v"]
    monkeypatch.setattr(sampling, "cases", lambda _quick: {"wan_t2v": wan})
    found = {row.name: row for row in bench_speed(QUICK)}
    assert len(found) == len(SPEEDS)
    for name, row in found.items():
        inexact = "fp8" in name or "sparse" in name
        error = row.facts["error"] if inexact else row.difference
        assert 0 <= error < (0.5 if inexact else SAME), name


def test_without_a_checkout_the_official_rows_are_left_out(tmp_path: Path) -> None:
    assert run(tmp_path, "--only", "official")["rows"] == []

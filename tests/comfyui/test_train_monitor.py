"""What is told of a run that goes on after update 500 of 1000, a tenth of a second each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pack_process import facts_of

PACE = r"distill (\d+)/1000, loss 0\.\d+, ([\d.]+) s/step, (\d+) s left"


@pytest.fixture(scope="module")
def told(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("monitor")
    return facts_of("monitor_script.py", comfyui_path, base)


def at(told: dict[str, Any], step: int) -> dict[str, Any]:
    """The first event at or after an update."""
    return next(event for event in told["events"] if event["step"] >= step)


def test_events_come_twice_a_second_and_at_the_end(told: dict[str, Any]) -> None:
    assert 90 <= len(told["events"]) <= 110  # in 50 seconds
    assert told["events"][-1]["step"] == told["events"][-1]["total"] == 1000
    assert {(event["node"], event["run"]) for event in told["events"]} == {("12:3", "long")}


def test_curve_begins_at_the_first_update_and_stays_small(told: dict[str, Any]) -> None:
    for event in told["events"]:
        line = event["lines"]["trajectory"]
        assert 125 < len(line) <= 250 and line[0][0] <= 4 and line[-1][0] == event["step"]
        assert len(json.dumps(event)) < 20_000


def test_pace_and_time_left_count_from_where_the_run_goes_on(told: dict[str, Any]) -> None:
    told_of = [re.match(PACE, text) for text in told["texts"]]
    paces = [(int(m[1]), float(m[2]), int(m[3])) for m in told_of if m]
    assert len(paces) > 90
    assert all(pace == 0.1 for _, pace, _ in paces)
    assert all(abs(left - 0.1 * (1000 - step)) < 1 for step, _, left in paces)


def test_sample_and_warnings_stay_until_the_next_look(told: dict[str, Any]) -> None:
    warning = "motion fell to 80 % of the teacher's"
    assert at(told, 590)["sample"] is None and at(told, 590)["notes"] == []
    for step in (605, 795):
        assert at(told, step)["notes"] == [warning]
        assert at(told, step)["sample"]["filename"] == "600.png"
        assert at(told, step)["sample"]["subfolder"] == "accvideo/runs/long/samples"
    assert any(warning in text for text in told["texts"])
    assert at(told, 805)["notes"] == [] and at(told, 805)["sample"]["filename"] == "800.png"


def test_preview_shows_the_curve_and_then_the_sample_below_it(told: dict[str, Any]) -> None:
    before = {(width, height) for step, width, height, _ in told["previews"] if step < 600}
    after = {(width, height) for step, width, height, _ in told["previews"] if step > 600}
    ((width, height),) = before
    assert after == {(width, height + width * 200 // 800)}


def test_page_that_draws_runs_itself_gets_no_previews(told: dict[str, Any]) -> None:
    assert max(step for step, *_ in told["previews"]) < 900


def test_cancelled_training_hears_of_it_at_once(told: dict[str, Any]) -> None:
    assert told["cancelled"] is True

"""The losses of a run as a picture needs them: by term, thinned, right after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accvideo_core.evaluate.curve import LossCurve


def curve(values: list[float]) -> LossCurve:
    made = LossCurve()
    for step, value in enumerate(values, 1):
        made.add(step, {"trajectory": value, "loss": 2 * value, "lr": 1.0})
    return made


def test_a_short_run_is_drawn_as_it_is() -> None:
    assert curve([3, 2, 1]).lines(10) == {"trajectory": [(1, 3), (2, 2), (3, 1)]}


def test_a_long_run_keeps_its_mean_and_its_last_step() -> None:
    values = [float(i % 7) for i in range(1000)]
    line = curve(values).lines(100)["trajectory"]
    assert len(line) == 100 and line[-1][0] == 1000
    assert sum(value for _, value in line) / 100 == pytest.approx(sum(values) / 1000)


def test_every_term_has_a_line_and_only_an_objective_without_terms_its_total() -> None:
    made = LossCurve()
    made.add(1, {"loss": 1.0, "generator": 2.0, "trajectory": 3.0, "discriminator": 4.0})
    assert list(made.lines(9)) == ["trajectory", "generator", "discriminator"]
    other = LossCurve()
    other.add(1, {"loss": 1.0, "seconds": 2.0})
    assert other.lines(9) == {"loss": [(1, 1.0)]}


def test_updates_done_again_take_the_place_of_the_lost_ones() -> None:
    made = curve([5, 4, 3, 2])
    made.add(3, {"trajectory": 9})
    assert made.lines(9) == {"trajectory": [(1, 5), (2, 4), (3, 9)]} and made.step == 3


def test_what_is_no_loss_changes_nothing() -> None:
    made = curve([5, 4])
    made.add(1, {"motion": 0.9})
    made.add(3, {"trajectory": float("nan")})
    assert made.lines(9) == {"trajectory": [(1, 5), (2, 4)]}


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    rows = [{"step": 1, "trajectory": 2.0}, {"step": 2, "trajectory": 1.0}]
    lines = "\n".join(json.dumps(row) for row in rows) + '\n{"step": 3, "traj'
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert LossCurve.of_run(tmp_path).lines(9) == {"trajectory": [(1, 2.0), (2, 1.0)]}
    assert LossCurve.of_run(tmp_path / "none").lines(9) == {}

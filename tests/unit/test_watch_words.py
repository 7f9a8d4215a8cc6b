"""Every warning of a look, planted: said once when it begins, and again when it is over."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from watched import RECIPE, Land, Watched, colourful, grey, recorded, still

from accvideo_core.distill.watch_window import window_figures
from accvideo_core.distill.watch_words import broken
from accvideo_core.files import append_lines
from accvideo_core.monitor import Progress
from accvideo_core.terminal import Terminal
from accvideo_core.trajectories.store import TrajectoryDataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryDataset:
    return recorded(tmp_path_factory.mktemp("data") / "clips", samples=2)


@pytest.fixture
def watched(dataset: TrajectoryDataset, tmp_path: Path) -> Watched:
    return Watched(dataset, tmp_path / "run")


def noised(folder: Path, steps: range, real: float, fake: float) -> None:
    """Rows of an adversarial run's metrics."""
    row = {"k": 0, "real_accuracy": real, "fake_accuracy": fake, "heads_grad_norm": 2.0}
    lines = [json.dumps({"step": step, **row}) + "\n" for step in steps]
    append_lines(folder / "metrics.jsonl", "".join(lines))


def test_a_student_that_stands_still_is_told_once_and_when_it_is_over(watched: Watched) -> None:
    assert watched.look(0, still) == ""  # what few steps of the teacher do is no fault of training
    assert watched.row["motion"] == pytest.approx(0, abs=1e-6)
    said = watched.look(100, still)
    assert said.startswith("motion is 0 % of the teacher's (0 % before training): clips look like ")
    assert "head_kind to spatial_temporal" in said
    assert watched.row["standing"] == ["motion"] and watched.row["notes"] == [said]
    assert watched.look(200, still) == "" and watched.row["standing"] == ["motion"]
    assert watched.look(300) == "motion is back at 100 % of the teacher's"
    assert watched.look(400) == "" and watched.row["standing"] == []
    assert "motion is 0 %" in watched.look(500, still)


def test_a_standing_warning_is_known_after_a_resume(
    watched: Watched, dataset: TrajectoryDataset
) -> None:
    watched.look(0)
    assert "slow motion" in watched.look(100, still)
    resumed = Watched(dataset, watched.watch.folder)
    assert resumed.look(100, still) == "" and not resumed.seen[:-1]  # that was looked at
    assert resumed.look(200, still) == ""
    assert "motion is back" in resumed.look(300)


@pytest.mark.parametrize(("land", "look"), [(colourful, "burnt"), (grey, "washed out")])
def test_colours_that_drift_are_told(watched: Watched, land: Land, look: str) -> None:
    watched.look(0)
    said = watched.look(100, land)
    share = f"{round(100 * watched.row['saturation'], 1):g}"
    assert said.startswith(f"saturation is {share} % of the teacher's (100 % before training): ")
    assert f"colours look {look}; train on while it comes closer, else lower adv_weight" in said
    assert watched.look(200).startswith("saturation is back at")


def test_a_discriminator_that_wins_is_told_and_one_that_loses(watched: Watched) -> None:
    folder = watched.watch.folder
    noised(folder, range(1, 101), real=0.5, fake=0.5)
    assert watched.look(100) == ""  # fresh heads guess
    assert watched.row["real_accuracy_k0"] == 0.5 and watched.row["heads_grad_norm"] == 2.0
    noised(folder, range(101, 201), real=0.96, fake=0.97)
    won = watched.look(200)
    assert won.startswith("the discriminator is right in over 95 % of recorded and of generated ")
    assert "latents at k = 0:" in won and "set r1_weight to 10, or lower head_lr" in won
    noised(folder, range(201, 301), real=0.94, fake=0.99)
    assert watched.look(300) == "the discriminator no longer wins at any key time"
    noised(folder, range(301, 401), real=0.55, fake=0.45)
    lost = watched.look(400)
    assert lost.startswith("the discriminator is right in 50 % of latents at k = 0, which is guess")
    assert lost.endswith("raise head_lr or head_updates")
    noised(folder, range(401, 501), real=0.7, fake=0.8)
    assert watched.look(500) == "the discriminator no longer guesses at any key time"


def test_accuracies_are_means_of_the_window_by_key_time() -> None:
    interval = [
        {"step": 1, "k": 1, "real_accuracy": 0.5, "fake_accuracy": 1.0, "heads_grad_norm": 1.0},
        {"step": 2, "k": 0, "real_accuracy": 0.25, "fake_accuracy": 0.5, "heads_grad_norm": 2.0},
        {"step": 3, "k": 1, "real_accuracy": 1.0, "fake_accuracy": 0.0, "heads_grad_norm": 3.0},
    ]
    assert window_figures(interval) == {
        "fake_accuracy_k0": 0.5,
        "fake_accuracy_k1": 0.5,
        "heads_grad_norm": 2.0,
        "real_accuracy_k0": 0.25,
        "real_accuracy_k1": 0.75,
    }
    sweep = {"real_accuracy": 0.6, "real_accuracy_k0": 0.5, "real_accuracy_k1": 0.7, "loss": 1.0}
    assert window_figures([sweep]) == {"real_accuracy_k0": 0.5, "real_accuracy_k1": 0.7}


def test_diversity_that_cannot_be_told_is_said_once(tmp_path: Path) -> None:
    watched = Watched(recorded(tmp_path / "single", samples=1), tmp_path / "run")
    assert "diversity is not told, because no two of the clips" in watched.look(0)
    assert watched.look(100) == "" and "diversity" not in watched.row


def test_the_cause_of_a_broken_loss_is_named() -> None:
    recipe = replace(RECIPE, head_lr=1e-3)
    assert broken(["loss", "generator"], recipe)[0] == "generator"
    assert "adv_weight below 0.1" in broken(["loss", "generator"], recipe)[1]
    name, remedy = broken(["loss", "generator", "discriminator", "heads_grad_norm"], recipe)
    assert name == "discriminator" and "head_lr below 0.001 or a larger r1_weight" in remedy
    name, remedy = broken(["student_grad_norm"], recipe)
    assert name == "student_grad_norm" and "learning rate below 5e-06 or a float32" in remedy
    assert broken(["loss", "trajectory", "trajectory_k1"], recipe)[0] == "trajectory"


def test_who_has_no_monitor_finds_notes_in_the_log(
    dataset: TrajectoryDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(dataset, tmp_path / "run")
    watched.look(0)
    watched.student.land = still
    with caplog.at_level(logging.INFO):
        watched.watch.look(100, watched.student)
        watched.look(200)
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in told] == ["WARNING", "INFO"]
    assert told[0][1].startswith("run run: motion is 0 %") and "motion is back" in told[1][1]


def test_the_terminal_says_notes_on_lines_of_their_own() -> None:
    log = io.StringIO()
    with Terminal(log) as terminal:
        terminal(Progress("look", 4, 4, notes=("motion is low", "and grey")))
        terminal(Progress("distill", 1, 2))
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("look ") and lines[1:3] == ["motion is low", "and grey"]

"""Runs that are watched: the same training, files, resume, the best student, early stop."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from watched import decode, recorded

from accvideo_core import cli
from accvideo_core.distill.metrics import read_metrics
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.run import student_of_run
from accvideo_core.distill.student import LoraSpec
from accvideo_core.distill.trainer import TrainResult, distill
from accvideo_core.errors import AccVideoError
from accvideo_core.export import load_student
from accvideo_core.models import VideoModel, loading
from accvideo_core.models.loading import Teacher
from accvideo_core.monitor import Cancelled, Progress
from accvideo_core.trajectories.store import TrajectoryDataset

RECIPE = Recipe(
    student_steps=2,
    adversarial=True,
    lora=LoraSpec(rank=4),
    train_steps=7,
    batch_size=2,
    lr=1e-2,
    head_lr=1e-2,
    ema=0.5,
    head_width=16,
    validate_every=3,
    validation_clips=3,
)
PLAIN = replace(RECIPE, adversarial=False, best_by="latent_mse", validation_clips=2)
WORSE = replace(PLAIN, lr=0.02, train_steps=20, validate_every=1, patience=2)
"""A learning rate that makes students worse after a few updates."""

Run = Callable[..., TrainResult]
Whole = dict[str, tuple[TrainResult, Path]]


@pytest.fixture(scope="module")
def teacher() -> VideoModel:
    return tiny.video_model()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryDataset:
    return recorded(tmp_path_factory.mktemp("data") / "clips", 3, 2, steps=4, kept=4)


@pytest.fixture(scope="module")
def whole(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    """Uninterrupted runs by name, and their folders."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        name: (distill(teacher, dataset, recipe, folder / name, decode=decode), folder / name)
        for name, recipe in (("plain", PLAIN), ("worse", WORSE))
    }


@pytest.fixture
def run(teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path) -> Run:
    def go(name: str = "run", recipe: Recipe = RECIPE, **more: Any) -> TrainResult:
        return distill(teacher, dataset, recipe, tmp_path / name, **{"decode": decode, **more})

    return go


def looks(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's looks, without how long they took."""
    rows: list[dict[str, Any]] = list(read_metrics(folder / "validation.jsonl"))
    assert len((folder / "validation.jsonl").read_text().splitlines()) == len(rows)
    return [{**row, "seconds": 0} for row in rows]


def assert_same(a: TrainResult, b: TrainResult) -> None:
    assert a.losses == b.losses and a.best_step == b.best_step
    assert a.student.info.steps_trained == b.student.info.steps_trained
    mine, other = a.student.state_dict(), b.student.state_dict()
    assert all(torch.equal(x, other[name]) for name, x in mine.items())


def test_looking_changes_no_bit_of_training(run: Run, tmp_path: Path) -> None:
    recipe = replace(RECIPE, train_steps=4, validate_every=2)
    assert_same(run("watched", recipe), run("blind", replace(recipe, validate_every=0)))
    last = Path("checkpoints") / "00000004.safetensors"
    assert (tmp_path / "watched" / last).read_bytes() == (tmp_path / "blind" / last).read_bytes()
    assert [row["step"] for row in looks(tmp_path / "watched")] == [0, 2, 4]
    assert not (tmp_path / "blind" / "validation.jsonl").exists()


def test_looks_are_at_the_start_the_end_and_between(run: Run, tmp_path: Path) -> None:
    seen: list[Progress] = []
    run(monitor=seen.append)
    rows = looks(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 3, 6, 7]
    assert rows[3]["latent_mse"] != rows[2]["latent_mse"]
    assert "real_accuracy_k1" in rows[1] and "student_grad_norm" in rows[1]
    names = {path.name for path in (tmp_path / "run" / "samples").iterdir()}
    assert names == {f"{step:08d}.{kind}" for step in (0, 3, 6, 7) for kind in ("mp4", "png")}
    steps = [(p.stage, p.step, p.total) for p in seen]
    look = [("look", step, 9) for step in range(1, 10)]
    assert steps[:10] == [*look, ("distill", 1, 7)]
    assert steps[11:21] == [*look, ("distill", 3, 7)]
    told = [p for p in seen if p.picture is not None]
    assert [p.picture.stem for p in told if p.picture] == [f"{s:08d}" for s in (0, 3, 6, 7)]
    assert [list(p.notes) for p in told] == [row["notes"] for row in rows]


def test_what_is_looked_at_is_the_averaged_student(run: Run, tmp_path: Path) -> None:
    slow = run("slow", replace(PLAIN, train_steps=1))
    fast = run("fast", replace(PLAIN, ema=None, train_steps=1))
    first, second = (looks(tmp_path / name)[1] for name in ("slow", "fast"))
    assert slow.losses == fast.losses and first["latent_mse"] != second["latent_mse"]


@pytest.mark.parametrize(
    "stop", [("look", 5, 0), ("look", 4, 3), ("distill", 5, 5)], ids=["first", "later", "between"]
)
def test_cancelled_in_or_between_looks_and_resumed_equals_uninterrupted(
    run: Run, whole: Whole, tmp_path: Path, stop: tuple[str, int, int]
) -> None:
    stage, at, updates = stop
    done = 0

    def cancel(progress: Progress) -> None:
        nonlocal done
        if progress.stage == "distill":
            done = progress.step
        # A look after update n comes before the monitor hears of update n.
        here = done + (progress.stage == "look" and updates > 0)
        if (progress.stage, progress.step, here) == (stage, at, updates):
            raise Cancelled

    with pytest.raises(Cancelled):
        run("parts", PLAIN, monitor=cancel)
    assert (tmp_path / "parts" / "checkpoints" / f"{updates:08d}.safetensors").exists()
    result, folder = whole["plain"]
    assert_same(run("parts", PLAIN), result)
    assert looks(tmp_path / "parts") == looks(folder)


def test_a_killed_run_does_not_look_twice(run: Run, whole: Whole, tmp_path: Path) -> None:
    """A copy of the folder after a look, before its checkpoint, is what a killed process leaves."""

    def copy(progress: Progress) -> None:
        if progress.picture is not None and progress.picture.stem == "00000003":
            shutil.copytree(tmp_path / "run", tmp_path / "killed")
            raise Cancelled

    with pytest.raises(Cancelled):
        run("run", replace(PLAIN, checkpoint_every=2), monitor=copy)
    stages: list[str] = []
    resumed = run("killed", PLAIN, monitor=lambda p: stages.append(p.stage))
    assert stages[:3] == ["look", "distill", "distill"]  # told of the picture there is, at update 3
    result, folder = whole["plain"]
    assert_same(resumed, result)
    assert looks(tmp_path / "killed") == looks(folder)


def test_the_best_student_is_kept_and_returned(
    run: Run, whole: Whole, teacher: VideoModel
) -> None:
    result, folder = whole["worse"]
    rows = looks(folder)
    best = min(rows[1:], key=lambda row: row["latent_mse"])["step"]
    assert result.best_step == best == result.student.info.steps_trained and best > 1
    assert len(result.losses) == best + 2 == rows[-1]["step"] < 20
    assert [row["best_step"] for row in rows[-3:]] == [best] * 3

    short = replace(WORSE, train_steps=best, best_by=None, patience=None, validate_every=0)
    until = run("short", short).student.state_dict()
    loaded = load_student(folder / "best.safetensors", teacher)
    taken = student_of_run(folder, teacher)
    for student in (result.student, loaded, taken):
        assert student.info == result.student.info
        for name, x in student.state_dict().items():
            assert torch.equal(x, until[name])


def test_early_stop_and_the_best_survive_a_resume(run: Run, whole: Whole, tmp_path: Path) -> None:
    result, folder = whole["worse"]
    assert result.best_step is not None
    seen: list[Progress] = []

    def cancel(progress: Progress) -> None:
        if (progress.stage, progress.step) == ("distill", result.best_step + 1):
            raise Cancelled

    with pytest.raises(Cancelled):
        run("parts", WORSE, monitor=cancel)
    assert_same(run("parts", WORSE, monitor=seen.append), result)
    assert looks(tmp_path / "parts") == looks(folder)
    stopped = [note for p in seen for note in p.notes if "training stopped" in note]
    assert len(stopped) == 1 and f"than update {result.best_step} (latent_mse" in stopped[0]

    seen.clear()
    assert_same(run("parts", replace(WORSE, train_steps=30), monitor=seen.append), result)
    assert [list(p.notes) for p in seen] == [stopped]
    patient = run("parts", replace(WORSE, patience=3))
    assert len(patient.losses) > len(result.losses)


def test_the_best_full_student_takes_the_place_of_the_last(run: Run, tmp_path: Path) -> None:
    full = replace(WORSE, lora=None, ema=None)
    result = run("full", full)
    assert result.best_step is not None and result.best_step < len(result.losses)
    short = replace(full, train_steps=result.best_step, best_by=None, patience=None)
    until = run("short", replace(short, validate_every=0)).student.state_dict()
    assert all(torch.equal(x, until[name]) for name, x in result.student.state_dict().items())
    assert result.student.info.steps_trained == result.best_step


def test_a_broken_student_stops_the_run_and_good_checkpoints_stay(run: Run, tmp_path: Path) -> None:
    recipe = replace(RECIPE, lr=1e30, adversarial=False, ema=None, validate_every=1)
    with pytest.raises(AccVideoError, match=r"after update 1; .*below 1e\+30.*no checkpoint yet"):
        run("nan", replace(recipe, checkpoint_every=1))
    assert [row["step"] for row in looks(tmp_path / "nan")] == [0]
    with pytest.raises(AccVideoError, match=r"^trajectory became .* at update 2 \(k = 0\); start"):
        run("loss", replace(recipe, validate_every=0))


def test_another_dataset_can_be_looked_at(
    run: Run, teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    other = recorded(tmp_path / "other", 1, 2, steps=2, kept=2, seed=5)
    seen: list[Progress] = []
    short = replace(RECIPE, train_steps=1, adversarial=False)
    run("other", short, validation=other, monitor=seen.append)
    assert any("diversity is not told" in note for p in seen for note in p.notes)
    run("own", short)
    first, second = (looks(tmp_path / name)[0] for name in ("other", "own"))
    assert first["clips"] != second["clips"] and first["latent_mse"] != second["latent_mse"]
    with pytest.raises(AccVideoError, match="'other' was given to look at, but recipe.validate_ev"):
        run("x", replace(RECIPE, validate_every=0), validation=other)
    assert not (tmp_path / "x").exists()


class SmallTeacher(Teacher):
    """A teacher of width 32 with a VAE that maps channels to colours."""

    @property
    def vae(self) -> Any:
        return type("SmallVAE", (), {"decode": staticmethod(decode)})


def test_the_terminal_watches(
    teacher: VideoModel,
    dataset: TrajectoryDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = recorded(tmp_path / "other", 1, 2, steps=2, kept=2, seed=5)
    small = SmallTeacher(teacher, tmp_path, vae_path=tmp_path)
    monkeypatch.setattr(loading, "load_teacher", lambda *_args, **_options: small)
    changes = ["student_steps=2", "lora.rank=2", "batch_size=2", "train_steps=4"]
    changes += ["validate_every=2", "best_by=motion"]
    words = ["distill", dataset.folder, tmp_path / "run", "--validation", other.folder]
    words += [part for change in changes for part in ("--set", change)]
    assert cli.main([str(word) for word in words]) == 0
    said = capsys.readouterr()
    assert "diversity is not told" in said.err and "look  [" in said.err
    rows = looks(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 2, 4]
    best = rows[-1]["best_step"]
    assert f"student after 4 updates, the best by motion after {best} of them, is in" in said.out
    assert (tmp_path / "run" / "samples" / "00000004.mp4").is_file()

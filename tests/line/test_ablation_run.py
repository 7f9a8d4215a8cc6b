"""The ablation at reduced size: arms are trained once, and one that was cut goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from accvideo_core.ablation.accvideo import AccVideoStudy
from accvideo_core.ablation.accvideo_setting import PRESETS, Setting
from accvideo_core.ablation.arms import Question
from accvideo_core.ablation.lab import RESULT, STUDENT, Job, Lab
from accvideo_core.cli import main
from accvideo_core.distill.checkpoint import last_step
from accvideo_core.errors import AccVideoError
from accvideo_core.models.loading import Teacher, load_teacher
from accvideo_core.models.source import TeacherSource
from accvideo_core.models.tiny import embedded_teacher_path
from accvideo_core.monitor import Cancelled, Monitor, Progress, silent

TINY = Setting(
    trajectories=4,
    counts=(2,),
    updates=2,
    tune_updates=4,
    batch=2,
    prompts=2,
    real_clips=4,
    student_steps=2,
    other_steps=(1,),
)
STUDY = AccVideoStudy(TINY)
ARMS = ("teacher", "base", "shared")


@pytest.fixture(scope="module", autouse=True)
def unplanned() -> Iterator[None]:
    """Planning memory takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accvideo_core.distill.trainer.settle_memory", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    """The embedded one, whose official grid has 10 steps here instead of 50."""
    found = load_teacher(embedded_teacher_path(), device="cpu", dtype=torch.float32)
    return replace(found, model=replace(found.model, family=replace(found.model.family, steps=10)))


@pytest.fixture(scope="module")
def finished(
    teacher: Teacher, unplanned: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder where one seed of three arms is done."""
    folder = tmp_path_factory.mktemp("ablation") / "done"
    run(Lab(teacher, STUDY, folder))
    return folder


def run(lab: Lab, monitor: Monitor = silent) -> None:
    lab.run([lab.arms()[name] for name in ARMS], [0], monitor)


def result(folder: Path, arm: str) -> dict[str, Any]:
    return json.loads((folder / "arms" / arm / "seed0" / RESULT).read_text())


def test_results_hold_every_figure(finished: Path):
    figures = result(finished, "shared")["figures"]
    assert figures["updates"] == 4
    assert 0 <= figures["all"] <= 1 and figures["fd_real"] > 0 and figures["latent_mse"] > 0
    assert figures["seconds_per_clip"] > 0 and figures["train_seconds"] > 0
    full = json.loads((finished / "arms" / "teacher" / RESULT).read_text())
    assert full["figures"]["latent_mse"] is None and full["errors"]["fd_real"] > 0
    assert not list(finished.glob("arms/*/seed0/run/checkpoints")), "what is done needs none"


def test_what_is_done_is_not_done_again(finished: Path, teacher: Teacher):
    seen: list[Progress] = []
    run(Lab(teacher, STUDY, finished), seen.append)
    assert seen == []


def test_a_cut_arm_goes_on_and_others_are_left_alone(
    finished: Path, teacher: Teacher, tmp_path: Path
):
    folder = tmp_path / "cut"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "arms" / "shared")
    before = (folder / "arms" / "base" / "seed0" / RESULT).stat().st_mtime_ns

    def cut(progress: Progress) -> None:
        if progress.stage == "distill" and progress.step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(Lab(teacher, STUDY, folder), cut)
    assert last_step(folder / "arms" / "shared" / "seed0" / "run") == 3
    seen: list[Progress] = []
    run(Lab(teacher, STUDY, folder), seen.append)
    assert [p.step for p in seen if p.stage == "distill"] == [4]
    assert [p.notes for p in seen if p.stage == "ablation"] == [
        ("[3/3] seed 0, + adversarial, one shared head",)
    ]
    assert not {"compare base", "compare teacher"} & {p.stage for p in seen}
    assert all(p.step == p.total for p in seen if p.stage == "record"), "all of it was there"
    assert (folder / "arms" / "base" / "seed0" / RESULT).stat().st_mtime_ns == before
    students = [one / "arms" / "shared" / "seed0" / STUDENT for one in (folder, finished)]
    assert students[0].read_bytes() == students[1].read_bytes(), "as if it had not been cut"
    machine = ("seconds_per_clip", "train_seconds")
    for name, value in result(finished, "shared")["figures"].items():
        assert name in machine or result(folder, "shared")["figures"][name] == value, name


def test_another_setting_teacher_or_recipe_is_refused(
    finished: Path, teacher: Teacher, tmp_path: Path
):
    with pytest.raises(AccVideoError, match=r"holds results with setting.updates 2 and not 9"):
        run(Lab(teacher, AccVideoStudy(replace(TINY, updates=9)), finished))
    folder = tmp_path / "other"
    shutil.copytree(finished / "arms" / "base", folder / "arms" / "base")
    path = folder / "arms" / "base" / "seed0" / RESULT
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "recipe": {**told["recipe"], "lr": 1.0}}))
    lab = Lab(teacher, STUDY, folder)
    with pytest.raises(AccVideoError, match="is the result of another recipe"):
        lab.done(Job(lab.arms()["base"], 0))


def two_rows(_study: AccVideoStudy) -> dict[str, Question]:
    pair = ("shared", "trajectory")
    return {"lambda": Question("lambda", "The weight", "It was changed.", pair, (pair,))}


def test_command_does_what_is_missing_and_writes_the_page(
    finished: Path,
    teacher: Teacher,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setitem(PRESETS, "quick", TINY)
    monkeypatch.setattr(TeacherSource, "load", lambda _source: teacher)
    page = finished.parent / "docs" / "experiments.md"
    words = ["ablation", str(finished), "--only", "lambda", "--seeds", "0", "--device", "cpu"]
    monkeypatch.setattr(AccVideoStudy, "questions", two_rows)
    assert main([*words, "--page", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert "| + trajectory guidance |" in text and "| + adversarial, one shared head |" in text
    assert "accvideo ablation OUT --preset quick --only lambda --seeds 0 --page" in text
    assert "## Figure 5: what the heads see" in text
    for name in ("lambda", "features"):
        assert (page.parent / "images" / f"experiments_{name}.png").is_file()
    assert main([*words[:2], "--only", "nothing"]) == 2
    assert "there is no question 'nothing'" in capsys.readouterr().err
    assert main([*words[:2], "--seeds", "1", "1"]) == 2
    assert "--seeds [1, 1] must be different" in capsys.readouterr().err

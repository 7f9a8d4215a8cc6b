"""SF-V's study: its arms differ by what they are called, and its remarks by what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accvideo_core.ablation.arms import Arm, needed
from accvideo_core.ablation.lab import RESULT, SHOWN, Job, Lab
from accvideo_core.ablation.page import write_page
from accvideo_core.ablation.sf_v import SfvStudy
from accvideo_core.ablation.sf_v_setting import PRESETS, SfvSetting
from accvideo_core.distill.recipes import Recipe
from accvideo_core.embedded import EMBEDDED, TINY_SVD, embedded_at, teacher_path
from accvideo_core.errors import AccVideoError
from accvideo_core.evaluate import image_world, world
from accvideo_core.evaluate.image_clips import clips, write_videos
from accvideo_core.files import write_json, write_safetensors
from accvideo_core.models import FAMILIES
from accvideo_core.models.tiny import embedded_teacher_path
from accvideo_core.video import read_video

FAMILY = FAMILIES["svd"]
MODEL: Any = SimpleNamespace(family=FAMILY, num_blocks=4, fingerprint="abc")
STUDY = SfvStudy(PRESETS["full"])
ARMS = STUDY.arms(MODEL)


def recipe(arm: Arm) -> Recipe:
    return STUDY.recipe(arm, 3, STUDY.times(arm, FAMILY))


def test_arms_differ_by_what_they_are_called_and_by_nothing_else() -> None:
    usual = recipe(ARMS["sf_v"])
    assert usual.method == "sf_v" and usual.key_times == (1.0, 0.0)

    def difference(name: str) -> set[str]:
        other = recipe(ARMS[name])
        names = {field.name for field in fields(Recipe)} - {"name"}
        return {x for x in names if getattr(other, x) != getattr(usual, x)}

    assert difference("spatial") == difference("temporal") == {"head_kind"}
    means = [recipe(ARMS[f"p_mean_{x}"]).sf_v for x in (-2, 0, 1)]
    assert [spec and spec.p_mean for spec in means] == [-2, 0, 1]
    assert all(difference(f"p_mean_{x}") == {"sf_v"} for x in (-2, 0, 1))
    for name in ("ladd", "ufogen", "consistency"):
        made = recipe(ARMS[name])
        assert made.method == name and made.student_steps == 4
        assert (made.train_steps, made.batch_size) == (usual.train_steps, usual.batch_size)


def test_questions_have_their_arms_and_students_are_trained_once() -> None:
    questions = STUDY.questions()
    for question in questions.values():
        assert set(question.rows) <= ARMS.keys()
        assert {name for pair in question.pairs for name in pair} <= {*question.rows, "teacher"}
    wanted = [arm.name for arm in needed([questions["methods"]], ARMS)]
    assert set(wanted) >= {"sf_v", "sf_v_8", "ladd", "ladd_1", "ufogen_2", "consistency"}
    for name in wanted:
        before = ARMS[name].needs
        assert before is None or wanted.index(before) < wanted.index(name)
    everything = needed(list(questions.values()), ARMS)
    assert {arm.name for arm in everything} == ARMS.keys(), "no arm is trained for nothing"


def test_an_impossible_setting_is_refused() -> None:
    with pytest.raises(AccVideoError, match=r"setting.updates is 0; it must be at least 1"):
        SfvSetting(updates=0)


def lab(folder: Path, figures: dict[str, Sequence[float]], motion: dict[str, float]) -> Lab:
    """A lab of results that are written by hand."""
    one = Lab(SimpleNamespace(model=MODEL), SfvStudy(PRESETS["quick"]), folder)  # type: ignore[arg-type]
    for name, each in figures.items():
        arm = one.arms()[name]
        for seed, fd_real in enumerate(each):
            job = Job(arm, seed if arm.seeded else None)
            alike = {"all": 0.99, "latent_mse": 0.1, "first_frame": 28.0}
            seconds = 0.1 if arm.seeded else 2.5
            found = {
                **alike,
                "fd_real": fd_real,
                "motion_energy": motion.get(name, 0.02) + 1e-4 * seed,
                "seconds_per_clip": seconds,
            }
            write_json(job.folder(folder) / RESULT, {"figures": found, "errors": {}})
            shown = torch.full((6, 8, 8, 8, 3), 100, dtype=torch.uint8)
            write_safetensors(job.folder(folder) / SHOWN, {"frames": shown})
    return one


@pytest.mark.parametrize(("one_step", "verdict"), [(2.4, "**holds**"), (3.0, "**does not hold**")])
def test_page_sets_one_step_beside_the_teacher(
    tmp_path: Path, one_step: float, verdict: str
) -> None:
    figures = {"teacher": [2.0], "teacher_4": [4.0], "teacher_1": [9.0]}
    seeds = [one_step - 0.1, one_step, one_step + 0.1]
    made = lab(tmp_path, {**figures, "sf_v": seeds}, {})
    question = made.study.questions()["one_step"]
    page = write_page(made, [question], (0, 1, 2), tmp_path / "page.md", "make it")
    text = page.read_text()
    margin = 4.303 * 0.05 / math.sqrt(3)
    ratio = one_step / 2
    assert f"One step has {ratio:.3g} [{ratio - margin:.3g}, {ratio + margin:.3g}] times" in text
    assert f"at most 1.25 times {verdict}" in text
    assert "is 25 times as fast as the teacher's" in text
    assert "| first frame |" in text and "| diversity |" not in text


@pytest.mark.parametrize(("still", "word"), [(0.005, "**shows**"), (0.02, "**does not show**")])
def test_page_tells_whether_spatial_heads_stand_still(
    tmp_path: Path, still: float, word: str
) -> None:
    names = ("sf_v", "spatial", "temporal")
    figures = {"teacher": [2.0], **{name: [2.0, 2.1, 1.9] for name in names}}
    made = lab(tmp_path, figures, {"spatial": still})
    question = made.study.questions()["heads"]
    text = write_page(made, [question], (0, 1, 2), tmp_path / "a.md", "make it").read_text()
    assert f"heads alone stand still {word}" in text


def test_page_draws_the_sweep(tmp_path: Path) -> None:
    means = ("p_mean_-2", "sf_v", "p_mean_0", "p_mean_1")
    made = lab(tmp_path, {"teacher": [2.0], **{name: [2.0, 2.1] for name in means}}, {})
    question = made.study.questions()["p_mean"]
    text = write_page(made, [question], (0, 1), tmp_path / "a.md", "make it").read_text()
    assert "(images/a_p_mean_curve.png)" in text
    assert (tmp_path / "images" / "a_p_mean_curve.png").stat().st_size > 5000


def test_clips_follow_from_their_numbers_and_are_written_once(tmp_path: Path) -> None:
    specs, frames = clips([2, 0], "x")
    assert torch.equal(frames[1], clips([0], "x")[1][0])
    assert not torch.equal(frames[1], clips([0], "y")[1][0])
    paths = write_videos(tmp_path, 1, "x") + write_videos(tmp_path, 3, "x")[1:]
    read, fps = read_video(paths[2])
    assert fps == image_world.FPS and (read - frames[0]).abs().max() <= 0.5 / 255 + 1e-6
    assert paths[2].with_suffix(".txt").read_text() == world.prompt(specs[0]) + "\n"
    stamp = paths[0].stat().st_mtime_ns
    write_videos(tmp_path, 3, "x")
    assert paths[0].stat().st_mtime_ns == stamp


def test_embedded_teachers_are_named_unless_a_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert teacher_path("tiny-svd") == TINY_SVD.path and teacher_path("a/b") == Path("a/b")
    assert embedded_at(embedded_teacher_path()) == EMBEDDED["tiny"]
    assert embedded_at(tmp_path) is None
    assert (world.FRAMES, world.SIZE) == (EMBEDDED["tiny"].frames, EMBEDDED["tiny"].size)
    assert (image_world.FRAMES, image_world.SIZE) == (TINY_SVD.frames, TINY_SVD.size)
    (tmp_path / "tiny-svd").mkdir()
    assert teacher_path("tiny-svd") == Path("tiny-svd")

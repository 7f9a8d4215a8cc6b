"""The ablation's statistics, its arms, and a page that says what the numbers say, both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accvideo_core.ablation.accvideo import AccVideoStudy, all_arms
from accvideo_core.ablation.accvideo_setting import PRESETS, Setting, key_steps
from accvideo_core.ablation.arms import chosen, needed
from accvideo_core.ablation.features import features_words
from accvideo_core.ablation.lab import RESULT, SHOWN, Job, Lab
from accvideo_core.ablation.page import write_page
from accvideo_core.ablation.spread import Spread, paired
from accvideo_core.ablation.words import best_words, claim_words, pair_words
from accvideo_core.distill.recipes import Recipe
from accvideo_core.errors import AccVideoError
from accvideo_core.files import write_json, write_safetensors
from accvideo_core.flow import time_grid
from accvideo_core.models import FAMILIES

GRID = time_grid(50, 7.0)
FULL = PRESETS["full"]
STUDY = AccVideoStudy(FULL)
ARMS = all_arms(FULL, 6, 50)
QUESTIONS = STUDY.questions()
SEEDS = (0, 1, 2)


def test_interval_of_three_seeds_by_hand():
    """Mean 2, deviation 1, t = 4.303 at 2 degrees of freedom: 2 +- 4.303 / sqrt(3)."""
    spread = Spread.of([1.0, 2.0, 3.0])
    assert (spread.mean, spread.margin) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert spread.text() == "2 [-0.484, 4.48]" and not spread.told
    assert Spread.of([0.5, 0.25]).margin == pytest.approx(12.706 * stdev([0.5, 0.25]) / 2**0.5)
    assert Spread.of([1.0] * 20).margin == 0 and Spread.of([7.0]).margin == math.inf
    assert Spread.of([0.995, 0.995, 0.995]).text(share=True) == "99.5 % [99.5, 99.5]"


def test_pairs_go_seed_by_seed():
    """Three far apart seeds whose difference is always nearly 1 are told apart when paired."""
    a, b = [11.0, 51.1, 90.9], [10.0, 50.0, 90.0]
    found = paired(a, b)
    differences = [1.0, 1.1, 0.9]
    assert found.mean == pytest.approx(1.0)
    assert found.margin == pytest.approx(4.303 * stdev(differences) / math.sqrt(3))
    assert found.told and Spread.of(a).overlaps(Spread.of(b))
    assert paired(a, [10.0]).mean == pytest.approx(Spread.of(a).mean - 10.0)
    assert not paired([1.0], [0.0]).told, "one seed tells nothing apart"


def test_key_steps_are_the_papers_or_the_nearest():
    assert key_steps(50, 5) == (0, 10, 20, 30, 40, 50) and key_steps(50, 3) == (0, 17, 33, 50)
    assert FULL.kept(50) == (0, 6, 10, 12, 17, 19, 20, 25, 30, 31, 33, 38, 40, 44, 50)
    assert FULL.recorded == 2048 and FULL.samples == 8
    with pytest.raises(AccVideoError, match=r"setting.batch is 0; it must be at least 1"):
        Setting(batch=0)
    with pytest.raises(AccVideoError, match="are not 2 of every prompt"):
        Setting(trajectories=5, counts=(3,))


def difference(a: Recipe, b: Recipe) -> dict[str, Any]:
    names = [one.name for one in fields(Recipe) if one.name != "name"]
    return {name: getattr(a, name) for name in names if getattr(a, name) != getattr(b, name)}


def test_arms_differ_by_what_they_are_called_and_by_nothing_else():
    family = FAMILIES["hunyuan_video"]
    times = {name: STUDY.times(arm, family) for name, arm in ARMS.items()}
    recipes = {n: STUDY.recipe(arm, 3, times[n]) for n, arm in ARMS.items() if arm.seeded}
    usual, base = recipes["timestep"], recipes["base"]
    against = {name: difference(recipes[name], usual) for name in recipes if ARMS[name].start}
    assert against == {
        "timestep": {},
        "trajectory": {"adversarial": False},
        "shared": {"heads": "shared", "feature_blocks": (5,)},
        "last_block": {"feature_blocks": (5,)},
        "hinge": {"gan_loss": "hinge"},
        "queued": {"rollout": "queued"},
        "no_r1": {"r1_weight": 0.0},
        "lambda_0.01": {"adv_weight": 0.01},
        "lambda_1": {"adv_weight": 1.0},
    }
    assert usual.seed != base.seed and difference(recipes["full_0.0001"], base).keys() == {
        "lora", "lr"
    }  # fmt: skip
    assert difference(recipes["trajectories_64"], base) == {"trajectories": 64}
    assert recipes["steps_8"].key_times == tuple(GRID[i] for i in key_steps(50, 8))
    assert times["teacher_5"] == pytest.approx(time_grid(5, 7.0))


def test_every_question_has_its_arms_and_starts_come_first():
    for question in QUESTIONS.values():
        assert set(question.rows) <= ARMS.keys()
        assert {name for pair in question.pairs for name in pair} <= set(question.rows)
        assert question.titles.keys() <= set(question.rows)
    names = [arm.name for arm in needed([QUESTIONS["loss"]], ARMS)]
    assert names == ["teacher", "base", "timestep", "hinge"]
    everything = needed(list(QUESTIONS.values()), ARMS)
    assert {arm.name for arm in everything} == ARMS.keys(), "no arm is trained for nothing"
    assert [one.name for one in chosen(["steps", "figure7"], QUESTIONS)] == ["figure7", "steps"]
    with pytest.raises(AccVideoError, match="there is no question 'x'; choose of figure7, "):
        chosen(["x"], QUESTIONS)


def values(**fd_real: Sequence[float]) -> dict[str, dict[str, Sequence[float]]]:
    """Arms whose other figures are alike."""
    same = {"latent_mse": [0.1] * 3, "all": [1.0] * 3, "diversity": [0.8] * 3}
    return {name: {"fd_real": x, **same} for name, x in fd_real.items()}


@pytest.mark.parametrize(
    ("shared", "word", "claim", "lap"),
    [
        ([1.0, 1.1, 0.9], "**better**", "**holds**", "do not overlap"),
        ([5.0, 5.1, 4.9], "**worse**", "**does not hold**", "do not overlap"),
        ([2.1, 1.9, 2.3], "not told apart", "**does not show**", "overlap"),
    ],
)
def test_sentences_follow_the_figures(
    shared: Sequence[float], word: str, claim: str, lap: str
):
    a, b = ARMS["shared"], ARMS["trajectory"]
    given = values(shared=shared, trajectory=[2.0, 2.1, 1.9])
    text = pair_words(a, b, given, {"diversity": [0.9]})
    assert f"Frechet distance to real clips {word}" in text
    assert f"intervals of the Frechet distance {lap}." in text
    assert "prompt accuracy the same in every seed" in text and "diversity" not in text
    assert claim in claim_words(a, b, given)


def test_teacher_likeness_is_spoken_of_where_it_moves():
    given = values(shared=[2.0] * 3, trajectory=[2.0] * 3)
    given["shared"]["diversity"] = [0.5, 0.51, 0.49]
    text = pair_words(ARMS["shared"], ARMS["trajectory"], given, {"diversity": [0.9]})
    assert "diversity farther from the teacher's (0.5 and 0.8, teacher 0.9)" in text
    text = pair_words(ARMS["trajectory"], ARMS["shared"], given, {"diversity": [0.9]})
    assert "diversity nearer to the teacher's" in text


def test_one_seed_claims_nothing():
    given = {name: {key: x[:1] for key, x in one.items()}
             for name, one in values(shared=[1.0], trajectory=[9.0]).items()}  # fmt: skip
    a, b = ARMS["shared"], ARMS["trajectory"]
    assert "cannot be judged by one seed" in claim_words(a, b, given)
    text = pair_words(a, b, given, {"diversity": [0.9]})
    assert "better" not in text and "(one seed)" in text and "tells no interval" in text


def test_the_best_row_names_those_as_good():
    question = QUESTIONS["lambda"]
    rows = {name: [4.0, 4.1, 3.9] for name in question.rows}
    rows |= {"timestep": [1.0, 1.1, 0.9], "lambda_0.01": [1.1, 1.0, 1.0]}
    text = best_words(question, ARMS, values(**rows))
    assert "has *+ adversarial, a head per key time* (1)" in text
    assert text.endswith("not told apart from it: *lambda = 0.01*.")


@pytest.mark.parametrize(
    ("contrasts", "verdict"),
    [((0.5, 0.8), "**holds**"), ((0.8, 0.5), "**does not hold**"), (None, "**holds in part**")],
)
def test_feature_words_follow_the_contrasts(
    contrasts: tuple[float, float] | None, verdict: str
):
    """Block 0 is the finest throughout and does not count; block 1 is tapped at t = 0."""
    maps = []
    for t in (0.9, 0.5, 0.0):
        middle, last = contrasts or ((0.5, 0.8) if t == 0.9 else (0.8, 0.5))
        found = zip((0, 1, 2), (1.0, middle, last), strict=True)
        maps += [{"t": t, "block": block, "contrast": c, "tapped": block == (1 if t == 0 else 2)}
                 for block, c in found]  # fmt: skip
    text = features_words(maps)
    assert f"of 2 key times: that {verdict}." in text
    finer = "less" if contrasts == (0.5, 0.8) else "more"
    assert f"block 1 holds {finer} fine detail than the last block" in text


def lab(folder: Path) -> Lab:
    """A lab of results that are written by hand."""
    model = SimpleNamespace(family=FAMILIES["hunyuan_video"], num_blocks=6, fingerprint="abc")
    return Lab(SimpleNamespace(model=model), AccVideoStudy.preset("quick"), folder)  # type: ignore[arg-type]


def put(lab: Lab, figures: Mapping[str, Sequence[float]]) -> None:
    """Results of arms: a Frechet distance for each seed, everything else alike."""
    for name, each in figures.items():
        arm = lab.arms()[name]
        for seed, fd_real in enumerate(each):
            job = Job(arm, seed if arm.seeded else None)
            alike = {"all": 0.99, "latent_mse": 0.1, "fd_teacher": 0.2, "psnr": 30.0}
            found = {**alike, "fd_real": fd_real, "motion_energy": 0.01, "diversity": None}
            errors = {} if arm.seeded else {"fd_real": 0.1}
            write_json(job.folder(lab.folder) / RESULT, {"figures": found, "errors": errors})
            shown = torch.full((6, 5, 8, 8, 3), 100, dtype=torch.uint8)
            write_safetensors(job.folder(lab.folder) / SHOWN, {"frames": shown})


@pytest.mark.parametrize("helps", [True, False])
def test_page_states_what_the_results_say(tmp_path: Path, helps: bool):
    one, better = lab(tmp_path), [3.0, 3.1, 2.9]
    put(one, {"teacher": [2.0], "teacher_5": [5.0], "trajectory": [4.0, 4.1, 3.9],
              "shared": better if helps else [4.2, 3.8, 4.0],
              "timestep": [6.0, 6.1, 5.9]})  # fmt: skip
    questions = [one.study.questions()[name] for name in ("figure7", "rank")]
    text = write_page(one, questions, SEEDS, tmp_path / "page" / "all.md", "make it").read_text()
    margin = 4.303 * 0.1 / math.sqrt(3)
    cell = f"4 [{4 - margin:.3g}, {4 + margin:.3g}]"
    assert f"| + trajectory guidance | 99 % [99, 99] | {cell} |" in text
    assert "| teacher, 5 steps | 99 % | 5 [4.8, 5.2] |" in text
    claims = [line for line in text.splitlines() if line.startswith("- That ")]
    assert ["**holds**" in line for line in claims] == [True, helps, False]
    assert "**does not hold**" in claims[2] and ("**does not show**" in claims[1]) != helps
    assert "lies outside the students' interval" in text
    assert text.endswith("## LoRA rank, or all weights\n\nNothing of it has been run yet.\n")
    assert (tmp_path / "page" / "images" / "all_figure7.png").is_file()
    assert "    make it" in text and "fingerprint `abc`" in text


def test_page_takes_the_seeds_that_all_arms_have(tmp_path: Path):
    one = lab(tmp_path)
    put(one, {"teacher": [2.0], "timestep": [3.0, 3.1, 2.9], "hinge": [3.0]})
    question = one.study.questions()["loss"]
    text = write_page(one, [question], one.seeds_done(), tmp_path / "a.md", "make it").read_text()
    assert "One seed alone is done: no intervals yet." in text and "(one seed)" in text
    assert "| logistic loss | 99 % | 3 |" in text and "| hinge loss | 99 % | 3 |" in text

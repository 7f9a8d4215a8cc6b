"""Recipes listed, explained, saved as JSON and read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from accvideo_core.cli import main
from accvideo_core.distill.recipe_file import changed_recipe, explained, find_recipe
from accvideo_core.distill.recipes import PRESETS, Recipe, preset
from accvideo_core.distill.specs import ConsistencySpec
from accvideo_core.distill.student import LoraSpec
from accvideo_core.errors import AccVideoError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_preset_is_listed_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert "5 steps, all weights, trajectory + adversarial, 1200 updates of 32" in lines[0]


def test_what_is_printed_is_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--set", "lora.rank=16", "--set", "lr=1e-4", "--set", "ema=0.9"]
    assert main(["recipe", "adversarial", *changes]) == 0
    Path("printed.json").write_text(capsys.readouterr().out)
    assert main(["recipe", "adversarial", *changes, "--out", "folder/saved.json"]) == 0
    assert capsys.readouterr().out == ""
    wanted = replace(preset("adversarial"), lora=LoraSpec(rank=16), lr=1e-4, ema=0.9)
    assert find_recipe("printed.json") == find_recipe("folder/saved.json") == wanted
    assert [path.name for path in Path("folder").iterdir()] == ["saved.json"]


def test_a_saved_recipe_can_be_changed_and_saved_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "paper", "--set", "seed=1", "--out", "a.json"]) == 0
    assert main(["recipe", "a.json", "--set", "warmup=7", "--out", "b.json"]) == 0
    assert find_recipe("b.json") == replace(preset("paper"), seed=1, warmup=7)


def test_a_file_need_not_name_every_field() -> None:
    Path("short.json").write_text('{"lr": 1e-4, "lora": {"rank": 8}}')
    assert find_recipe("short.json") == replace(Recipe(), lr=1e-4, lora=LoraSpec(rank=8))


def test_a_runs_recipe_is_found_by_its_folder() -> None:
    Path("run").mkdir()
    recipe = replace(preset("trajectory"), seed=5)
    Path("run/config.json").write_text(json.dumps({"format": 1, "recipe": recipe.as_dict()}))
    assert find_recipe("run") == recipe


def test_explaining_shows_value_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "adversarial", "--set", "lora.rank=3", "--explain"]) == 0
    text = capsys.readouterr().out
    assert "\nlr: 5e-05  (default 5e-06)\n    Learning rate of the student" in text
    assert "\nadv_weight: 0.1\n    lambda of the adversarial term.\n" in text
    assert "\nlora.rank: 3  (default 32)\n    Inner width of every adapter.\n" in text
    assert "\nlora: null  (default {" in explained(preset("paper"))


def test_adapters_can_be_given_to_a_recipe_without() -> None:
    assert preset("accvideo").lora is None
    changed = changed_recipe(preset("accvideo"), ["lora.rank=16"])
    assert changed == replace(preset("accvideo"), lora=LoraSpec(rank=16))


def test_a_methods_own_fields_are_explained_and_changed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["recipe", "sf-v", "--set", "sf_v.p_mean=-2", "--explain"]) == 0
    text = capsys.readouterr().out
    assert "\nsf_v.p_mean: -2  (default -1.0)\n    P_mean of Eq. 7: mean of log sigma'" in text
    assert "\nladd: null\n    Train by LADD.\n" in text
    changed = changed_recipe(preset("trajectory"), ["consistency.skip=50"])
    assert changed == replace(preset("trajectory"), consistency=ConsistencySpec(skip=50))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no recipe file mine.json; make one with accvideo recipe NAME --out"),
        ('{"lr": 1e-4', r"recipe file mine.json is not JSON \(.*line 1 column.*correct it there"),
        ("\udcff", "recipe file mine.json is not JSON"),
        ("[1]", "recipe file mine.json holds no object; write it like"),
        ({"speed": 1}, "recipe file mine.json: recipe has no field 'speed'; its fields are name,"),
        ({"lr": -1}, "recipe file mine.json: recipe.lr is -1; it must be positive"),
        ({"lr": "fast"}, "recipe file mine.json: recipe.lr is 'fast'; it must be a number"),
        ({"lora": {"size": 4}}, "recipe.lora has no field 'size'; its fields are rank, alpha"),
        ({"lora": {"rank": 0}}, "LoRA rank is 0"),
    ],
)
@pytest.mark.parametrize("command", [["recipe"], ["distill", "clips", "run", "--recipe"]])
def test_what_is_wrong_with_a_file_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], command: list[str], content: Any, message: str
) -> None:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        Path("mine.json").write_bytes(text.encode(errors="surrogateescape"))
    assert main([*command, "mine.json"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    with pytest.raises(AccVideoError, match=message):
        raise AccVideoError(line)
    assert not Path("run").exists()


def test_a_wrong_name_is_answered_with_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["recipe", "fast"],
        ["tune", "clips", "run", "--student", "s", "--recipe", "fast"],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "there is no recipe 'fast'; choose one of paper, accvideo, trajectory" in error
    for words in (["--explain"], ["--set", "lr=1"], ["--out", "x.json"]):
        assert main(["recipe", *words]) == 2
        assert "need a recipe; name one, such as paper" in capsys.readouterr().err

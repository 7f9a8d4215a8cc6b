"""VBench: files named as it looks for them, its package asked as it is called, its totals."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from accvideo_core.cli import main
from accvideo_core.errors import AccVideoError
from accvideo_core.evaluate.vbench_scores import (
    DIMENSIONS,
    Scores,
    check_videos,
    collect,
    prompts_of,
    video_names,
)

# Total, quality, semantic; then the dimensions in the order of VBench's tables. From AccVideo's
# Table 2 and README, which are rounded to 0.01.
PUBLISHED = {
    "AccVideo-HunyuanT2V 544p": (
        (83.26, 84.58, 77.96),
        (94.46, 97.45, 99.18, 98.79, 75.00, 62.08, 65.64),
        (92.99, 67.33, 95.60, 94.11, 75.70, 54.72, 19.87, 23.71, 27.21),
    ),
    "VideoCrafter2": (
        (80.44, 82.20, 73.42),
        (96.85, 98.22, 98.41, 97.73, 42.50, 63.13, 67.22),
        (92.55, 40.66, 95.00, 92.92, 35.86, 55.29, 25.13, 25.84, 28.23),
    ),
    "AccVideo-WanX-T2V 480p": (
        (85.95, 86.62, 83.25),
        (95.02, 97.75, 99.54, 97.95, 93.33, 64.21, 68.42),
        (98.38, 86.58, 97.40, 92.04, 75.68, 59.82, 23.88, 24.62, 27.34),
    ),
}

INFO = [
    {"prompt_en": "a dog", "dimension": ["subject_consistency", "dynamic_degree"]},
    {"prompt_en": "a cat", "dimension": ["color"]},
    {"prompt_en": "a dog", "dimension": ["appearance_style"]},
    {"prompt_en": "a stone", "dimension": ["temporal_flickering"]},
]


@pytest.fixture
def info(tmp_path: Path) -> Path:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(INFO))
    return path


def videos(folder: Path, *prompts: str, count: int = 5) -> Path:
    folder.mkdir(exist_ok=True)
    for prompt in prompts:
        for number in range(count):
            (folder / f"{prompt}-{number}.mp4").touch()
    return folder


@pytest.mark.parametrize("model", PUBLISHED)
def test_totals_are_those_that_were_published(model: str) -> None:
    totals, quality, semantic = PUBLISHED[model]
    percent = dict(zip(DIMENSIONS, quality + semantic, strict=True))
    found = Scores({name: score / 100 for name, score in percent.items()})
    for mine, theirs in zip((found.total, found.quality, found.semantic), totals, strict=True):
        assert mine is not None and 100 * mine == pytest.approx(theirs, abs=0.0101)
    assert f"total                     {100 * (found.total or 0):.2f}" in found.table()


def test_no_total_is_made_of_some_dimensions() -> None:
    quality = {name: 0.9 for name, x in DIMENSIONS.items() if not x.semantic}
    some = Scores({**quality, "color": 0.9})
    assert some.quality is not None and some.semantic is None and some.total is None
    assert some.table().startswith("total                         -\n")


def test_videos_of_other_prompts_have_the_names_of_vbenchs_own(tmp_path: Path) -> None:
    prompts, names = tmp_path / "augmented.txt", tmp_path / "all_dimension.txt"
    prompts.write_text("A dog, cinematic.\nA cat. Realistic\nA second dog\n")
    names.write_text("a dog\na cat\na dog\n")
    found = video_names(prompts, names)
    assert found == {"A dog, cinematic.": "a dog", "A cat. Realistic": "a cat"}
    names.write_text("a dog\n")
    with pytest.raises(AccVideoError, match="has 3 prompts and .* 1 names; give files that belong"):
        video_names(prompts, names)
    names.write_text("a dog\n../a cat\nx\n")
    with pytest.raises(AccVideoError, match="holds '../a cat', which cannot be a file's name"):
        video_names(prompts, names)


def test_sampling_names_the_videos_and_makes_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(
        "a red circle moving left on a plain background\na blue square moving up on a plain "
        "background\n"
    )
    Path("names.txt").write_text("a red circle\na blue square.\n")
    command = ["sample", "out", "--prompts", "prompts.txt", "--names", "names.txt"]
    command += ["--samples", "2", "--steps", "1", "--frames", "5", "--threads", "1"]
    for name in ("a red circle-0", "a red circle-1", "a blue square.-0"):
        Path("out").mkdir(exist_ok=True)
        (Path("out") / f"{name}.mp4").touch()
    assert main(command) == 0
    assert [path.name for path in Path("out").iterdir() if path.stat().st_size] == [
        "a blue square.-1.mp4"
    ]
    assert "a blue square.-1.mp4" in capsys.readouterr().err
    assert main(command) == 0, "nothing is left to do"
    assert main([*command, "--prompt", "x"]) == 2
    assert "give that file alone" in capsys.readouterr().err


def test_prompts_are_those_of_the_dimensions(info: Path) -> None:
    assert prompts_of(info, ["dynamic_degree", "color"]) == ["a dog", "a cat"]
    assert prompts_of(info, ["appearance_style"]) == ["a dog"]


def test_missing_and_foreign_files_are_named_before_vbench_scores_the_rest(
    info: Path, tmp_path: Path
) -> None:
    folder = videos(tmp_path / "videos", "a dog")
    check_videos(folder, info, ["subject_consistency"])
    with pytest.raises(AccVideoError, match="5 of the 10 videos .* such as 'a cat-0.mp4'; sample"):
        check_videos(folder, info, ["dynamic_degree", "color"])
    (folder / "notes.txt").touch()
    with pytest.raises(AccVideoError, match="several kinds .*.mp4, .txt.*; leave only the videos"):
        check_videos(folder, info, ["subject_consistency"])


def test_what_the_static_filter_left_is_judged_however_little_it_is(
    info: Path, tmp_path: Path
) -> None:
    folder = videos(tmp_path / "videos", "a stone", count=2)
    check_videos(folder, info, ["temporal_flickering"])
    with pytest.raises(AccVideoError, match="8 of the 10 videos"):
        check_videos(folder, info, ["temporal_flickering", "color"])
    with pytest.raises(AccVideoError, match="5 of the 5 videos"):
        check_videos(videos(tmp_path / "others", "a dog"), info, ["temporal_flickering"])


class Judge:
    """Called as vbench.VBench is; writes what it writes."""

    calls: list[tuple[Any, ...]] = []

    def __init__(self, device: torch.device, full_info_dir: str, output_path: str) -> None:
        self.output = Path(output_path)
        self.output.mkdir(parents=True, exist_ok=True)
        self.given = device, full_info_dir

    def evaluate(self, videos_path: str, name: str, dimension_list: list[str]) -> None:
        Judge.calls.append((*self.given, videos_path, tuple(dimension_list)))
        scores = {x: [0.5, [{"video_path": "a dog-0.mp4"}]] for x in dimension_list}
        (self.output / f"{name}_eval_results.json").write_text(json.dumps(scores))


def test_the_package_judges_each_dimension_once(
    info: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    info.rename(package / info.name)
    module = types.ModuleType("vbench")
    module.__spec__ = types.SimpleNamespace(origin=str(package / "__init__.py"))  # type: ignore
    module.VBench = Judge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vbench", module)
    monkeypatch.setattr(Judge, "calls", [])
    folder, out = videos(tmp_path / "videos", "a dog", "a cat"), tmp_path / "out"
    command = ["vbench", str(folder), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--dimension", "color"]) == 0
    assert main([*command, "--dimension", "color", "--dimension", "dynamic_degree"]) == 0
    given = torch.device("cpu"), str(package / info.name), str(folder)
    assert Judge.calls == [(*given, ("color",)), (*given, ("dynamic_degree",))]
    assert "color                     50.00" in capsys.readouterr().out
    found = json.loads((out / "vbench.json").read_text())
    assert found["dimensions"] == {"dynamic_degree": 0.5, "color": 0.5} and found["total"] is None


def test_results_made_elsewhere_are_collected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results" / "deep"
    results.mkdir(parents=True)
    (results / "a_eval_results.json").write_text(json.dumps({"color": [0.9, []]}))
    (results / "b_eval_results.json").write_text(json.dumps({"scene": [0.4, []]}))
    out = tmp_path / "out"
    assert main(["vbench", "--results", str(results.parent), "--out", str(out)]) == 0
    assert "color                     90.00" in capsys.readouterr().out
    (results / "c_eval_results.json").write_text(json.dumps({"color": [0.8, []]}))
    with pytest.raises(AccVideoError, match="says 0.8 for color and another file there 0.9"):
        collect(results)
    (results / "c_eval_results.json").write_text("[]")
    with pytest.raises(AccVideoError, match="c_eval_results.json is no result of VBench"):
        collect(results)
    with pytest.raises(AccVideoError, match="there are no results of VBench"):
        collect(out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["videos"], "the package vbench is not installed; install it as github.com/Vchitect"),
        ([], "needs a folder of videos, or --results; give one of them"),
        (["videos", "--dimension", "beauty"], "VBench has no dimension 'beauty'; it has subject_"),
    ],
)
def test_what_cannot_be_judged_is_one_sentence(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["vbench", *words]) == 2
    assert message in capsys.readouterr().err

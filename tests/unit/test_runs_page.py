"""Several runs on one page: what it shows of runs finished, going on, and not yet begun."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from accvideo_core.cli import main
from accvideo_core.distill.recipes import Recipe, preset
from accvideo_core.errors import AccVideoError
from accvideo_core.evaluate.pictures import panels
from accvideo_core.evaluate.runs import (
    compared_settings,
    differs,
    read_runs,
    training_panels,
    validation_panels,
)
from accvideo_core.evaluate.runs_page import write_runs_page

ADVERSARIAL = replace(preset("tiny-adversarial-2"), train_steps=60)
BEST: dict[str, Any] = {"validate_every": 20, "best_by": "motion"}


def make_run(folder: Path, recipe: Recipe = ADVERSARIAL, updates: int = 60) -> Path:
    """A run folder as training leaves it, with made-up figures."""
    draw = random.Random(folder.name)
    folder.mkdir(parents=True)
    student = {"family": "hunyuan_video", "lora": recipe.as_dict()["lora"], "recipe": {}}
    config = {"format": 1, "recipe": recipe.as_dict(), "student": student, "start": None}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [metrics(step, draw.random()) for step in range(1, updates + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def metrics(step: int, x: float) -> dict[str, float]:
    losses = {"trajectory": 1 + x, "generator": 0.7, "discriminator": 1.4, "loss": 1.07 + x}
    accuracies = {"real_accuracy": 0.5 + x / 2, "fake_accuracy": 0.5}
    norms = {"student_grad_norm": x, "heads_grad_norm": 2 * x}
    place = {"step": step, "k": step % 2, "t": 0.0, "lr": 1e-4, "seconds": 0.25}
    return {**place, **losses, **accuracies, **norms}


def look(folder: Path, step: int, colour: str, notes: tuple[str, ...] = (), **more: Any) -> None:
    row = {"step": step, "motion": 0.9, "latent_mse": 0.1, "notes": list(notes), **more}
    with open(folder / "validation.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    (folder / "samples").mkdir(exist_ok=True)
    Image.new("RGB", (2000, 500), colour).save(folder / "samples" / f"{step:08d}.png")


class Page(HTMLParser):
    """What a page holds: its text, headings, table rows and pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.images, self.links = "", [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [
            f"{tag} {name}" for name in given if name in ("href", "src") and tag != "img"
        ]
        if tag == "img":
            kind, _, data = (given["src"] or "").partition(",")
            assert kind == "data:image/png;base64"
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            self.images.append((given["alt"], image))
        self.text += "\n" if tag in ("tr", "h1", "h2", "li", "summary") else " "

    def handle_data(self, data: str) -> None:
        self.text += data

    def line(self, start: str) -> str:
        (found,) = [line for line in self.text.split("\n") if line.strip().startswith(start)]
        return " ".join(found.split())


def test_runs_on_one_page_through_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/low"))
    make_run(Path("runs/high"), replace(ADVERSARIAL, lr=1e-3, **BEST), updates=40)
    look(Path("runs/high"), 20, "red", ("motion is 80 % of the teacher's",), best_step=20)
    look(Path("runs/high"), 40, "blue", best_step=20, real_accuracy_k0=0.5, seconds=3.0)
    assert main(["compare", "runs/low", "runs/high", "--out", "pages/two.html"]) == 0
    assert "2 runs are on pages/two.html" in capsys.readouterr().out
    page = Page(Path("pages/two.html"))
    assert page.links == []  # everything is inside
    assert page.line("updates") == "updates 60 of 60 40 of 60"
    assert page.line("recipe.lr") == "recipe.lr 0.0003 0.001"
    assert page.line("recipe.best_by ") == "recipe.best_by null motion"
    assert page.line("best student") == "best student of update 20, by motion"
    differing, same = page.text.split("Settings that are the same")
    assert "recipe.batch_size" in same and "recipe.batch_size" not in differing
    assert "high, update 20: motion is 80 % of the teacher's" in page.text
    titles = [text for text, _ in page.images]
    assert titles[0] == "trajectory loss, generator loss, discriminator loss, loss"
    assert titles[1] == (
        "real accuracy at k = 1, fake accuracy at k = 1, "
        "real accuracy at k = 0, fake accuracy at k = 0"
    )
    assert titles[2] == "student grad norm, heads grad norm"
    assert titles[-2:] == ["motion (teacher = 1), latent mse", "teacher and student of high"]
    sheet = page.images[-1][1]
    assert sheet.size == (1600, 400) and sheet.convert("RGB").getpixel((5, 5)) == (0, 0, 255)


def test_one_run_shows_all_its_settings(tmp_path: Path) -> None:
    write_runs_page([make_run(tmp_path / "only")], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.line("recipe.batch_size") == "recipe.batch_size 16"
    assert "differ" not in page.text


def test_a_run_in_progress_shows_what_is_whole(tmp_path: Path) -> None:
    going = make_run(tmp_path / "going", updates=7)
    for name in ("metrics.jsonl", "validation.jsonl"):
        with open(going / name, "a") as file:
            file.write('{"step": 8, "lo')
    begun = make_run(tmp_path / "begun", updates=0)
    (begun / "metrics.jsonl").unlink()
    write_runs_page([going, begun], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.line("updates") == "updates 7 of 60 none yet of 60"
    assert page.line("seconds an update") == "seconds an update 0.25 (median)"
    assert len(page.images) == 4 and "Validation" not in page.text
    write_runs_page([begun], tmp_path / "page.html")
    assert Page(tmp_path / "page.html").images == []


def test_lines_are_the_runs_figures(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", updates=3), make_run(tmp_path / "b", updates=2)
    with open(a / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**metrics(4, 0.5), "loss": float("nan")}) + "\n")
    look(a, 1, "red", clips="others")
    look(a, 2, "red", clips="these")
    runs = read_runs([a, b])
    sections = training_panels(runs)
    rows = runs[0].rows
    assert sections["Losses"]["loss"]["a"] == [(row["step"], row["loss"]) for row in rows[:3]]
    assert [step for step, _ in sections["Losses"]["trajectory loss"]["a"]] == [1, 2, 3, 4]
    at_1 = sections["Accuracy of the heads"]["real accuracy at k = 1"]
    assert at_1["a"] == [(row["step"], row["real_accuracy"]) for row in rows if row["k"] == 1]
    assert [step for step, _ in at_1["b"]] == [1]
    assert sections["Gradient norms"]["student grad norm"].keys() == {"a", "b"}
    assert sections["Learning rate, time and the rest"].keys() == {"lr", "seconds"}
    assert validation_panels(runs)["motion (teacher = 1)"] == {"a": [(2, 0.9)]}


def test_accuracies_of_a_sweep_are_drawn_by_key_time_too(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "interval", updates=2), make_run(tmp_path / "sweep", updates=0)
    row = {"step": 1, "real_accuracy": 0.6, "real_accuracy_k0": 0.5, "real_accuracy_k1": 0.7}
    row |= {"trajectory": 2.0, "trajectory_k0": 1.0, "trajectory_k1": 3.0}
    (b / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    sections = training_panels(read_runs([a, b]))
    accuracies = sections["Accuracy of the heads"]
    assert accuracies["real accuracy at k = 1"].keys() == {"interval", "sweep"}
    assert accuracies["real accuracy at k = 0"]["sweep"] == [(1, 0.5)]
    assert accuracies["real accuracy"] == {"sweep": [(1, 0.6)]}
    losses = sections["Losses"]
    assert losses["trajectory loss"]["sweep"] == [(1, 2.0)] and not [n for n in losses if "k" in n]


def test_settings_are_told_apart(tmp_path: Path) -> None:
    full = replace(ADVERSARIAL, lora=None)
    runs = read_runs([make_run(tmp_path / "lora"), make_run(tmp_path / "full", full)])
    table = compared_settings(runs)
    assert {name for name, values in table.items() if differs(values)} == {
        "recipe.lora.rank"
    }  # with None where there are no adapters
    assert table["recipe.lora.rank"] == [64, None]
    assert not [name for name in table if name.startswith("student.lora")]


def test_runs_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")])
    assert [run.label for run in runs] == [str(run.folder) for run in runs]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<img src=x onerror=alert(1)>")
    look(run, 5, "red", ("<script>alert(2)</script>",))
    write_runs_page([run, make_run(tmp_path / "b")], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and "<img src=x" not in text
    assert "<script>alert(2)</script>" in unescape(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/a", "empty"], "empty is no training run .no config.json.; choose its folder"),
        (["missing", "--out", "x.html"], "missing is no training run"),
        (["empty"], "empty is no training run .*and there are no prompts to measure students on"),
        (["runs/a", "runs/b", "--student", "s.safetensors"], "measured into one folder"),
        (["out", "--prompt", "x", "--out", "x.html"], "give one folder and no --out"),
    ],
)
def test_what_compare_cannot_do_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/a")), make_run(Path("runs/b"))
    Path("empty").mkdir()
    assert main(["compare", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line) and not list(Path().rglob("*.html"))


def test_broken_settings_name_their_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.json").write_text("{")
    with pytest.raises(AccVideoError, match="config.json is not JSON"):
        read_runs([run])


def test_one_update_of_many_stands_out() -> None:
    """A long line is thinned to what can be seen, and its extremes can."""
    corners = [(0.0, 1.0), (20_000.0, 1.9)]
    flat = [(float(i), 1.0 + i % 2 / 100) for i in range(20_000)]
    spike = [(step, 1.9 if step == 10_001 else value) for step, value in flat]

    def drawn(line: list[tuple[float, float]]) -> bool:
        image = panels({"loss": {"a": line, "b": corners}}, ["a", "b"], smooth=False).convert("RGB")
        middle = (66 + 544) // 2  # of the axes, from left to right
        box = image.crop((middle - 3, 60, middle + 3, 100)).tobytes()
        return any(b > r + 40 for r, b in zip(box[::3], box[2::3], strict=True))  # a's blue

    assert drawn(spike) and not drawn(flat)

"""The workflow files: the UI form is what the API form says, laid out to be read by a person."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from scripts.comfyui.make_ui_workflow import to_ui
from tests.comfyui.placeholders import named_files

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
UI_WORKFLOWS = sorted(FOLDER.glob("*.json"))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", UI_WORKFLOWS, ids=lambda path: path.stem)
def test_ui_form_is_made_from_the_api_form(path: Path, object_info: dict[str, Any]) -> None:
    """Core nodes' widgets differ between versions of ComfyUI; ours and all links must agree."""
    made, stored = to_ui(read(FOLDER / "api" / path.name), object_info, path.stem), read(path)
    assert stored["links"] == made["links"] and stored["groups"] == made["groups"], (
        "run python -m scripts.comfyui.make_ui_workflow"
    )
    for workflow in (made, stored):
        workflow["ours"] = [n for n in workflow["nodes"] if n["type"].startswith("AccVideo")]
    assert stored["ours"] == made["ours"], "run python -m scripts.comfyui.make_ui_workflow"


@pytest.mark.parametrize("path", UI_WORKFLOWS, ids=lambda path: path.stem)
def test_nodes_lie_in_their_group_and_do_not_overlap(path: Path) -> None:
    workflow = read(path)
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
    for one, other in combinations(boxes, 2):
        assert not overlap(one, other)
    for box in boxes:
        assert any(within(box, group["bounding"]) for group in workflow["groups"])


@pytest.mark.parametrize("path", UI_WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_for_real_weights_say_which_file_goes_where(path: Path) -> None:
    """That the notes are complete is shown by the loaders' lists, which hold nothing else."""
    named = named_files(FOLDER / "api" / path.name)
    assert bool(named) == (not path.stem.startswith(("tiny_", "toy_")))
    shown = [n["widgets_values"][0] for n in read(path)["nodes"] if n["type"] == "MarkdownNote"]
    assert all(any(name in text for text in shown) for name in named)


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))


def within(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(b[i] <= a[i] and a[i] + a[i + 2] <= b[i] + b[i + 2] for i in (0, 1))

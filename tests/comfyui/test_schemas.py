"""Schemas only grow at the end, so that saved workflows keep working."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import schemas

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def now(comfyui_path: Path) -> dict[str, schemas.Schema]:
    try:
        return schemas.current(comfyui_path)
    except ImportError as error:
        pytest.skip(f"ComfyUI's API cannot be imported: {error}")


def test_saved_workflows_still_work(now: dict[str, schemas.Schema]) -> None:
    assert schemas.golden(), "no golden schemas: run python tests/comfyui/schemas.py freeze"
    assert schemas.breaks(schemas.golden(), now) == []


def test_what_was_added_is_frozen_too(now: dict[str, schemas.Schema]) -> None:
    assert now == schemas.golden(), "run python tests/comfyui/schemas.py freeze and commit"


def test_ids_are_literals_of_classes_that_inherit_comfynode_directly(
    now: dict[str, schemas.Schema],
) -> None:
    """ComfyUI-Manager reads sources without running them to learn which pack has a node."""
    text = "\n".join(path.read_text() for path in (ROOT / "nodes").glob("*.py"))
    for name in now:
        assert re.search(rf"^class {name}\(io\.ComfyNode\):", text, re.MULTILINE), name
        assert f'node_id="{name}"' in text, name


def test_optional_inputs_have_defaults_in_execute(now: dict[str, schemas.Schema]) -> None:
    """An API workflow that was saved before an input was added does not hand it over."""
    text = "\n".join(path.read_text() for path in (ROOT / "nodes").glob("*.py"))
    for name, schema in now.items():
        body = text.split(f"class {name}(")[1].split("\nclass ")[0]
        signature = re.search(r"def execute\((.*?)\) -> ", body, re.DOTALL)
        assert signature, name
        for option, _, _ in schema["optional"]:
            given = re.search(rf"\b{option}: [^,]*= ", signature[1])
            assert given or "**" in signature[1], f"{name}.{option} has no default in execute"


OLD: dict[str, schemas.Schema] = {
    "Node": {
        "required": [
            ["model", "ACCVIDEO_MODEL", {}],
            ["kind", "COMBO", {"options": ["a", "b"]}],
            ["steps", "INT", {"min": 0, "max": 9}],
        ],
        "optional": [["extra", "STRING", {}]],
        "outputs": [["out", "LATENT"], ["images", "IMAGE"]],
        "output_node": True,
    }
}


def changed(edit: Any) -> dict[str, schemas.Schema]:
    new = copy.deepcopy(OLD)
    edit(new["Node"])
    return new


@pytest.mark.parametrize(
    "edit",
    [
        lambda node: node["optional"].append(["more", "INT", {}]),
        lambda node: node["outputs"].append(["video", "VIDEO"]),
        lambda node: node["required"][1][2]["options"].insert(0, "c"),
        lambda node: node["required"][2][2].update(min=-1, max=99),
        lambda node: node["required"][2][2].pop("max"),
        lambda node: node["required"][0].__setitem__(1, "ACCVIDEO_MODEL,ACCVIDEO_STUDENT"),
        lambda node: node["optional"].append(node["required"].pop(0)),
    ],
    ids=["input", "output", "choice", "wider", "boundless", "type", "freed"],
)
def test_growth_at_the_end_is_no_break(edit: Any) -> None:
    assert schemas.breaks(OLD, changed(edit)) == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda node: node["required"].append(["more", "INT", {}]), "must be optional"),
        (lambda node: node["optional"].insert(0, ["more", "INT", {}]), "optional inputs may only"),
        (lambda node: node["required"].reverse(), "required inputs may only"),
        (lambda node: node["required"].pop(), "required inputs may only"),
        (lambda node: node["optional"].append(node["required"].pop()), "required inputs may only"),
        (lambda node: node["optional"][0].__setitem__(0, "other"), "optional inputs may only"),
        (lambda node: node["required"][2].__setitem__(1, "FLOAT"), "type INT became FLOAT"),
        (lambda node: node["required"][1][2]["options"].remove("b"), "no longer takes 'b'"),
        (lambda node: node["required"][2][2].update(min=1), "minimum rose"),
        (lambda node: node["required"][2][2].update(max=8), "maximum fell"),
        (lambda node: node["outputs"].reverse(), "outputs may only"),
        (lambda node: node["outputs"].insert(0, ["x", "INT"]), "outputs may only"),
        (lambda node: node.update(output_node=False), "no output node"),
    ],
)
def test_break_is_found(edit: Any, message: str) -> None:
    assert message in "\n".join(schemas.breaks(OLD, changed(edit)))


def test_lost_node_is_found() -> None:
    assert schemas.breaks(OLD, {}) == ["Node is gone"]

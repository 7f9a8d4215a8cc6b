"""The workflow validator finds planted faults; its schema here is a small one of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from scripts.comfyui.validate import validate_api, validate_ui

INFO: dict[str, Any] = {
    "AccVideoLoad": {
        "input": {"required": {"name": ["COMBO", {"options": ["a", "b"]}]}},
        "output": ["ACCVIDEO_MODEL", "SIGMAS"],
        "output_node": False,
    },
    "AccVideoUse": {
        "input": {
            "required": {
                "model": ["ACCVIDEO_MODEL", {}],
                "seed": ["INT", {"min": 0, "max": 9, "control_after_generate": True}],
                "mode": [["x", "y"]],
                "kind": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {"options": [
                        {"key": "lora", "inputs": {"required": {"rank": ["INT", {"min": 1}]}}},
                        {"key": "full", "inputs": {"required": {}}},
                    ]},
                ],
            },
            "optional": {"text": ["STRING", {}], "sigmas": ["SIGMAS", {}]},
        },
        "output": [],
        "output_node": True,
    },
}  # fmt: skip
API: dict[str, Any] = {
    "1": {"class_type": "AccVideoLoad", "inputs": {"name": "a"}},
    "2": {
        "class_type": "AccVideoUse",
        "inputs": {
            "model": ["1", 0], "seed": 3, "mode": "x", "kind": "lora", "kind.rank": 4,
            "text": "a red circle", "sigmas": ["1", 1],
        },
    },
}  # fmt: skip
UI: dict[str, Any] = {
    "nodes": [
        {
            "id": 1, "type": "AccVideoLoad", "widgets_values": ["a"], "inputs": [],
            "outputs": [{"name": "model", "links": [7]}, {"name": "sigmas", "links": None}],
            "properties": {"cnr_id": "accvideo"},
        },
        {
            "id": 2, "type": "AccVideoUse", "outputs": [],
            "inputs": [{"name": "model", "link": 7}, {"name": "sigmas", "link": None}],
            "widgets_values": [3, "fixed", "x", "lora", 4, "a red circle"],
            "properties": {"cnr_id": "accvideo"},
        },
        {"id": 3, "type": "Note", "widgets_values": ["what this shows"]},
    ],
    "links": [[7, 1, 0, 2, 0, "ACCVIDEO_MODEL"]],
}  # fmt: skip


def changed(workflow: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(workflow)
    place: Any = result
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return result


def test_sound_workflows_have_no_fault() -> None:
    assert validate_api(API, INFO) == []
    assert validate_ui(UI, INFO) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("1", "class_type"), "Gone", "unknown class 'Gone'"),
        (("1", "inputs", "name"), "c", "'c' is not one of"),
        (("1", "inputs", "name"), ..., "required input 'name' is missing"),
        (("2", "inputs", "seed"), 10, "outside [0, 9]"),
        (("2", "inputs", "seed"), "3", "not of type INT"),
        (("2", "inputs", "seed"), True, "not of type INT"),
        (("2", "inputs", "model"), ["1", 1], "SIGMAS does not fit ACCVIDEO_MODEL"),
        (("2", "inputs", "model"), ["1", 2], "links to output 2"),
        (("2", "inputs", "model"), ["8", 0], "which is not there"),
        (("2", "inputs", "model"), "a", "needs a link"),
        (("2", "inputs", "kind"), "tiny", "'tiny' is not one of"),
        (("2", "inputs", "kind.rank"), 0, "outside"),
        (("2", "inputs", "colour"), 1, "no input 'colour'"),
        (("2", "inputs", "text"), "a\\b", "backslash"),
        (("2", "inputs", "text"), "/home/me/clip.mp4", "absolute path"),
        (("2", "inputs", "text"), "C:/clips", "absolute path"),
        (("2",), ..., "no node of the workflow is an output node"),
    ],
)
def test_api_fault_is_found(path: tuple[Any, ...], value: Any, message: str) -> None:
    assert message in "\n".join(validate_api(changed(API, path, value), INFO))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("nodes", 0, "type"), "Gone", "unknown class 'Gone'"),
        (("nodes", 0, "widgets_values"), ["c"], "'c' is not one of"),
        (("nodes", 0, "widgets_values"), [], "has no value"),
        (("nodes", 0, "widgets_values"), ["a", 1], "too many"),
        (("nodes", 1, "widgets_values", 0), 10, "outside [0, 9]"),
        (("nodes", 1, "widgets_values", 4), 0, "outside"),
        (("nodes", 1, "widgets_values", 5), "/tmp/a", "absolute path"),
        (("nodes", 1, "inputs", 0, "link"), None, "has no link"),
        (("nodes", 1, "inputs", 0, "link"), 8, "has link 8"),
        (("nodes", 1, "inputs", 0, "name"), "modal", "no input 'modal'"),
        (("nodes", 0, "outputs", 0, "links"), [], "not listed at output 0"),
        (("nodes", 0, "properties"), {}, "cnr_id"),
        (("links", 0), [7, 1, 0, 9, 0, "ACCVIDEO_MODEL"], "not both there"),
        (("nodes",), [], "no nodes"),
    ],
)
def test_ui_fault_is_found(path: tuple[Any, ...], value: Any, message: str) -> None:
    assert message in "\n".join(validate_ui(changed(UI, path, value), INFO))


def test_ui_link_into_a_wrong_type_is_found() -> None:
    crossed = changed(UI, ("links", 0), [7, 1, 1, 2, 0, "SIGMAS"])
    crossed = changed(crossed, ("nodes", 0, "outputs", 1, "links"), [7])
    assert "SIGMAS does not fit ACCVIDEO_MODEL" in "\n".join(validate_ui(crossed, INFO))

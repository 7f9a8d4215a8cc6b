"""A real ComfyUI server with the pack in it: it loads, and every workflow file fits it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scripts.comfyui.client import ComfyClient, Event, NodeFailed, PromptRejected
from scripts.comfyui.server import ComfyServer
from scripts.comfyui.validate import validate_api, validate_ui

ROOT = Path(__file__).resolve().parents[2]
UI_WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
API_WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))
NODES = {
    "AccVideoLoadTeacher", "AccVideoTinyPrompts", "AccVideoEncodePrompts",
    "AccVideoRecordTrajectories", "AccVideoLoadDataset", "AccVideoDistill",
    "AccVideoAdversarialTune", "AccVideoSaveStudent", "AccVideoLoadStudent", "AccVideoSchedule",
    "AccVideoSample", "AccVideoDecode", "AccVideoCompare", "AccVideoTeacherLora",
    "AccVideoExportStudent", "AccVideoInspectTrajectory",
    "AccVideoInspectFeatures", "AccVideoToyExperiment",
}  # fmt: skip
PICTURE: dict[str, Any] = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 32, "height": 32, "batch_size": 1, "color": 255},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "plain"}},
}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_pack_loads_without_a_complaint(comfy_server: ComfyServer) -> None:
    assert comfy_server.broken_packs() == []
    assert "Import times for custom nodes" in comfy_server.log_text()


def test_pack_loads_within_a_second(comfy_server: ComfyServer) -> None:
    line = re.search(r"([\d.]+) seconds: \S*/custom_nodes/accvideo", comfy_server.log_text())
    assert line and float(line[1]) < 1.0


def test_every_node_of_the_pack_is_offered(object_info: dict[str, Any]) -> None:
    ours = {name: schema for name, schema in object_info.items() if name.startswith("AccVideo")}
    assert set(ours) >= NODES
    for name, schema in ours.items():
        assert schema["category"].startswith("AccVideo"), name
        assert schema["description"], f"{name} does not say what it does"


def test_every_node_has_a_help_page(comfy_server: ComfyServer, object_info: Any) -> None:
    ours = [name for name in object_info if name.startswith("AccVideo")]
    assert ours
    assert [n for n in ours if not (ROOT / "web" / "docs" / f"{n}.md").is_file()] == []


def test_there_are_workflows_of_both_kinds() -> None:
    assert UI_WORKFLOWS and ROOT / "workflows" / "api" / "tiny_line.json" in API_WORKFLOWS


@pytest.mark.parametrize("path", UI_WORKFLOWS, ids=lambda path: path.stem)
def test_ui_workflow_fits_the_server(path: Path, object_info: dict[str, Any]) -> None:
    assert validate_ui(read(path), object_info) == []


@pytest.mark.parametrize("path", API_WORKFLOWS, ids=lambda path: path.stem)
def test_api_workflow_fits_the_server(path: Path, object_info: dict[str, Any]) -> None:
    assert validate_api(read(path), object_info) == []


def test_every_node_is_used_in_a_ui_workflow(object_info: dict[str, Any]) -> None:
    used = {node["type"] for path in UI_WORKFLOWS for node in read(path)["nodes"]}
    assert {name for name in object_info if name.startswith("AccVideo")} <= used


def test_client_reports_progress_and_fetches_the_result(comfy_client: ComfyClient) -> None:
    events: list[Event] = []
    result = comfy_client.run(PICTURE, on_event=events.append)
    (image,) = result.outputs["2"]["images"]
    assert comfy_client.view(image).startswith(b"\x89PNG")
    assert {event.node for event in events} == {"1", "2"}
    again = comfy_client.run(PICTURE)
    assert set(again.cached) == {"1", "2"} and again.outputs == result.outputs


def test_client_names_what_the_server_refused(comfy_client: ComfyClient) -> None:
    broken = {**PICTURE, "3": {"class_type": "SaveImage", "inputs": {"filename_prefix": "a"}}}
    with pytest.raises(PromptRejected, match=r"SaveImage \(node 3\): Required input is missing"):
        comfy_client.run(broken)


def test_client_names_the_node_that_failed(comfy_client: ComfyClient) -> None:
    outside = {**PICTURE["2"], "inputs": {"images": ["1", 0], "filename_prefix": "../../x"}}
    with pytest.raises(NodeFailed, match="outside the output folder") as caught:
        comfy_client.run({"1": PICTURE["1"], "2": outside})
    assert (caught.value.node_id, caught.value.node_type) == ("2", "SaveImage")
    assert caught.value.trace

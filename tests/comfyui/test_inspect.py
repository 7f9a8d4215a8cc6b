"""Looking into a recorded trajectory, and into a network, in a real server."""

from __future__ import annotations

import copy
import io
import json
import shutil
from typing import Any

import pytest
from PIL import Image

from scripts.comfyui.client import ComfyClient, Event, NodeFailed, Prompt
from scripts.comfyui.server import ROOT, ComfyServer

SMOKE: Prompt = json.loads((ROOT / "workflows" / "api" / "smoke_line.json").read_text())


NODE = "20"


def inspected(**inputs: Any) -> Prompt:
    """The smoke line up to its dataset, and one of its records."""
    prompt = copy.deepcopy({n: e for n, e in SMOKE.items() if int(n) <= 4})
    given = {"model": ["1", 0], "dataset": ["4", 0], "index": 0, "frames": 2, **inputs}
    return {
        **prompt,
        NODE: {"class_type": "AccVideoInspectTrajectory", "inputs": given},
        "21": {"class_type": "PreviewImage", "inputs": {"images": ["20", 0]}},
        "22": {"class_type": "PreviewImage", "inputs": {"images": ["20", 1]}},
        "23": {"class_type": "PreviewAny", "inputs": {"source": ["20", 2]}},
    }


def test_states_and_curves_are_shown(comfy_client: ComfyClient) -> None:
    outputs = comfy_client.run(inspected()).outputs
    for node in ("21", "22"):
        (image,) = outputs[node]["images"]
        with Image.open(io.BytesIO(comfy_client.view(image))) as picture:
            assert min(picture.size) > 200
    (text,) = outputs["23"]["text"]
    assert "kept times: 1.0000, " in text and "bend: " in text


def test_node_shows_pictures_and_facts_with_nothing_connected(comfy_client: ComfyClient) -> None:
    prompt = {name: entry for name, entry in inspected().items() if int(name) <= int(NODE)}
    shown = comfy_client.run(prompt).outputs[NODE]
    sizes = []
    for image in shown["images"]:
        with Image.open(io.BytesIO(comfy_client.view(image))) as picture:
            sizes.append(picture.size)
    assert len(sizes) == 2 and min(min(size) for size in sizes) > 200
    (text,) = shown["text"]
    assert "prompt: a " in text and "bend: " in text


def test_a_dataset_of_another_teacher_is_refused(
    comfy_server: ComfyServer, comfy_client: ComfyClient
) -> None:
    comfy_client.run(inspected())
    datasets = comfy_server.base / "datasets" / "accvideo"
    shutil.copytree(datasets / "smoke_line", datasets / "foreign")
    path = datasets / "foreign" / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "teacher": "0123456789abcdef"}))
    prompt = {name: entry for name, entry in inspected(dataset=["30", 0]).items() if name != "4"}
    prompt["30"] = {"class_type": "AccVideoLoadDataset", "inputs": {"dataset": "foreign"}}
    with pytest.raises(NodeFailed, match="'foreign' was recorded from another teacher than"):
        comfy_client.run(prompt)
    shutil.rmtree(datasets / "foreign")  # so that it is not the newest one of other tests


def test_a_record_that_is_not_there_is_named(comfy_client: ComfyClient) -> None:
    with pytest.raises(NodeFailed, match="has no record 8; give a number from 0 to 7"):
        comfy_client.run(inspected(index=8))


def test_a_prompt_is_told_to_the_page_as_text(comfy_client: ComfyClient) -> None:
    prompt = {name: entry for name, entry in inspected().items() if int(name) <= int(NODE)}
    prompt["3"]["inputs"]["prompts"] = "a bird <img src=x onerror=alert(1)> & a cat"
    prompt["4"]["inputs"].update(dataset="hostile", teacher_steps=10, batch_size=1)
    events: list[Event] = []
    comfy_client.run(prompt, on_event=events.append)
    told = " ".join(event.text for event in events if event.node == NODE)
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; a cat" in told and "<img" not in told


def features(**inputs: Any) -> Prompt:
    """The smoke line's teacher and prompts, and what the teacher's blocks see."""
    prompt = copy.deepcopy({n: e for n, e in SMOKE.items() if int(n) <= 3})
    given = {
        "model": ["1", 0], "conditioning": ["3", 0], "width": 32, "height": 32, "frames": 17,
        "seed": 1, "student_steps": 2, "blocks": "0, 5", "shown": 1, **inputs,
    }  # fmt: skip
    return {**prompt, NODE: {"class_type": "AccVideoInspectFeatures", "inputs": given}}


def test_feature_maps_are_shown_at_every_key_time(comfy_client: ComfyClient) -> None:
    shown = comfy_client.run(features()).outputs[NODE]
    (image,), (text,) = shown["images"], shown["text"]
    with Image.open(io.BytesIO(comfy_client.view(image))) as picture:
        # The decoded state and two blocks, each 128 pixels wide; two key times.
        assert picture.width > 3 * 128 and picture.height > 2 * 128
        colours = picture.convert("RGB").getcolors(1 << 20)
        assert colours and (214, 39, 40) in {colour for _, colour in colours}
    assert "block 5" in text and [line.split()[0] for line in text.splitlines()[2:]] == [
        "0.8750", "0.0000"
    ]  # fmt: skip


def test_a_block_that_is_not_there_is_named(comfy_client: ComfyClient) -> None:
    with pytest.raises(NodeFailed, match=r"feature blocks \[6\] must be one or more of 0..5"):
        comfy_client.run(features(blocks="6"))
    with pytest.raises(NodeFailed, match="3 student steps do not divide the 50 teacher steps"):
        comfy_client.run(features(student_steps=3))

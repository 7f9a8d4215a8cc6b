"""The one-dimensional experiment in a real server."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator

import pytest
from PIL import Image

from scripts.comfyui.client import (
    ComfyClient,
    Event,
    Interrupted,
    NodeFailed,
    Prompt,
    PromptRejected,
)
from scripts.comfyui.server import ROOT, ComfyServer

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

WORKFLOW: Prompt = json.loads((ROOT / "workflows" / "api" / "toy_1d.json").read_text())
SHORT = {"teacher_updates": 100, "student_updates": 5}


def shortened(**inputs: object) -> Prompt:
    prompt = copy.deepcopy(WORKFLOW)
    prompt["1"]["inputs"].update({**SHORT, **inputs})
    return prompt


@pytest.fixture(scope="module")
def events(comfy_server: ComfyServer) -> Iterator[list[Event]]:
    """What was heard of the first run, which others find finished."""
    heard: list[Event] = []
    ComfyClient(comfy_server.url).run(shortened(), on_event=heard.append)
    yield heard


def test_figure_and_numbers_are_shown_and_written(
    events: list[Event], comfy_client: ComfyClient, comfy_server: ComfyServer
) -> None:
    outputs = comfy_client.run(shortened()).outputs
    (image,) = outputs["2"]["images"]
    with Image.open(io.BytesIO(comfy_client.view(image))) as picture:
        assert min(picture.size) > 1000
    (text,) = outputs["3"]["text"]
    assert "endpoint" in text and "the paper's, by its own criterion" in text
    folder = comfy_server.base / "output" / "accvideo" / "toy_1d"
    assert {"figure.png", "figure.svg", "numbers.json"} <= {path.name for path in folder.iterdir()}
    assert len(json.loads((folder / "numbers.json").read_text())["e"]) == 5


def test_progress_is_told(events: list[Event]) -> None:
    told = " ".join(event.text for event in events if event.node == "1")
    assert "teacher" in told and "100" in told and "student, M = " in told


def test_other_settings_under_the_same_name_are_refused(
    events: list[Event], comfy_client: ComfyClient
) -> None:
    with pytest.raises(NodeFailed, match="'toy_1d' was started with seed 0 and cannot go on"):
        comfy_client.run(shortened(seed=5))


def test_a_name_that_leaves_the_output_folder_is_refused(comfy_client: ComfyClient) -> None:
    with pytest.raises(PromptRejected, match="without folders"):
        comfy_client.run(shortened(name="../toy"))


def test_a_cancelled_experiment_keeps_what_was_finished(
    comfy_client: ComfyClient, comfy_server: ComfyServer
) -> None:
    def cancel(event: Event) -> None:
        if "student, M = " in event.text:
            comfy_client.interrupt("")  # an empty id is the prompt that runs

    with pytest.raises(Interrupted):
        comfy_client.run(shortened(name="cancelled", student_updates=100_000), on_event=cancel)
    folder = comfy_server.base / "output" / "accvideo" / "cancelled"
    assert [path.name for path in (folder / "weights").iterdir()] == ["teacher.safetensors"]
    assert (folder / "panels" / "e.json").is_file() and not (folder / "numbers.json").exists()

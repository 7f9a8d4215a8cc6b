"""Schedules in a real server: presets without a model, sigmas that do not fit, guidance."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from accvideo_core.presets import PRESETS
from scripts.comfyui.client import ComfyClient, NodeFailed, Prompt
from scripts.comfyui.server import ROOT, ComfyServer

SMOKE: Prompt = json.loads((ROOT / "workflows" / "api" / "smoke_line.json").read_text())
TEACHER, CONDITIONING, STUDENT = ["1", 0], ["3", 0], ["5", 0]


def line(**extra: Any) -> Prompt:
    """The smoke line up to its student, and more nodes."""
    return {**copy.deepcopy({n: e for n, e in SMOKE.items() if int(n) <= 5}), **extra}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def shown(source: list[Any]) -> dict[str, Any]:
    return node("PreviewAny", source=source)


def sampled(model: list[Any], **inputs: Any) -> dict[str, Any]:
    size = {"width": 32, "height": 32, "frames": 17, "seed": 0, "batch_size": 2}
    given = {"model": model, "conditioning": CONDITIONING, "steps": 0, **size, **inputs}
    return node("AccVideoSample", **given)


@pytest.mark.parametrize("name", ["accvideo-hunyuan-5", "accvideo-wan-t2v-10", "rcm-wan-4"])
def test_a_preset_needs_no_model(comfy_client: ComfyClient, name: str) -> None:
    graph = {"1": node("AccVideoSchedule", steps=0, preset=name)}
    graph |= {f"out{slot}": shown(["1", slot]) for slot in (0, 2, 3)}
    outputs = comfy_client.run(graph).outputs
    preset = PRESETS[name]
    sigmas = [float(x) for x in outputs["out0"]["text"][0].strip("tensor([])\n").split(",")]
    assert sigmas == pytest.approx(preset.times, abs=1e-4)
    assert float(outputs["out2"]["text"][0]) == preset.cfg
    assert float(outputs["out3"]["text"][0]) == (preset.guidance or 0.0)


def test_neither_model_nor_preset_is_refused(comfy_client: ComfyClient) -> None:
    graph = {"1": node("AccVideoSchedule", steps=0), "2": shown(["1", 0])}
    with pytest.raises(NodeFailed, match="neither a model nor a preset was given"):
        comfy_client.run(graph)


def test_a_preset_of_another_family_is_refused(comfy_client: ComfyClient) -> None:
    graph = line(s=sampled(TEACHER, preset="accvideo-wan-t2v-10"), t=shown(["s", 0]))
    with pytest.raises(NodeFailed, match="is for wan_t2v, but the model is a hunyuan_video"):
        comfy_client.run(graph)


def test_sigmas_that_do_not_fit_the_student_are_warned_of(
    comfy_client: ComfyClient, comfy_server: ComfyServer
) -> None:
    def warned(graph: Prompt) -> bool:
        before = len(comfy_server.log_text())
        comfy_client.run(graph)
        return "use the student's own (" in comfy_server.log_text()[before:]

    own = line(s=node("AccVideoSchedule", model=STUDENT, steps=0))
    own |= {"x": sampled(STUDENT, sigmas=["s", 0]), "t": shown(["x", 0])}
    assert not warned(own)
    other = copy.deepcopy(own)
    other["s"]["inputs"]["steps"] = 3
    assert warned(other)


def test_guidance_without_text_encoders_asks_for_a_negative_prompt(
    comfy_client: ComfyClient,
) -> None:
    """The embedded teacher has its own encoders: an official (here empty) negative prompt."""
    graph = line(s=sampled(TEACHER, cfg=2.0, steps=2), t=shown(["s", 0]))
    assert comfy_client.run(graph).outputs["t"]
    negative = node("AccVideoEncodePrompts", model=TEACHER, prompts="a red circle")
    graph = line(n=negative, s=sampled(TEACHER, cfg=2.0, steps=2, negative=["n", 0]))
    assert comfy_client.run({**graph, "t": shown(["s", 0])}).outputs["t"]
    negative["inputs"]["prompts"] = "a red circle\na blue square"
    with pytest.raises(NodeFailed, match="negative holds 2 prompts; give one"):
        comfy_client.run({**graph, "t": shown(["s", 0])})

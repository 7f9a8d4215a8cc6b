"""From real videos to a one-step student in a real server: ingest, tune, export, show, compare."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors import safe_open

from accvideo_core.export import read_student_info
from accvideo_core.video import read_video
from scripts.comfyui.client import ComfyClient, NodeFailed, Prompt, Result
from scripts.comfyui.server import ROOT, ComfyServer

LINE: Prompt = json.loads((ROOT / "workflows" / "api" / "tiny_sf_v.json").read_text())
SHOW: Prompt = json.loads((ROOT / "workflows" / "api" / "tiny_image_to_video.json").read_text())
INGEST, TRAIN, EXPORT, IMAGES, TEACHER, COMPARE = "3", "4", "6", "7", "11", "20"


def changed(prompt: Prompt, changes: dict[str, dict[str, Any]]) -> Prompt:
    made = copy.deepcopy(prompt)
    for node, inputs in changes.items():
        made[node]["inputs"].update(inputs)
    return made


@pytest.fixture(scope="module")
def done(comfy_server: ComfyServer) -> Iterator[Result]:
    """The workflow with little of everything."""
    little = {
        "2": {"count": 4},
        TRAIN: {"train_steps": 2, "batch_size": 2},
        IMAGES: {"count": 2},
        TEACHER: {"steps": 2},
        COMPARE: {"count": 2},
    }
    yield ComfyClient(comfy_server.url).run(changed(LINE, little))


def test_videos_of_student_and_teacher_begin_with_the_images(
    done: Result, comfy_server: ComfyServer
) -> None:
    folder = comfy_server.base / "output" / "video"
    for name in ("tiny_sf_v", "tiny_svd_teacher"):
        (path,) = folder.glob(f"{name}_*.mp4")
        frames, fps = read_video(path)
        assert frames.shape == (16, 256, 256, 3) and fps == 7
    starts = sorted((comfy_server.base / "input" / "accvideo_tiny_1").glob("*.mkv"))
    firsts = [read_video(path)[0][0] for path in starts[:2]]
    teacher, _ = read_video(next(folder.glob("tiny_svd_teacher_*.mp4")))
    for clip, first in zip((teacher[:8], teacher[8:]), firsts, strict=True):
        small = clip[0, 4::8, 4::8]
        others = [(small - one).abs().mean() for one in firsts]
        assert (small - first).abs().mean() == min(others)


def test_the_checkpoint_lies_where_the_stock_loader_looks(
    done: Result, comfy_server: ComfyServer
) -> None:
    (path,) = comfy_server.base.rglob("checkpoints/tiny_sf_v.safetensors")
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    beginnings = ("model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.")
    assert all(any(name.startswith(one) for name in names) for one in beginnings)
    assert read_student_info(path).key_times == (1.0, 0.0)


def test_the_report_has_both(done: Result) -> None:
    (table,) = done.outputs["21"]["text"]
    assert "teacher@25" in table and "student@1" in table


def test_a_saved_student_makes_videos_of_images(
    done: Result, comfy_server: ComfyServer, comfy_client: ComfyClient
) -> None:
    comfy_client.run(changed(SHOW, {"3": {"count": 1}}))
    (path,) = (comfy_server.base / "output" / "video").glob("tiny_image_to_video_*.mp4")
    frames, _ = read_video(path)
    assert frames.shape == (8, 256, 256, 3) and torch.isfinite(frames).all()


def test_text_alone_and_other_datasets_are_refused_in_a_sentence(
    done: Result, comfy_client: ComfyClient
) -> None:
    words = changed(SHOW, {"4": {"prompts": "a red circle"}})
    del words["4"]["inputs"]["images"]
    with pytest.raises(NodeFailed, match="is not prompted with a text but with an image"):
        comfy_client.run(words)
    trajectory = {TRAIN: {"preset": "tiny-trajectory", "run": "other"}, "2": {"count": 4}}
    with pytest.raises(NodeFailed, match="record"):
        comfy_client.run(changed({k: LINE[k] for k in ("1", "2", "3", TRAIN, "5")}, trajectory))

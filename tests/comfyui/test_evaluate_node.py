"""Judging videos by others in a real server."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
import torch
from PIL import Image

from accvideo_core.video import read_video, write_video
from scripts.comfyui.client import ComfyClient, NodeFailed, Prompt, PromptRejected
from scripts.comfyui.server import ComfyServer

NODE = "3"
GREY, LIGHTER = 0x808080, 0x9A9A9A


def images(colour: int, frames: int) -> dict[str, Any]:
    inputs = {"width": 32, "height": 24, "batch_size": frames, "color": colour}
    return {"class_type": "EmptyImage", "inputs": inputs}


def evaluated(**inputs: Any) -> Prompt:
    given = {"name": "judged", "fps": 8.0, **inputs}
    return {
        "1": images(GREY, 8),
        "2": images(LIGHTER, 8),
        NODE: {"class_type": "AccVideoEvaluate", "inputs": given},
        "4": {"class_type": "PreviewAny", "inputs": {"source": [NODE, 1]}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": [NODE, 0]}},
    }


def test_images_are_judged_clip_by_clip(
    comfy_client: ComfyClient, comfy_server: ComfyServer
) -> None:
    prompt = evaluated(reference=["1", 0], judged=["2", 0], frames_per_clip=4)
    outputs = comfy_client.run(prompt).outputs
    folder = comfy_server.base / "output" / "accvideo" / "judged"
    report = json.loads((folder / "report.json").read_text())
    wanted = -20 * math.log10((0x9A - 0x80) / 255)
    assert report["pairs"]["PSNR"]["of_each"] == {
        name: pytest.approx(wanted, abs=1e-3) for name in ("clip_0000", "clip_0001")
    }
    (text,) = outputs["4"]["text"]
    assert text == outputs[NODE]["text"][0] == (folder / "table.txt").read_text().rstrip("\n")
    for node in (NODE, "5"):
        (image,) = outputs[node]["images"]
        with Image.open(io.BytesIO(comfy_client.view(image))) as picture:
            assert min(picture.size) > 200
    assert len(list((folder / "videos").iterdir())) == 2, "equal clips are one file"
    frames, fps = read_video(next((folder / "videos").iterdir()))
    assert frames.shape == (4, 24, 32, 3) and fps == 8


def test_folders_are_judged_by_the_names_in_them(
    comfy_client: ComfyClient, comfy_server: ComfyServer
) -> None:
    clip = torch.rand(5, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    for place in ("output/video/teacher", "input/student"):
        for name in ("one", "two"):
            write_video(comfy_server.base / place / f"{name}.mp4", clip, 8)
    prompt = evaluated(reference_folder="video/teacher", judged_folder="student")
    (text,) = comfy_client.run(prompt).outputs["4"]["text"]
    assert "judged: student, 2 videos; reference: video/teacher, 2 videos; 2 pairs" in text


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"judged": ["2", 0]}, "reference has neither images nor a folder"),
        (
            {"reference": ["1", 0], "judged": ["2", 0], "judged_folder": "student"},
            "judged has both images and a folder",
        ),
        (
            {"reference": ["1", 0], "judged": ["2", 0], "frames_per_clip": 3},
            "8 frames are no whole number of clips of 3 frames",
        ),
        ({"reference": ["1", 0], "judged_folder": "../.."}, "begins with a dot"),
        ({"reference": ["1", 0], "judged_folder": "nowhere"}, "there is no folder 'nowhere'"),
    ],
)
def test_what_cannot_be_judged_is_one_sentence(
    comfy_client: ComfyClient, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises((NodeFailed, PromptRejected), match=message):
        comfy_client.run(evaluated(**inputs))

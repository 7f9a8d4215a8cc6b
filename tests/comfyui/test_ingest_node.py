"""Real videos as a dataset, in a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accvideo_core.trajectories import TrajectoryDataset
from scripts.comfyui.client import ComfyClient, NodeFailed, Prompt, PromptRejected
from scripts.comfyui.server import ComfyServer
from tests.video_files import grey_clip, write_frames

NODE = "2"


def ingested(**inputs: Any) -> Prompt:
    size = {"width": 32, "height": 32, "frames": 5}
    given = {"folder": "real", "dataset": "real", "fps": 0.0, "clips": 0, **size, **inputs}
    teacher = {"teacher": "tiny (embedded)", "dtype": "auto"}
    return {
        "1": {"class_type": "AccVideoLoadTeacher", "inputs": teacher},
        NODE: {"class_type": "AccVideoIngestVideos", "inputs": {"model": ["1", 0], **given}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": [NODE, 1]}},
    }


@pytest.fixture
def folder(comfy_server: ComfyServer) -> Path:
    """Two videos, one of them with a caption, and a broken one."""
    place = comfy_server.base / "input" / "real"
    for name, count in (("told", 11), ("silent", 6)):
        write_frames(place / f"{name}.mkv", grey_clip(count, 32, 32))
    (place / "told.txt").write_text("a red circle")
    (place / "broken.mp4").write_bytes(b"junk")
    return place


def test_videos_become_a_dataset_and_what_is_left_out_is_said(
    comfy_client: ComfyClient, comfy_server: ComfyServer, folder: Path
) -> None:
    outputs = comfy_client.run(ingested()).outputs
    (text,) = outputs["3"]["text"]
    assert text == outputs[NODE]["text"][0]
    assert [line.split(":")[0] for line in text.splitlines()] == [
        "2 clips of 1 videos",
        "left out broken.mp4",
        "left out silent.mkv",
    ]
    (made,) = comfy_server.base.rglob("real/dataset.json")
    dataset = TrajectoryDataset.open(made.parent)
    assert len(dataset) == 2 and dataset.verify() == []
    assert {prompt.text for prompt in dataset.prompts()} == {"a red circle"}
    # A caption for all adds the other; what is there stays.
    (text,) = comfy_client.run(ingested(caption="any")).outputs["3"]["text"]
    assert text.startswith("3 clips of 2 videos") and len(dataset) == 3
    # A new video in the folder is noticed.
    write_frames(folder / "new.mkv", grey_clip(5, 32, 32) * 3)
    (text,) = comfy_client.run(ingested(caption="any")).outputs["3"]["text"]
    assert text.startswith("4 clips of 3 videos")


def test_its_clips_go_to_the_other_nodes_of_datasets(
    comfy_client: ComfyClient, folder: Path
) -> None:
    prompt = ingested(dataset="inspected")
    inputs = {"model": ["1", 0], "dataset": [NODE, 0], "index": 0, "frames": 2}
    prompt["4"] = {"class_type": "AccVideoInspectTrajectory", "inputs": inputs}
    prompt["5"] = {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}}
    with pytest.raises(NodeFailed, match="no way from noise to data to look at"):
        comfy_client.run(prompt)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"folder": "../real"}, "folder '..'"),
        ({"folder": "nowhere"}, "there is no folder 'nowhere'"),
        ({"dataset": "a/b"}, "dataset 'a/b' holds /"),
    ],
)
def test_bad_names_are_refused_before_anything_runs(
    comfy_client: ComfyClient, folder: Path, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptRejected, match=message):
        comfy_client.run(ingested(**inputs))


def test_a_folder_without_videos_is_one_sentence(
    comfy_client: ComfyClient, comfy_server: ComfyServer
) -> None:
    (comfy_server.base / "input" / "empty").mkdir(exist_ok=True)
    with pytest.raises(NodeFailed, match="holds no videos .*give a folder of videos"):
        comfy_client.run(ingested(folder="empty", dataset="empty"))

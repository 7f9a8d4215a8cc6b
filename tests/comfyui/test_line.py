"""The whole line in a real ComfyUI server: results, cache, cancel and resume, bad input."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from accvideo_core.export import read_student_info
from accvideo_core.models.tiny import embedded_teacher_path
from accvideo_core.video import read_video
from scripts.comfyui.client import (
    ComfyClient,
    Event,
    Interrupted,
    NodeFailed,
    Prompt,
    PromptRejected,
    Result,
)
from scripts.comfyui.server import ROOT, ComfyServer

SMOKE: Prompt = json.loads((ROOT / "workflows" / "api" / "smoke_line.json").read_text())
RECORD, DISTILL, TUNE, SAVE, COMPARE = "4", "5", "6", "7", "17"
RECORDS = 8
QUICK = {"teacher_steps": 20}
EVERYWHERE = (
    "..",
    "../out",
    "/tmp/out",
    "a/b",
    "a\\b",
    "C:out",
    "",
    " ",
    ".hidden",
    "con",
    "x" * 300,
)


def part(until: str, **changes: dict[str, Any]) -> Prompt:
    """The smoke line up to one node, whose first output is shown; inputs of nodes changed."""
    prompt = copy.deepcopy({n: e for n, e in SMOKE.items() if int(n) <= int(until)})
    prompt.pop(SAVE, None)
    for node, inputs in changes.items():
        prompt[node.removeprefix("n")]["inputs"].update(inputs)
    prompt["99"] = {"class_type": "PreviewAny", "inputs": {"source": [until, 0]}}
    return prompt


@pytest.fixture(scope="module")
def first_run(comfy_server: ComfyServer) -> Result:
    """The smoke line, run once."""
    return ComfyClient(comfy_server.url).run(SMOKE)


@pytest.fixture
def stop(comfy_client: ComfyClient) -> Callable[..., int]:
    """Run a prompt and cancel it when `node` has done `step` steps.

    Returns what `count` says right after the server has taken note.
    """

    def run(prompt: Prompt, node: str, step: int, count: Callable[[], int]) -> int:
        counted: list[int] = []

        def watch(event: Event) -> None:
            if event.node == node and event.value >= step and not counted:
                comfy_client.interrupt("")  # an empty id is the prompt that runs
                counted.append(count())

        with pytest.raises(Interrupted):
            comfy_client.run(prompt, on_event=watch)
        return counted[0]

    return run


def records(server: ComfyServer, name: str) -> dict[Path, int]:
    """Record files of a dataset, with the time each was written."""
    folder = server.base / "datasets" / "accvideo" / name / "records"
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/*.safetensors")}


def steps_trained(server: ComfyServer, run: str) -> list[int]:
    file = server.output / "accvideo" / "runs" / run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1]  # the last one may be half written
    return [json.loads(line)["step"] for line in lines]


def test_line_leaves_everything_it_promises(first_run: Result, comfy_server: ComfyServer) -> None:
    folder = comfy_server.output / "accvideo" / "smoke_line"
    names = {path.name for path in folder.iterdir()}
    assert {"report.json", "contact_sheet.png", "loss_curves.png"} <= names
    report = json.loads((folder / "report.json").read_text())
    contenders = {row["name"] for row in report["rows"]}
    assert {"teacher@50", "teacher@5", "student@5", "tuned@5"} <= contenders
    videos = [name for name in names if name.endswith(".mp4")]
    assert len(videos) >= 4
    for name in videos:
        frames, fps = read_video(folder / name)
        assert len(frames) == 17 and fps == 8
    assert len(records(comfy_server, "smoke_line")) == RECORDS


def test_saved_student_knows_its_key_times(first_run: Result, comfy_server: ComfyServer) -> None:
    info = read_student_info(comfy_server.base / "models" / "accvideo" / "smoke_line.safetensors")
    assert [round(t, 4) for t in info.key_times] == [1, 0.9655, 0.913, 0.8235, 0.6364, 0]
    assert info.steps_trained == 12 and info.guidance == 6


def test_nodes_show_their_results(first_run: Result, comfy_client: ComfyClient) -> None:
    shown = first_run.outputs[COMPARE]
    names = [image["filename"] for image in shown["images"]]
    assert names == ["contact_sheet.png", "loss_curves.png"]
    assert comfy_client.view(shown["images"][0]).startswith(b"\x89PNG")
    assert "student@5" in shown["text"][0]
    (video,) = first_run.outputs["14"]["images"]
    assert video["filename"].endswith(".mp4")


def test_second_run_comes_from_the_cache(first_run: Result, comfy_client: ComfyClient) -> None:
    again = comfy_client.run(SMOKE)
    assert set(again.cached) == set(SMOKE)
    assert again.outputs == first_run.outputs


def test_progress_is_told_in_words_and_pictures(comfy_client: ComfyClient) -> None:
    events: list[Event] = []
    prompt = part(RECORD, n4={"dataset": "told", **QUICK})
    result = comfy_client.run(prompt, on_event=events.append)
    totals = {event.total for event in events if event.node == RECORD and event.value > 1}
    assert totals == {RECORDS / 4 * 20}
    assert any("record" in event.text and "left" in event.text for event in events)
    assert result.previews >= 1


def test_saved_results_are_used_again(first_run: Result, comfy_client: ComfyClient) -> None:
    """The workflow tiny_reuse on what the smoke line left, with its training shortened."""
    prompt: Prompt = json.loads((ROOT / "workflows" / "api" / "tiny_reuse.json").read_text())
    for entry in prompt.values():
        if entry["class_type"] == "AccVideoLoadStudent":
            entry["inputs"]["student"] = "smoke_line.safetensors"
        if entry["class_type"] == "AccVideoLoadDataset":
            entry["inputs"]["dataset"] = "smoke_line"
        if entry["class_type"] == "AccVideoDistill":
            entry["inputs"] |= {"train_steps": 2, "batch_size": 2, "rank": 4}
    result = comfy_client.run(prompt)
    assert "Saved tiny_reuse_2_steps.safetensors" in json.dumps(result.outputs)


def test_one_clip_is_decoded_and_saved_as_video(
    first_run: Result, comfy_client: ComfyClient, comfy_server: ComfyServer
) -> None:
    prompt = part("11", n11={"index": 1, "fps": 12.0})
    prompt["99"] = {
        "class_type": "SaveVideo",
        "inputs": {
            "video": ["11", 1], "filename_prefix": "one", "format": "auto", "codec": "auto",
        },
    }  # fmt: skip
    (video,) = comfy_client.run(prompt).outputs["99"]["images"]
    frames, fps = read_video(comfy_server.output / video["filename"])
    assert len(frames) == 17 and fps == 12


def test_clip_that_is_not_there_is_refused(first_run: Result, comfy_client: ComfyClient) -> None:
    assert "the latent holds 2 clips" in refusal(comfy_client, part("11", n11={"index": 2}))


def test_losses_feed_the_loss_graph_of_comfyui(
    first_run: Result, comfy_client: ComfyClient
) -> None:
    prompt = part(DISTILL)
    inputs = {"loss": [DISTILL, 1], "filename_prefix": "loss"}
    prompt["99"] = {"class_type": "LossGraphNode", "inputs": inputs}
    assert comfy_client.run(prompt).outputs["99"]["images"]


def test_conditioning_of_several_nodes_is_joined_by_comfyui(comfy_client: ComfyClient) -> None:
    """Entries of a combined CONDITIONING are prompts, here a red one and a blue one."""
    prompt = {"1": SMOKE["1"]}
    for node, colour in (("2", "red"), ("3", "blue")):
        text = f"a {colour} circle growing on a plain background"
        inputs = {"model": ["1", 0], "prompts": text}
        prompt[node] = {"class_type": "AccVideoEncodePrompts", "inputs": inputs}
    joined = {"conditioning_1": ["2", 0], "conditioning_2": ["3", 0]}
    prompt["4"] = {"class_type": "ConditioningCombine", "inputs": joined}
    sample = {**SMOKE["10"]["inputs"], "model": ["1", 0], "conditioning": ["4", 0], "steps": 2}
    prompt["5"] = {"class_type": "AccVideoSample", "inputs": sample}
    decode = {"model": ["1", 0], "latent": ["5", 0], "index": -1, "fps": 8.0}
    prompt["6"] = {"class_type": "AccVideoDecode", "inputs": decode}
    prompt["7"] = {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}}
    assert len(comfy_client.run(prompt).outputs["7"]["images"]) == 2 * 17


def test_recording_goes_on_after_a_cancel(
    stop: Callable[..., int], comfy_client: ComfyClient, comfy_server: ComfyServer
) -> None:
    prompt = part(RECORD, n4={"dataset": "stopped", **QUICK})
    # Two batches of 4 records, 20 steps each: step 23 is in the second.
    stop(prompt, RECORD, 23, lambda: 0)
    kept = records(comfy_server, "stopped")
    assert len(kept) == 4
    comfy_client.run(prompt)
    whole = records(comfy_server, "stopped")
    assert len(whole) == RECORDS
    assert {path: whole[path] for path in kept} == kept, "finished records were written again"
    comfy_client.run(part(RECORD, n4={"dataset": "unbroken", **QUICK}))
    contents = {path.name: path.read_bytes() for path in whole}
    assert {p.name: p.read_bytes() for p in records(comfy_server, "unbroken")} == contents


def test_training_stops_at_the_next_step_and_goes_on(
    first_run: Result, stop: Callable[..., int], comfy_server: ComfyServer
) -> None:
    prompt = part(DISTILL, n5={"run": "stopped", "train_steps": 400})

    def steps() -> int:
        return len(steps_trained(comfy_server, "stopped"))

    seen = stop(prompt, DISTILL, 2, steps)
    done = steps()
    assert done <= seen + 1, "the update at work when Cancel came may end, no other may begin"
    folder = comfy_server.output / "accvideo" / "runs" / "stopped" / "checkpoints"
    assert any(int(path.stem) == done for path in folder.iterdir())
    stop(prompt, DISTILL, done + 2, steps)
    every = steps_trained(comfy_server, "stopped")
    assert every == list(range(1, len(every) + 1)) and len(every) >= done + 2


def test_cancelled_training_ends_where_an_unbroken_one_does(
    first_run: Result,
    stop: Callable[..., int],
    comfy_client: ComfyClient,
    comfy_server: ComfyServer,
) -> None:
    stop(part(DISTILL, n5={"run": "resumed", "train_steps": 20}), DISTILL, 3, lambda: 0)
    losses, weights = [], []
    for run in ("resumed", "whole"):
        comfy_client.run(part(DISTILL, n5={"run": run, "train_steps": 20}))
        folder = comfy_server.output / "accvideo" / "runs" / run
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        weights.append(load_file(folder / "checkpoints" / "00000020.safetensors"))
    assert len(losses[0]) == 20 and losses[0] == losses[1]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_deleted_dataset_is_recorded_again(
    comfy_client: ComfyClient, comfy_server: ComfyServer
) -> None:
    prompt = part(RECORD, n4={"dataset": "deleted", **QUICK})
    comfy_client.run(prompt)
    shutil.rmtree(comfy_server.base / "datasets" / "accvideo" / "deleted")
    comfy_client.run(prompt)
    assert len(records(comfy_server, "deleted")) == RECORDS


@pytest.mark.parametrize("name", EVERYWHERE)
def test_hostile_dataset_name_is_refused(
    comfy_client: ComfyClient, comfy_server: ComfyServer, name: str
) -> None:
    before = sorted(comfy_server.base.parent.rglob("*"))
    with pytest.raises(PromptRejected, match="dataset - dataset .* use a plain name"):
        comfy_client.run(part(RECORD, n4={"dataset": name}))
    assert sorted(comfy_server.base.parent.rglob("*")) == before


@pytest.fixture
def linked_out(comfy_server: ComfyServer, tmp_path: Path) -> Iterator[str]:
    """Name of a link in the datasets folder that leads out of it."""
    link = comfy_server.base / "datasets" / "accvideo" / "linked"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path, target_is_directory=True)
    yield link.name
    link.unlink()


def test_link_out_of_the_datasets_is_refused(
    comfy_client: ComfyClient, linked_out: str, tmp_path: Path
) -> None:
    with pytest.raises(PromptRejected, match="leads out of"):
        comfy_client.run(part(RECORD, n4={"dataset": linked_out}))
    assert list(tmp_path.iterdir()) == []


def test_hostile_name_over_a_link_is_refused_when_it_arrives(comfy_client: ComfyClient) -> None:
    """Validation does not know what a linked text will be; the node itself refuses it."""
    prompt = part(RECORD, n4={"dataset": ["98", 0]})
    prompt["98"] = {"class_type": "PrimitiveString", "inputs": {"value": "../../out"}}
    with pytest.raises(NodeFailed, match="use a plain name") as caught:
        comfy_client.run(prompt)
    assert caught.value.node_id == RECORD and "\n" not in caught.value.node_message


@pytest.mark.parametrize(
    ("until", "node", "field"),
    [(DISTILL, "n5", "run"), (TUNE, "n6", "run"), (COMPARE, "n17", "name")],
)
def test_hostile_names_of_other_nodes_are_refused(
    comfy_client: ComfyClient, until: str, node: str, field: str
) -> None:
    with pytest.raises(PromptRejected, match="use a plain name"):
        comfy_client.run(part(until, **{node: {field: "../out"}}))


def test_hostile_student_name_is_refused(comfy_client: ComfyClient) -> None:
    prompt = copy.deepcopy(SMOKE)
    prompt[SAVE]["inputs"]["name"] = "../../custom_nodes/evil"
    with pytest.raises(PromptRejected, match="student .* use a plain name"):
        comfy_client.run(prompt)


def refusal(client: ComfyClient, prompt: Prompt) -> str:
    """The one sentence with which a node refuses."""
    with pytest.raises(NodeFailed) as caught:
        client.run(prompt)
    assert caught.value.kind.endswith("AccVideoError")
    assert "\n" not in caught.value.node_message
    return caught.value.node_message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 16}, "16 frames do not fit this model"),
        ({"width": 36}, "width 36 is not a multiple of 8; use 32 or 40"),
        ({"keep": 7}, "7"),
    ],
)
def test_impossible_recording_is_refused(
    comfy_client: ComfyClient, comfy_server: ComfyServer, changes: dict[str, Any], message: str
) -> None:
    assert message in refusal(comfy_client, part(RECORD, n4={"dataset": "impossible", **changes}))
    assert not (comfy_server.base / "datasets" / "accvideo" / "impossible").exists()


def test_other_settings_for_a_dataset_are_refused(
    first_run: Result, comfy_client: ComfyClient, comfy_server: ComfyServer
) -> None:
    before = records(comfy_server, "smoke_line")
    assert "seed 5 instead of 0" in refusal(comfy_client, part(RECORD, n4={"seed": 5}))
    assert records(comfy_server, "smoke_line") == before


def test_blank_prompts_are_refused(comfy_client: ComfyClient) -> None:
    assert "no prompts were given" in refusal(comfy_client, part("3", n3={"prompts": " \n "}))


def test_steps_that_do_not_divide_are_refused(first_run: Result, comfy_client: ComfyClient) -> None:
    prompt = part(DISTILL, n5={"student_steps": 3, "run": "three"})
    assert "3 student steps do not divide" in refusal(comfy_client, prompt)


def test_unknown_teacher_is_refused(comfy_client: ComfyClient) -> None:
    with pytest.raises(PromptRejected, match="there is no teacher '../x'; put a diffusers"):
        comfy_client.run(part("3", n1={"teacher": "../x"}))


def test_truncated_teacher_is_refused(comfy_client: ComfyClient, comfy_server: ComfyServer) -> None:
    folder = comfy_server.base / "models" / "diffusers" / "truncated"
    shutil.copytree(embedded_teacher_path(), folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    message = refusal(comfy_client, part("3", n1={"teacher": "truncated"}))
    assert "damaged or cut short" in message and weights.name in message


def test_dataset_of_another_teacher_is_refused(
    first_run: Result, comfy_client: ComfyClient, comfy_server: ComfyServer
) -> None:
    folder = comfy_server.base / "models" / "diffusers" / "other"
    shutil.copytree(embedded_teacher_path(), folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    changed = {name: x + torch.ones_like(x) * 0.01 for name, x in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    prompt: Prompt = {
        "1": {"class_type": "AccVideoLoadTeacher", "inputs": {"teacher": "other", "dtype": "auto"}},
        "4": {"class_type": "AccVideoLoadDataset", "inputs": {"dataset": "smoke_line"}},
        DISTILL: SMOKE[DISTILL],
        "99": {"class_type": "PreviewAny", "inputs": {"source": [DISTILL, 0]}},
    }
    assert "teacher" in refusal(comfy_client, prompt)

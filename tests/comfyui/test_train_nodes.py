"""The training nodes in a real server: more steps, stock nodes, settings, the route to a run."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from scripts.comfyui.client import ComfyClient, Event, NodeFailed, Prompt, PromptRejected
from scripts.comfyui.server import ComfyServer
from tests.comfyui.stage import node

DISTILL, TUNE = "5", "6"
STOCK = {
    "90": node("LossGraphNode", loss=[DISTILL, 1], filename_prefix="curve"),
    "91": node("SaveLoRA", lora=[DISTILL, 2], prefix="loras/trained"),
}


def training(run: str, **inputs: Any) -> Prompt:
    """A small dataset of the embedded teacher, and a two-step student of it."""
    usual = {"preset": "tiny-trajectory", "student_type": "preset", "train_steps": 4}
    return {
        "1": node("AccVideoLoadTeacher", teacher="tiny (embedded)", dtype="auto"),
        "2": node("AccVideoTinyPrompts", count=4, seed=0),
        "3": node("AccVideoEncodePrompts", model=["1", 0], prompts=["2", 0]),
        "4": node(
            "AccVideoRecordTrajectories",
            **{"model": ["1", 0], "conditioning": ["3", 0], "dataset": "train_nodes"},
            **{"width": 32, "height": 32, "frames": 17, "samples_per_prompt": 1, "seed": 0},
            **{"teacher_steps": 4, "keep": 2, "batch_size": 4},
        ),
        DISTILL: node(
            "AccVideoDistill",
            **{"model": ["1", 0], "dataset": ["4", 0], "run": run},
            **{"student_steps": 2, "batch_size": 2, "learning_rate": 0.0, "rank": 4, "seed": 0},
            **{**usual, **inputs},
        ),
        "99": node("PreviewAny", source=[DISTILL, 0]),
    }


def tuning(run: str, settings: dict[str, Any]) -> Prompt:
    """The same, and its adversarial tuning."""
    tune = node(
        "AccVideoAdversarialTune",
        **{"model": ["1", 0], "dataset": ["4", 0], "student": [DISTILL, 0], "run": run},
        **{"preset": "tiny-adversarial", "train_steps": 2, "batch_size": 2, "seed": 0},
        **{"learning_rate": 0.0, "adversarial_weight": 0.1, "gan_loss": "logistic"},
        **{"head_learning_rate": 0.0, "settings": json.dumps(settings)},
    )
    return {**training("stock"), TUNE: tune, "99": node("PreviewAny", source=[TUNE, 0])}


def folder(server: ComfyServer, run: str) -> Path:
    return server.output / "accvideo" / "runs" / run


def rows(server: ComfyServer, run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder(server, run) / "metrics.jsonl").open()]


def ask(server: ComfyServer, name: str, **more: str) -> dict[str, Any]:
    query = urllib.parse.urlencode({"name": name, **more})
    with urllib.request.urlopen(f"{server.url}/accvideo/run?{query}", timeout=30) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def stock(comfy_server: ComfyServer) -> list[Event]:
    """A run whose losses and LoRA went to stock nodes; what was told of it."""
    events: list[Event] = []
    ComfyClient(comfy_server.url).run({**training("stock"), **STOCK}, on_event=events.append)
    return events


@pytest.mark.usefixtures("stock")
def test_stock_node_saves_the_lora_that_our_export_writes(
    comfy_server: ComfyServer, comfy_client: ComfyClient
) -> None:
    inputs = {"student": [DISTILL, 0], "overwrite": True, "name": "ours", "dtype": "bfloat16"}
    export = node("AccVideoExportStudent", layout="LoRA for ComfyUI", **inputs)
    comfy_client.run({**training("stock"), "99": export})
    (saved,) = (comfy_server.output / "loras").glob("trained*.safetensors")
    theirs, ours = load_file(saved), load_file(comfy_server.base / "models/loras/ours.safetensors")
    assert theirs.keys() == ours.keys() and all(k.startswith("diffusion_model.") for k in ours)
    assert all(torch.equal(x, ours[name]) for name, x in theirs.items())


def test_progress_tells_loss_pace_and_time_left(stock: list[Event]) -> None:
    told = [event.text for event in stock if event.node == DISTILL and event.text]
    assert told and told[-1].startswith("distill 4/4, loss 0.") and "0 s left" in told[-1]
    assert all("s/step" in text for text in told[1:])


def test_full_student_stops_only_the_nodes_that_ask_for_a_lora(
    comfy_server: ComfyServer, comfy_client: ComfyClient
) -> None:
    prompt = training("full", student_type="full", train_steps=2)
    save = node("AccVideoSaveStudent", student=[DISTILL, 0], name="full", overwrite=True)
    lora = {**STOCK["91"], "inputs": {**STOCK["91"]["inputs"], "prefix": "loras/none"}}
    with pytest.raises(NodeFailed, match="full weights and no LoRA; use Save Student") as caught:
        comfy_client.run({**prompt, "91": lora, "98": save})
    assert caught.value.node_type == "SaveLoRA"
    assert (comfy_server.base / "models" / "accvideo" / "full.safetensors").is_file()
    assert list(comfy_server.output.glob("loras/none*")) == []


def test_more_steps_go_on_with_a_finished_run(
    comfy_server: ComfyServer, comfy_client: ComfyClient
) -> None:
    constant = {"settings": '{"schedule": "constant"}'}
    for steps in (3, 6):
        comfy_client.run(training("longer", train_steps=steps, **constant))
    comfy_client.run(training("straight", train_steps=6, **constant))
    longer, straight = rows(comfy_server, "longer"), rows(comfy_server, "straight")
    assert [row["step"] for row in longer] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in longer] == [row["loss"] for row in straight]


@pytest.mark.usefixtures("stock")
def test_more_steps_are_refused_where_the_learning_rate_ends_with_them(
    comfy_client: ComfyClient,
) -> None:
    with pytest.raises(NodeFailed, match="cannot go on with 9; choose another run name"):
        comfy_client.run(training("stock", train_steps=9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "settings are not JSON"),
        ("[1]", "settings are not a JSON object; write recipe fields such as"),
        ('{"rate": 1}', "settings has no field 'rate'; its fields are name, student_steps"),
        ('{"lr": "fast"}', "settings.lr is 'fast'; it must be a number"),
    ],
)
def test_what_is_no_recipe_is_refused_before_anything_runs(
    comfy_client: ComfyClient, comfy_server: ComfyServer, settings: str, message: str
) -> None:
    with pytest.raises(PromptRejected, match=message):
        comfy_client.run(training("never", settings=settings))
    assert not folder(comfy_server, "never").exists()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"settings": '{"clip": -1}'}, "recipe.clip is -1; it must be positive"),
        ({"swap_blocks": 2}, "swap_blocks is 2, which needs gradient_checkpointing"),
        ({"best_by": "motion"}, "best_by is motion, but nothing is looked at; set validate_every"),
    ],
)
def test_impossible_recipe_is_refused_before_the_first_step(
    comfy_client: ComfyClient, comfy_server: ComfyServer, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(NodeFailed, match=message) as caught:
        comfy_client.run(training("never", **inputs))
    assert "\n" not in caught.value.node_message
    assert not folder(comfy_server, "never").exists()


def test_what_saves_memory_changes_no_loss(
    comfy_server: ComfyServer, comfy_client: ComfyClient
) -> None:
    saving = {"gradient_checkpointing": True, "swap_blocks": 1, "offload_activations": True}
    comfy_client.run(training("plain", train_steps=2))
    comfy_client.run(training("saving", train_steps=2, **saving))
    plain, saved = rows(comfy_server, "plain"), rows(comfy_server, "saving")
    assert [row["loss"] for row in saved] == pytest.approx([row["loss"] for row in plain])


def test_teacher_of_packed_weights_teaches(
    comfy_server: ComfyServer, comfy_client: ComfyClient
) -> None:
    """In fp8, whose trajectories are those of the unpacked one, so the losses are near."""
    prompt = training("packed", train_steps=2)
    prompt["1"]["inputs"]["weights"] = "fp8"
    comfy_client.run(prompt)
    comfy_client.run(training("unpacked", train_steps=2))
    packed, unpacked = rows(comfy_server, "packed"), rows(comfy_server, "unpacked")
    assert len(packed) == 2 and packed[0]["loss"] != unpacked[0]["loss"]
    assert packed[0]["loss"] == pytest.approx(unpacked[0]["loss"], rel=0.5)


@pytest.mark.usefixtures("stock")
def test_settings_reach_the_recipe_of_either_node(
    comfy_client: ComfyClient, comfy_server: ComfyServer
) -> None:
    comfy_client.run(tuning("tuned", {"clip": 0.5, "head_width": 16}))
    recipe = json.loads((folder(comfy_server, "tuned") / "config.json").read_text())["recipe"]
    assert (recipe["clip"], recipe["head_width"], recipe["adversarial"]) == (0.5, 16, True)
    assert recipe["student_steps"] == 2 and recipe["lora"]["rank"] == 4


@pytest.mark.usefixtures("stock")
def test_settings_may_not_contradict_the_student_to_start_from(comfy_client: ComfyClient) -> None:
    with pytest.raises(NodeFailed, match="student_steps, which the student to start from decides"):
        comfy_client.run(tuning("never", {"student_steps": 1}))


@pytest.mark.usefixtures("stock")
def test_route_tells_curve_and_sample_of_a_run(
    comfy_server: ComfyServer, comfy_client: ComfyClient
) -> None:
    told = ask(comfy_server, "stock")
    assert (told["run"], told["step"], told["total"]) == ("stock", 4, 4)
    losses = [[row["step"], row["trajectory"]] for row in rows(comfy_server, "stock")]
    assert told["lines"] == {"trajectory": losses}
    assert comfy_client.view(told["sample"]).startswith(b"\x89PNG")
    picture = Image.open(folder(comfy_server, "stock") / "preview.png")
    assert picture.width == 2 * picture.height, "four frames of the teacher above the student's"


def test_looks_at_fixed_clips_are_told_and_shown(
    comfy_server: ComfyServer, comfy_client: ComfyClient
) -> None:
    events: list[Event] = []
    looks = {"validate_every": 2, "best_by": "latent_mse", "settings": '{"validation_clips": 2}'}
    comfy_client.run(training("looked_at", **looks), on_event=events.append)
    run = folder(comfy_server, "looked_at")
    sheets = sorted(path.name for path in (run / "samples").glob("*.png"))
    assert sheets == ["00000000.png", "00000002.png", "00000004.png"]
    assert (run / "best.safetensors").is_file() and not (run / "preview.png").exists()
    assert any(event.text.startswith("look ") for event in events)
    told = ask(comfy_server, "looked_at")
    assert told["sample"]["filename"] == sheets[-1]
    assert comfy_client.view(told["sample"]).startswith(b"\x89PNG")
    last = (run / "validation.jsonl").read_text().splitlines()[-1]
    assert told["notes"] == json.loads(last)["notes"]


def test_looks_of_a_preset_can_be_left_out(
    comfy_server: ComfyServer, comfy_client: ComfyClient
) -> None:
    chosen = {"preset": "trajectory", "validate_every": -1, "train_steps": 1}
    comfy_client.run(training("unseen", **chosen))
    run = folder(comfy_server, "unseen")
    assert json.loads((run / "config.json").read_text())["recipe"]["validate_every"] == 0
    assert not (run / "samples").exists()


def test_route_knows_nothing_of_a_run_that_is_not_there(comfy_server: ComfyServer) -> None:
    told = ask(comfy_server, "nowhere")
    assert told["lines"] == {} and told["sample"] is None
    assert not folder(comfy_server, "nowhere").exists()


@pytest.mark.parametrize(
    "name", ["..", "../stock", "/etc", "a/b", "a\\b", "C:x", "", ".hidden", "con", "x" * 300, "a\0"]
)
def test_hostile_run_name_is_refused_by_the_route(comfy_server: ComfyServer, name: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(comfy_server, name)
    assert caught.value.code == 400
    assert "use a plain name" in json.load(caught.value)["error"]


def test_link_out_of_the_runs_is_refused_by_the_route(
    comfy_server: ComfyServer, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 42}\n')
    link = folder(comfy_server, "linked_out")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(comfy_server, link.name)
    link.unlink()
    assert caught.value.code == 400 and "leads out of" in json.load(caught.value)["error"]


def test_training_runs_without_a_client(comfy_server: ComfyServer) -> None:
    body = json.dumps({"prompt": training("headless", train_steps=2)}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{comfy_server.url}/prompt", body, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        number = json.load(answer)["prompt_id"]
    client = ComfyClient(comfy_server.url)
    while not (history := client.history(number)):
        pass
    assert history["status"]["status_str"] == "success"
    assert len(rows(comfy_server, "headless")) == 2

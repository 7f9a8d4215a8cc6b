"""Exports of the embedded teacher's student in a real server: where they lie, what reads them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from accvideo_core.export import load_student, read_student_info
from accvideo_core.latents import seeded_noise
from accvideo_core.models.loading import load_teacher
from accvideo_core.models.tiny import embedded_teacher_path
from scripts.comfyui.client import ComfyClient, NodeFailed, Prompt, PromptRejected
from scripts.comfyui.server import ROOT, ComfyServer

SMOKE: Prompt = json.loads((ROOT / "workflows" / "api" / "smoke_line.json").read_text())
DISTILL = "5"


def export(layout: str, **inputs: Any) -> Prompt:
    """The smoke line up to its student, which is exported."""
    prompt = copy.deepcopy({n: e for n, e in SMOKE.items() if int(n) <= int(DISTILL)})
    given = {"student": [DISTILL, 0], "name": "exported", "dtype": "float32", **inputs}
    given["layout"] = layout
    prompt["90"] = {"class_type": "AccVideoExportStudent", "inputs": given}
    return prompt


@pytest.fixture(scope="module")
def models(comfy_server: ComfyServer) -> Path:
    return comfy_server.base / "models"


def test_lora_lies_with_the_loras_and_knows_its_sigmas(
    comfy_client: ComfyClient, models: Path
) -> None:
    result = comfy_client.run(export("LoRA for ComfyUI"))
    file = models / "loras" / "exported.safetensors"
    assert file.name in result.outputs["90"]["text"][0]
    info = read_student_info(file)
    assert [round(t, 4) for t in info.key_times] == [1, 0.9655, 0.913, 0.8235, 0.6364, 0]


def test_files_are_numbered_unless_they_may_be_overwritten(
    comfy_client: ComfyClient, models: Path
) -> None:
    first = models / "loras" / "numbered.safetensors"
    comfy_client.run(export("LoRA for ComfyUI", name="numbered", rank=1))
    before = first.read_bytes()
    comfy_client.run(export("LoRA for ComfyUI", name="numbered", rank=2))
    assert first.read_bytes() == before
    assert (models / "loras" / "numbered_2.safetensors").is_file()
    comfy_client.run(export("LoRA for ComfyUI", name="numbered", rank=3, overwrite=True))
    assert first.read_bytes() != before


def test_rank_is_cut_and_the_error_told(comfy_client: ComfyClient, models: Path) -> None:
    text = comfy_client.run(export("LoRA for ComfyUI", name="cut", rank=2)).outputs["90"]["text"]
    assert "relative error" in text[0]
    exact = models / "loras" / "exported.safetensors"
    assert (models / "loras" / "cut.safetensors").stat().st_size < exact.stat().st_size / 2


def test_folder_is_a_whole_pipeline_and_a_teacher_of_the_students_videos(
    comfy_client: ComfyClient, models: Path
) -> None:
    comfy_client.run(export("folder for diffusers", name="whole"))
    teacher = load_teacher(embedded_teacher_path())
    merged = load_teacher(models / "diffusers" / "whole")
    student = load_student(models / "loras" / "exported.safetensors", teacher.model)
    (prompt,) = merged.encode_prompts(["a red circle moving left on a plain background"])
    x = seeded_noise((1, *merged.model.latent_spec.shape(17, 32, 32)), "export")
    with torch.no_grad():
        expected = student.velocity(x, 0.9, prompt.condition)
        plain = teacher.model.velocity(x, 0.9, prompt.condition)
        assert torch.allclose(merged.model.velocity(x, 0.9, prompt.condition), expected, atol=1e-4)
        assert not torch.allclose(plain, expected, atol=1e-3)
    assert merged.vae.decode(x).shape == (1, 17, 32, 32, 3)


def test_lora_for_diffusers_stays_out_of_comfyuis_lists(
    comfy_client: ComfyClient, comfy_server: ComfyServer
) -> None:
    comfy_client.run(export("LoRA for diffusers", name="theirs"))
    assert (comfy_server.output / "accvideo" / "export" / "theirs.safetensors").is_file()


def test_choices_that_do_not_go_together_are_refused(comfy_client: ComfyClient) -> None:
    with pytest.raises(NodeFailed, match="fp8 is for full weights in the native layout"):
        comfy_client.run(export("LoRA for ComfyUI", name="wrong", dtype="fp8"))


@pytest.mark.parametrize("name", ["..", "../out", "/tmp/out", "a/b", "", "x" * 300])
def test_hostile_name_is_refused(
    comfy_client: ComfyClient, comfy_server: ComfyServer, name: str
) -> None:
    before = sorted(comfy_server.base.parent.rglob("*.safetensors"))
    with pytest.raises(PromptRejected, match="export .* use a plain name"):
        comfy_client.run(export("LoRA for ComfyUI", name=name))
    assert sorted(comfy_server.base.parent.rglob("*.safetensors")) == before

"""The seam that counts: our students in ComfyUI's own loaders and samplers, equal to our sampler.

Tiny networks of the shapes that ComfyUI recognises, every parameter random, go through the whole
line in a real server: checkpoint in, trajectories, student, export, stock nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from accvideo_core.export import load_student
from accvideo_core.files import write_safetensors
from accvideo_core.latents import seeded_noise
from accvideo_core.models import FAMILIES
from accvideo_core.models.loading import load_teacher
from accvideo_core.sampling import sample
from scripts.comfyui.client import ComfyClient, Prompt
from scripts.comfyui.server import ComfyServer
from tests import tiny

SIZE = {"width": 64, "height": 64, "frames": 5}
LATENT = (1, 16, 2, 8, 8)
COMPLAINTS = ("lora key not loaded", "unet missing", "unet unexpected", "left over keys")


@dataclass(frozen=True)
class Case:
    """One model as ComfyUI knows it."""

    family: str
    network: Callable[[], nn.Module]
    text: tuple[int, ...]
    pooled: int | None = None


def hunyuan() -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=128,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=2,
        text_embed_dim=32,
        guidance_embeds=True,
    )


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, num_layers=2, ffn_dim=256
    )


CASES = {
    "tiny_hunyuan": Case("hunyuan_video", hunyuan, (1, 8, 32), 768),
    "tiny_wan": Case("wan_t2v", wan, (1, 512, 4096)),
}


@dataclass(frozen=True)
class Stage:
    """A model's files in the server's folders, and what the server answered."""

    name: str
    case: Case
    server: ComfyServer
    folder: Path

    def file(self, name: str) -> str:
        return str(self.folder / f"{name}.safetensors")

    @property
    def checkpoint(self) -> Path:
        return self.server.base / "models" / "diffusion_models" / f"{self.name}.safetensors"

    def lora(self) -> Path:
        return self.server.base / "models" / "loras" / f"{self.name}_lora.safetensors"

    def train(self) -> Prompt:
        """Checkpoint in, a student of two steps out."""
        return {
            "1": node("AccVideoLoadTeacher", teacher=f"{self.name}.safetensors", dtype="auto"),
            "2": node("ProbeConditioning", file=self.file("positive")),
            "3": node("ProbeConditioning", file=self.file("negative")),
            "4": node(
                "AccVideoRecordTrajectories",
                **{"model": ["1", 0], "conditioning": ["2", 0], "negative": ["3", 0]},
                **{"dataset": self.name, **SIZE, "samples_per_prompt": 4, "seed": 0},
                **{"teacher_steps": 4, "keep": 2, "batch_size": 4},
            ),
            "5": node(
                "AccVideoDistill",
                **{"model": ["1", 0], "dataset": ["4", 0], "run": self.name},
                **{"student_steps": 2, "train_steps": 10, "batch_size": 2, "rank": 4},
                **{"learning_rate": 3e-3, "preset": "trajectory", "student_type": "lora"},
                seed=0,
            ),
        }

    def stock(self, out: str, lora: Path | None, checkpoint: Path | None = None) -> Prompt:
        """ComfyUI's own loaders and sampler, with our sigmas only."""
        unet = (checkpoint or self.checkpoint).name
        model = ["20", 0] if lora is None else ["21", 0]
        graph = {
            **self.train(),
            "10": node("AccVideoSchedule", model=["5", 0], steps=0),
            "20": node("UNETLoader", unet_name=unet, weight_dtype="default"),
            "22": node("BasicGuider", model=model, conditioning=["2", 0]),
            "23": node("ProbeNoise", file=self.file("noise")),
            "24": node(
                "EmptyHunyuanLatentVideo", **{"width": 64, "height": 64, "length": 5},
                batch_size=1,
            ),
            "25": node(
                "SamplerCustomAdvanced",
                **{"noise": ["23", 0], "guider": ["22", 0], "sampler": ["10", 1]},
                **{"sigmas": ["10", 0], "latent_image": ["24", 0]},
            ),
            "26": node("ProbeSave", latent=["25", 0], file=self.file(out)),
        }  # fmt: skip
        if lora is not None:
            inputs = {"model": ["20", 0], "lora_name": lora.name, "strength_model": 1.0}
            graph["21"] = node("LoraLoaderModelOnly", **inputs)
        return graph

    def samples(self, out: str) -> Tensor:
        return load_file(self.file(out))["samples"]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture(scope="module", params=CASES)
def stage(
    request: pytest.FixtureRequest, comfy_server: ComfyServer, tmp_path_factory: Any
) -> Stage:
    """A random checkpoint under native names where ComfyUI looks for it, and its inputs."""
    case = CASES[request.param]
    made = Stage(request.param, case, comfy_server, tmp_path_factory.mktemp(request.param))
    network = case.network()
    tiny.randomise(network)
    table = FAMILIES[case.family].key_table(dict(network.config))  # type: ignore[arg-type]
    write_safetensors(made.checkpoint, table.to_native(network.state_dict()))
    for seed, name in enumerate(("positive", "negative")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {"text": torch.randn(case.text, generator=generator)}
        if case.pooled:
            tensors["pooled_output"] = torch.randn(1, case.pooled, generator=generator)
        save_file(tensors, made.file(name))
    save_file({"noise": seeded_noise(LATENT, "stock")}, made.file("noise"))
    return made


@pytest.fixture(scope="module")
def exported(stage: Stage) -> Stage:
    """The line, run once, with its student exported for ComfyUI."""
    export = {"student": ["5", 0], "dtype": "float32", "overwrite": True}
    prompt = {
        **stage.train(),
        "6": node(
            "AccVideoExportStudent", name=stage.lora().stem, layout="LoRA for ComfyUI", **export
        ),
        "7": node(
            "AccVideoExportStudent",
            name=f"{stage.name}_full",
            layout="checkpoint for ComfyUI",
            **export,
        ),
    }
    ComfyClient(stage.server.url).run(prompt)
    return stage


@pytest.fixture(scope="module")
def ours(exported: Stage) -> Tensor:
    """What our own sampler makes of the exported LoRA, in VAE space."""
    teacher = load_teacher(exported.checkpoint).model
    student = load_student(exported.lora(), teacher)
    tensors = load_file(exported.file("positive"))
    text = tensors.pop("text")
    cond = teacher.family.from_native(text, tensors, teacher.latent_spec)
    noise = load_file(exported.file("noise"))["noise"]
    x = sample(student, cond.with_guidance(student.info.guidance), noise, student.key_times)
    return teacher.latent_spec.from_model(x)


def run_stock(stage: Stage, out: str, lora: Path | None, checkpoint: Path | None = None) -> Tensor:
    """The stock graph's latents, after checking that the log has no complaint about weights."""
    before = len(stage.server.log_text())
    ComfyClient(stage.server.url).run(stage.stock(out, lora, checkpoint))
    log = stage.server.log_text()[before:]
    assert not [line for line in log.splitlines() if any(c in line for c in COMPLAINTS)]
    return stage.samples(out)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_exported_lora_gives_our_samplers_latents_in_stock_nodes(
    exported: Stage, ours: Tensor
) -> None:
    assert distance(run_stock(exported, "lora", exported.lora()), ours) < 1e-4


def test_exported_checkpoint_does_too(exported: Stage, ours: Tensor) -> None:
    full = exported.checkpoint.with_name(f"{exported.name}_full.safetensors")
    assert distance(run_stock(exported, "full", None, full), ours) < 1e-4


def test_the_student_differs_from_its_teacher_enough_to_be_told(
    exported: Stage, ours: Tensor
) -> None:
    assert distance(run_stock(exported, "base", None), ours) > 1e-2

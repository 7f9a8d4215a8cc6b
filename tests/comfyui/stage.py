"""A tiny random model of a shape that ComfyUI recognises, in a server's folders.

Graphs are API prompts: our nodes make a student of it, stock nodes sample what was exported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from accvideo_core.export import load_student
from accvideo_core.files import write_safetensors
from accvideo_core.latents import seeded_noise
from accvideo_core.models import FAMILIES
from accvideo_core.models.loading import load_teacher
from accvideo_core.sampling import sample
from scripts.comfyui.client import ComfyClient, Prompt, Result
from scripts.comfyui.server import ComfyServer
from tests import tiny

SIZE = {"width": 64, "height": 64, "frames": 5}
LATENT = (1, 16, 2, 8, 8)
COMPLAINTS = ("lora key not loaded", "unet missing", "unet unexpected", "left over keys")


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to the norm of `b`."""
    return float((a - b).norm() / b.norm())


@dataclass(frozen=True)
class Case:
    """One model as ComfyUI knows it."""

    family: str
    network: Callable[[], nn.Module]
    condition: Callable[[torch.Generator], dict[str, Tensor]]
    """What text encoders (and image nodes) put into CONDITIONING; "text" is its tensor."""
    experts: int = 1
    rescale: float = 1.0
    """ComfyUI's latent scale over ours, where it goes by a size that a tiny model has not."""
    tolerance: float = 1e-4
    """Relative distance between ComfyUI's latents and ours that rounding explains."""


@dataclass(frozen=True)
class Stage:
    """A model's files in the server's folders."""

    name: str
    case: Case
    server: ComfyServer
    folder: Path

    @property
    def experts(self) -> tuple[str, ...]:
        return ("",) if self.case.experts == 1 else ("_high_noise", "_low_noise")

    def file(self, name: str) -> str:
        return str(self.folder / f"{name}.safetensors")

    def checkpoint(self, expert: str = "", name: str = "") -> Path:
        folder = self.server.base / "models" / "diffusion_models"
        return folder / f"{name or self.name}{expert}.safetensors"

    def lora(self, expert: str = "") -> Path:
        return self.server.base / "models" / "loras" / f"{self.name}_lora{expert}.safetensors"

    def set_up(self) -> Stage:
        """Write checkpoints under native names, conditions and noise."""
        for seed, expert in enumerate(self.experts):
            network = self.case.network()
            tiny.randomise(network, seed)
            config = dict(network.config)  # type: ignore[arg-type]
            weights = FAMILIES[self.case.family].key_table(config).to_native(network.state_dict())
            header = {"config": json.dumps({k: x for k, x in config.items() if k[0] != "_"})}
            write_safetensors(self.checkpoint(expert), weights, header)
        for seed, name in enumerate(("positive", "negative")):
            generator = torch.Generator().manual_seed(seed)
            save_file(self.case.condition(generator), self.file(name))
        save_file({"noise": seeded_noise(LATENT, "stock")}, self.file("noise"))
        return self

    def teacher(self) -> Prompt:
        low = self.experts[1:]
        pair = {"low_noise": self.checkpoint(low[0]).name} if low else {}
        name = self.checkpoint(self.experts[0]).name
        return {"1": node("AccVideoLoadTeacher", teacher=name, dtype="auto", **pair)}

    def train(self) -> Prompt:
        """Checkpoint in, a student of two steps out (node 5)."""
        return {
            **self.teacher(),
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

    def export(self, name: str, layout: str, dtype: str = "float32") -> Result:
        """Train, or take the cached student, and export it."""
        inputs = {"student": ["5", 0], "overwrite": True, "name": name}
        prompt = {
            **self.train(),
            "6": node("AccVideoExportStudent", layout=layout, dtype=dtype, **inputs),
        }
        return ComfyClient(self.server.url).run(prompt)

    def loaders(self, loras: bool, checkpoint: str = "") -> tuple[Prompt, list[list[Any]]]:
        """Stock loaders of every expert, and the links to their models."""
        graph: Prompt = {}
        links: list[list[Any]] = []
        for index, expert in enumerate(self.experts):
            unet, lora = f"2{index}", f"3{index}"
            file = self.checkpoint(expert, checkpoint).name
            graph[unet] = node("UNETLoader", unet_name=file, weight_dtype="default")
            if loras:
                inputs = {"lora_name": self.lora(expert).name, "strength_model": 1.0}
                graph[lora] = node("LoraLoaderModelOnly", model=[unet, 0], **inputs)
            links.append([lora if loras else unet, 0])
        return graph, links

    def stock(self, out: str, loras: bool, checkpoint: str = "") -> Prompt:
        """ComfyUI's own loaders and sampler with our sigmas; two experts take one step each."""
        graph, models = self.loaders(loras, checkpoint)
        graph |= {
            **self.train(),
            "10": node("AccVideoSchedule", model=["5", 0], steps=0),
            "11": node("ProbeNoise", file=self.file("noise")),
            "12": node(
                "EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1
            ),
            "13": node("SplitSigmas", sigmas=["10", 0], step=1),
            "14": node("DisableNoise"),
        }  # fmt: skip
        latent, single = ["12", 0], len(models) == 1
        for index, model in enumerate(models):
            guider, sampler = f"4{index}", f"5{index}"
            graph[guider] = node("BasicGuider", model=model, conditioning=["2", 0])
            graph[sampler] = node(
                "SamplerCustomAdvanced",
                **{"noise": ["14" if index else "11", 0], "guider": [guider, 0]},
                **{"sampler": ["10", 1], "latent_image": latent},
                sigmas=["10", 0] if single else ["13", index],
            )
            latent = [sampler, 0]
        graph["60"] = node("ProbeSave", latent=latent, file=self.file(out))
        return graph

    def run_stock(self, out: str, loras: bool, checkpoint: str = "") -> Tensor:
        """The stock graph's latents."""
        return self.latents(self.stock(out, loras, checkpoint), out)

    def latents(self, graph: Prompt, out: str) -> Tensor:
        """What a graph leaves in `out`; the log may have no complaint about weights."""
        before = len(self.server.log_text())
        ComfyClient(self.server.url).run(graph)
        log = self.server.log_text()[before:]
        assert not [line for line in log.splitlines() if any(c in line for c in COMPLAINTS)]
        return self.case.rescale * load_file(self.file(out))["samples"]

    def ours(self) -> Tensor:
        """What our own sampler makes of the exported LoRA, in VAE space."""
        files = [self.checkpoint(expert) for expert in self.experts]
        teacher = load_teacher(files if len(files) > 1 else files[0]).model
        student = load_student(self.lora(self.experts[0]), teacher)
        tensors = load_file(self.file("positive"))
        text = tensors.pop("text")
        cond = teacher.family.from_native(text, tensors, teacher.latent_spec)
        noise = load_file(self.file("noise"))["noise"]
        x = sample(student, cond.with_guidance(student.info.guidance), noise, student.key_times)
        return teacher.latent_spec.from_model(x)

"""A Stable Video Diffusion checkpoint of ours computes in ComfyUI's classes what it does here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder
from pack_process import facts_of
from safetensors.torch import load_file
from torch import nn

from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.export import export_student
from accvideo_core.files import write_safetensors
from accvideo_core.models.frame_vae import decode_frames
from accvideo_core.models.loading import load_teacher
from accvideo_core.models.video_model import VideoModel
from tests import tiny_svd
from tests.tiny import randomise

SIGMA = 3.0
RELEASE_EPS = 1e-5
"""Of the release's norms in its residual blocks; diffusers has 1e-6 at the levels that attend."""


def deep_vae() -> AutoencoderKLTemporalDecoder:
    """With two layers to a level, as the release has; ComfyUI knows no other number."""
    levels: Any = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "block_out_channels": (32,) * 4,
    }
    module = AutoencoderKLTemporalDecoder(layers_per_block=2, latent_channels=4, **levels)
    randomise(module, 3)
    return module.eval().requires_grad_(False)


def changed_student(teacher: VideoModel) -> Student:
    info = StudentInfo(
        family="svd",
        base=teacher.fingerprint,
        key_times=(1.0, 0.0),
        guidance=None,
        lora=LoraSpec(rank=3),
        latent_spec=teacher.latent_spec,
        frames=3,
        height=64,
        width=64,
    )
    student = Student.create(teacher, info)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in student.trainable().values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return student


def write_case(folder: Path) -> None:
    """A student's whole checkpoint, with questions and our answers."""
    pipeline = tiny_svd.build_pipeline()
    pipeline.vae = vae = deep_vae()
    pipeline.save_pretrained(folder / "teacher")
    student = changed_student(load_teacher(folder / "teacher").model)
    whole = folder / "whole.safetensors"
    export_student(student, whole, what="full", dtype="fp32", pipeline=folder / "teacher")
    for name, module in student.model.module.named_modules():
        if isinstance(module, nn.GroupNorm) and "res_block" in name:
            module.eps = RELEASE_EPS
    x, cond = tiny_svd.latents(1), tiny_svd.condition(1)
    assert cond.image is not None and cond.micro is not None
    t = SIGMA / (1 + SIGMA)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        denoised = x - t * student.velocity(x, t, cond)
        decoded = decode_frames(vae, x)
        mode = vae.encode(pixels, return_dict=False)[0].mode()
    answers = {
        "x": x[0].transpose(0, 1) * (1 + SIGMA),
        "sigma": torch.full((3,), SIGMA),
        "image": cond.image[0, :, 0].expand(3, -1, -1, -1),
        "text": cond.text.expand(3, -1, -1),
        "micro": cond.micro[0],
        "denoised": denoised[0].transpose(0, 1),
        "latents": x[0].transpose(0, 1),
        "decoded": decoded[0].transpose(0, 1),
        "pixels": pixels,
        "mode": mode,
    }
    write_safetensors(folder / "case.safetensors", {**load_file(whole), **answers})


@pytest.fixture(scope="module")
def facts(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("svd")
    write_case(folder)
    return facts_of("svd_script.py", comfyui_path, folder)


def test_network_computes_the_same(facts: dict[str, Any]) -> None:
    assert facts["unet"] < 1e-4


def test_vae_encodes_and_decodes_the_same(facts: dict[str, Any]) -> None:
    encoded, decoded = facts["vae"]
    assert encoded < 1e-4 and decoded < 1e-4

"""The seam that counts: our students in ComfyUI's own loaders and samplers, equal to our sampler.

Tiny networks of the shapes that ComfyUI recognises, every parameter random, go through the whole
line in a real server: checkpoint in, trajectories, student, export, stock nodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scripts.comfyui.client import NodeFailed
from scripts.comfyui.server import ComfyServer
from tests.comfyui.stage import LATENT, Case, Stage, distance, node


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


def hunyuan_text(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "text": torch.randn(1, 8, 32, generator=generator),
        "pooled_output": torch.randn(1, 768, generator=generator),
    }


def wan(in_channels: int = 16) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        in_channels=in_channels,
        num_attention_heads=1,
        attention_head_dim=128,
        num_layers=2,
        ffn_dim=256,
    )


def wan_text(generator: torch.Generator) -> dict[str, Tensor]:
    return {"text": torch.randn(1, 512, 4096, generator=generator)}


def wan_image(generator: torch.Generator) -> dict[str, Tensor]:
    """As WanImageToVideo leaves it: the mask is 0 where a frame is given."""
    mask = torch.ones(1, 1, *LATENT[2:])
    mask[:, :, 0] = 0
    latents = torch.randn(LATENT, generator=generator)
    return {**wan_text(generator), "concat_latent_image": latents, "concat_mask": mask}


def cogvideox() -> nn.Module:
    """Version 1.5: ComfyUI 0.30 places the tokens of version 1.0 otherwise than its release."""
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        num_layers=2,
        text_embed_dim=32,
        time_embed_dim=64,
        use_rotary_positional_embeddings=True,
        patch_size_t=2,
        patch_bias=False,
        sample_height=96,
        sample_width=170,
        sample_frames=81,
    )


def cogvideox_text(generator: torch.Generator) -> dict[str, Tensor]:
    return {"text": torch.randn(1, 226, 32, generator=generator)}


CASES = {
    "tiny_hunyuan": Case("hunyuan_video", hunyuan, hunyuan_text),
    "tiny_wan": Case("wan_t2v", wan, wan_text),
    "tiny_wan22_i2v": Case("wan22_i2v", lambda: wan(36), wan_image, experts=2),
    # ComfyUI's first sigma of CogVideoX is 4519, which is not quite noise alone.
    "tiny_cogvideox": Case(
        "cogvideox_1_5", cogvideox, cogvideox_text, rescale=1.15258426 / 0.7, tolerance=5e-4
    ),
}


@pytest.fixture(scope="module", params=CASES)
def stage(
    request: pytest.FixtureRequest, comfy_server: ComfyServer, tmp_path_factory: Any
) -> Stage:
    """A random model whose student was exported as a LoRA for ComfyUI."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    made = Stage(request.param, CASES[request.param], comfy_server, folder).set_up()
    made.export(f"{made.name}_lora", "LoRA for ComfyUI")
    return made


@pytest.fixture(scope="module")
def ours(stage: Stage) -> Tensor:
    return stage.ours()


def test_exported_lora_gives_our_samplers_latents_in_stock_nodes(
    stage: Stage, ours: Tensor
) -> None:
    assert distance(stage.run_stock("lora", loras=True), ours) < stage.case.tolerance


def test_exported_checkpoint_does_too(stage: Stage, ours: Tensor) -> None:
    stage.export(f"{stage.name}_full", "checkpoint for ComfyUI")
    latents = stage.run_stock("full", loras=False, checkpoint=f"{stage.name}_full")
    assert distance(latents, ours) < stage.case.tolerance


def test_fp8_checkpoint_is_near_and_loads_without_a_complaint(stage: Stage, ours: Tensor) -> None:
    stage.export(f"{stage.name}_fp8", "checkpoint for ComfyUI", dtype="fp8")
    latents = stage.run_stock("fp8", loras=False, checkpoint=f"{stage.name}_fp8")
    assert 1e-6 < distance(latents, ours) < 0.2


def test_stock_loader_takes_the_lora_from_the_socket(stage: Stage, ours: Tensor) -> None:
    """In bfloat16, so to a few hundredths of what the LoRA does."""
    graph = stage.stock("socket", loras=True)
    inputs = {"lora": ["5", 2], "strength_model": 1.0, "bypass": False}
    graph["30"] = node("LoraModelLoader", model=["20", 0], **inputs)
    if stage.case.experts > 1:
        with pytest.raises(NodeFailed, match="two experts and so two LoRAs; use Export Student"):
            stage.latents(graph, "socket")
        return
    effect = distance(stage.run_stock("base", loras=False), ours)
    assert distance(stage.latents(graph, "socket"), ours) < 0.05 * effect


def test_the_student_differs_from_its_teacher_enough_to_be_told(stage: Stage, ours: Tensor) -> None:
    assert distance(stage.run_stock("base", loras=False), ours) > 1e-2

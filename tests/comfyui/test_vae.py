"""Our LATENT in ComfyUI's VAE nodes: the frames that our own decoder makes, and a video."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from accvideo_core.models import FAMILIES
from accvideo_core.models.vae import VideoVAE
from accvideo_core.models.vae_file import load_vae
from accvideo_core.video import read_video
from scripts.comfyui.client import ComfyClient, Prompt
from scripts.comfyui.server import ComfyServer
from tests.comfyui.stage import SIZE, Stage, node
from tests.comfyui.test_native import CASES

SCRIPT = Path(__file__).with_name("wan_vae_script.py")
TILED = {"tile_size": 64, "overlap": 0, "temporal_size": 64, "temporal_overlap": 4}


@pytest.fixture(scope="module")
def graph(
    comfy_server: ComfyServer, comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Prompt, Path]:
    """A random Wan sampled by our node and a random VAE of its kind; the file of the latents."""
    stage = Stage("vae_wan", CASES["tiny_wan"], comfy_server, tmp_path_factory.mktemp("vae"))
    stage.set_up()
    vae = comfy_server.base / "models" / "vae" / "tiny_wan_vae.safetensors"
    subprocess.run([sys.executable, str(SCRIPT), str(comfyui_path), str(vae)], check=True)
    sample = {**SIZE, "seed": 0, "steps": 2, "batch_size": 1, "cfg": 1.0}
    latents = Path(stage.file("latents"))
    return {
        **stage.teacher(),
        "2": node("ProbeConditioning", file=stage.file("positive")),
        "3": node("AccVideoSample", model=["1", 0], conditioning=["2", 0], **sample),
        "4": node("VAELoader", vae_name=vae.name),
        "5": node("ProbeSave", latent=["3", 0], file=str(latents)),
    }, latents


@pytest.mark.parametrize(("decoder", "options"), [("VAEDecode", {}), ("VAEDecodeTiled", TILED)])
def test_stock_decoders_make_our_decoders_frames(
    decoder: str, options: dict[str, Any], graph: tuple[Prompt, Path], comfy_server: ComfyServer
) -> None:
    prompt, latents = graph
    save = {"images": ["6", 0], "filename_prefix": decoder}
    prompt = {
        **prompt,
        "6": node(decoder, samples=["3", 0], vae=["4", 0], **options),
        "7": node("SaveImage", **save),
    }
    shown = ComfyClient(comfy_server.url).run(prompt).outputs["7"]["images"]
    files = [comfy_server.output / image["filename"] for image in shown]
    stock = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])
    spec = FAMILIES["wan_t2v"].latent_spec({}, {})
    module = load_vae(comfy_server.base / "models" / "vae" / "tiny_wan_vae.safetensors", "cpu")
    ours = VideoVAE(module, spec).decode(spec.to_model(load_file(latents)["samples"]))[0]
    assert stock.shape == ours.shape == (5, 64, 64, 3)
    # Pictures have 8 bits, which ComfyUI cuts where we round.
    assert (stock / 255 - ours).abs().max() < 1.5 / 255
    assert ours.std() > 0.05


def test_stock_nodes_write_our_video(graph: tuple[Prompt, Path], comfy_server: ComfyServer) -> None:
    video = {"filename_prefix": "wan", "format": "auto", "codec": "auto"}
    prompt = {
        **graph[0],
        "6": node("VAEDecode", samples=["3", 0], vae=["4", 0]),
        "7": node("CreateVideo", images=["6", 0], fps=8.0),
        "8": node("SaveVideo", video=["7", 0], **video),
    }
    (file,) = ComfyClient(comfy_server.url).run(prompt).outputs["8"]["images"]
    frames, fps = read_video(comfy_server.output / file["filename"])
    assert frames.shape == (5, 64, 64, 3) and fps == 8

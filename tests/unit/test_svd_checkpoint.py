"""Stable Video Diffusion in one file: read as the folder is, and written as ComfyUI reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import trained
from test_svd_images import image

from accvideo_core.distill.student import LoraSpec
from accvideo_core.errors import AccVideoError
from accvideo_core.export import export_student, load_student
from accvideo_core.files import write_safetensors
from accvideo_core.models import VideoModel, svd_checkpoint
from accvideo_core.models.keys import svd_parts
from accvideo_core.models.keys.svd import key_table
from accvideo_core.models.loading import Teacher, load_teacher
from tests import tiny, tiny_svd

HEADER = {"config": json.dumps({"num_attention_heads": tiny_svd.HEADS})}
"""The releases' heads are 64 wide; these are not, which no tensor shows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_svd.save_pipeline(tmp_path_factory.mktemp("svd") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder's parts as the releases hold them."""
    network = tiny_svd.network()
    native = key_table(network.config).to_native(network.state_dict())
    tensors = {f"model.diffusion_model.{name}": x for name, x in native.items()}
    tensors |= {name: x.make() for name, x in svd_checkpoint.others(folder).items()}
    path = tmp_path_factory.mktemp("file") / "svd.safetensors"
    write_safetensors(path, tensors, HEADER)
    return path


def same(a: Teacher, b: Teacher) -> None:
    """Both see, compute and decode alike."""
    conditions = [each.encode_image("", image(), 3).condition for each in (a, b)]
    for name, x in conditions[0].tensors().items():
        torch.testing.assert_close(conditions[1].tensors()[name], x, rtol=1e-4, atol=1e-5)
    x = tiny_svd.latents(1)
    v = [each.model.velocity(x, 0.5, conditions[0]) for each in (a, b)]
    torch.testing.assert_close(v[1], v[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.vae.decode(x), a.vae.decode(x), rtol=1e-4, atol=1e-5)


def test_a_whole_file_is_the_folder(folder: Path, checkpoint: Path):
    from_file, from_folder = load_teacher(checkpoint), load_teacher(folder)
    assert from_file.has_text_encoders and from_file.tokenizer is None
    assert from_file.model.fingerprint == from_folder.model.fingerprint
    assert from_file.model.latent_spec == from_folder.model.latent_spec
    same(from_folder, from_file)
    assert load_teacher(checkpoint, vae=folder / "vae").vae_path == folder / "vae"


def test_every_part_comes_back_bit_for_bit():
    vae = tiny_svd.vae()
    table = svd_parts.vae_table(vae.config)
    native = svd_parts.vae_to_native(vae.state_dict(), table)
    back = svd_parts.vae_from_native(native, table)
    assert back.keys() == vae.state_dict().keys()
    assert all(torch.equal(back[name], x) for name, x in vae.state_dict().items())
    shapes = {name: tuple(x.shape) for name, x in native.items()}
    assert svd_parts.vae_config(shapes).items() <= {**vae.config, "force_upcast": True}.items()
    encoder = tiny_svd.image_encoder()
    table = svd_parts.vision_table(encoder.config.to_dict())
    state = encoder.state_dict()
    native = svd_parts.vision_to_native(state, table)
    back = svd_parts.vision_from_native(native, table)
    assert all(torch.equal(back[name], x) for name, x in state.items() if name in back)
    assert {n for n in state if not n.endswith("position_ids")} == back.keys()


def test_comfyuis_encoder_without_its_last_convolution_computes_the_same():
    vae = tiny_svd.vae()
    table = svd_parts.vae_table(vae.config)
    plain = svd_parts.without_quant(svd_parts.vae_to_native(vae.state_dict(), table))
    assert not any("quant" in name for name in plain)
    other = tiny_svd.vae(seed=1)
    other.load_state_dict(svd_parts.vae_from_native(plain, table))
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, expected = (each.encode(pixels, return_dict=False)[0].mode() for each in (other, vae))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_file_that_comfyui_saved_is_read(folder: Path, checkpoint: Path, tmp_path: Path):
    # Transformers' names for the image encoder, and no encoder beside the conditioner.
    encoder = tiny_svd.image_encoder(1)
    tensors = {
        name: x for name, x in load_file(checkpoint).items() if not name.startswith("conditioner.")
    }
    tensors |= {svd_checkpoint.VISION + name: x for name, x in encoder.state_dict().items()}
    write_safetensors(tmp_path / "saved.safetensors", tensors, HEADER)
    same(load_teacher(folder), load_teacher(tmp_path / "saved.safetensors"))


def test_a_network_alone_has_no_encoders(checkpoint: Path, tmp_path: Path):
    network = {n: x for n, x in load_file(checkpoint).items() if n.startswith("model.")}
    save_file(network, tmp_path / "unet.safetensors")
    teacher = load_teacher(tmp_path / "unet.safetensors")
    assert not teacher.has_text_encoders and teacher.vae_path is None
    with pytest.raises(AccVideoError, match="holds the network alone and no text encoders"):
        teacher.encode_image("", image(), 3)


def test_what_stands_beside_the_network_is_copied_from_a_file_as_it_is(checkpoint: Path):
    held = load_file(checkpoint)
    others = svd_checkpoint.others(checkpoint)
    assert others.keys() == {name for name in held if not name.startswith("model.")}
    assert all(torch.equal(x.make(), held[name]) for name, x in others.items())


def test_a_full_export_is_a_whole_file_again(folder: Path, checkpoint: Path, tmp_path: Path):
    teacher = load_teacher(folder)
    student = trained(teacher.model, LoraSpec(rank=3))
    path = tmp_path / "fast.safetensors"
    export_student(student, path, what="full", dtype="fp32", pipeline=folder)
    assert load_file(path).keys() == load_file(checkpoint).keys()
    again = load_teacher(path)
    x, cond = tiny_svd.latents(), tiny_svd.condition()
    expected = student.velocity(x, 0.5, cond)
    torch.testing.assert_close(again.model.velocity(x, 0.5, cond), expected, rtol=1e-4, atol=1e-5)
    again.model = teacher.model
    same(teacher, again)
    loaded = load_student(path, teacher.model)
    torch.testing.assert_close(loaded.velocity(x, 0.5, cond), expected, rtol=1e-4, atol=1e-5)


def test_a_file_becomes_a_complete_folder(checkpoint: Path, tmp_path: Path):
    from diffusers import StableVideoDiffusionPipeline

    teacher = load_teacher(checkpoint)
    student = trained(teacher.model, LoraSpec(rank=3))
    out = tmp_path / "fast"
    full: dict[str, Any] = {"layout": "diffusers", "what": "full", "dtype": "fp32"}
    export_student(student, out, pipeline=checkpoint, **full)
    pipeline = StableVideoDiffusionPipeline.from_pretrained(out)
    assert pipeline.scheduler.config.sigma_max == 700.0
    again = load_teacher(out)
    again.model = teacher.model
    same(teacher, again)


def test_a_lora_has_the_names_that_comfyui_knows(tmp_path: Path):
    student = trained(tiny_svd.video_model(), LoraSpec(rank=3))
    (path,) = export_student(student, tmp_path / "lora.safetensors").files
    network = tiny_svd.network()
    native = key_table(network.config).native_layers()
    layers = {name.split(".lora_")[0].removeprefix("diffusion_model.") for name in load_file(path)}
    assert layers <= set(native)
    assert "input_blocks.1.1.time_stack.0.ff_in.net.0.proj" in layers
    assert "output_blocks.7.1.transformer_blocks.0.attn2.to_k" in layers


def test_a_file_in_the_wrong_slot_is_named(checkpoint: Path, tmp_path: Path):
    with pytest.raises(AccVideoError, match="is svd and cannot be taken for 'wan_t2v'"):
        load_teacher(checkpoint, variant="wan_t2v")
    student = trained(tiny_svd.video_model(), LoraSpec(rank=3))
    export_student(student, tmp_path / "lora.safetensors")
    other: VideoModel = tiny.video_model()
    with pytest.raises(AccVideoError, match="is a svd student, but the teacher is a hunyuan_video"):
        load_student(tmp_path / "lora.safetensors", other)
    from accvideo_core.models.lora import apply_loras

    with pytest.raises(AccVideoError, match="seems to be for Stable Video Diffusion"):
        apply_loras(other, [(tmp_path / "lora.safetensors", 1.0)])

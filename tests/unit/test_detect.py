"""detect() on the shapes of the official releases, on tiny networks and on what it must refuse."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from accvideo_core.errors import AccVideoError
from accvideo_core.models import FAMILIES
from accvideo_core.models.detect import detect, pair
from accvideo_core.models.keys import cogvideox, hunyuan_video, wan
from tests.unit.test_keys import CASES, COGVIDEOX, HUNYUAN, WAN, network

Shapes = dict[str, tuple[int, ...]]

WAN_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
COG_5B = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
OFFICIAL: dict[str, tuple[ModuleType, dict[str, Any], str, float]] = {
    "HunyuanVideo": (hunyuan_video, {}, "hunyuan_video", 12.8),
    "HunyuanVideo-I2V, concat": (
        hunyuan_video,
        {
            "in_channels": 33,
            "guidance_embeds": False,
            "image_condition_type": "latent_concat",
        },
        *("hunyuan_video_i2v", 12.8),
    ),
    "Wan2.1-T2V-1.3B": (
        wan,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        *("wan_t2v", 1.42),
    ),
    "Wan2.1-T2V-14B": (wan, WAN_14B, "wan_t2v", 14.3),
    "Wan2.1-I2V-14B": (
        wan,
        WAN_14B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        *("wan_i2v", 16.4),
    ),
    "Wan2.2-I2V-A14B, one expert": (wan, WAN_14B | {"in_channels": 36}, "wan22_i2v", 14.3),
    "Wan2.2-TI2V-5B": (
        wan,
        {
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "num_layers": 30,
            "in_channels": 48,
            "out_channels": 48,
        },
        *("wan22_ti2v", 5.0),
    ),
    "CogVideoX-2b": (cogvideox, {}, "cogvideox_2b", 1.69),
    "CogVideoX-5b": (cogvideox, COG_5B, "cogvideox_5b", 5.57),
    "CogVideoX1.5-5B": (
        cogvideox,
        COG_5B
        | {
            "patch_size_t": 2,
            "patch_bias": False,
            "sample_height": 96,
            "sample_width": 170,
            "sample_frames": 81,
        },
        *("cogvideox_1_5", 5.57),
    ),
}


def shapes_of(module: nn.Module) -> Shapes:
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


def on_meta(architecture: ModuleType, config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return network(architecture, config)


def native_shapes(architecture: ModuleType, module: nn.Module) -> Shapes:
    native = architecture.key_table(module.config).to_native(module.state_dict())
    return {name: tuple(x.shape) for name, x in native.items()}


def tiny(name: str, naming: str = "native") -> Shapes:
    architecture, config = CASES[name]
    module = on_meta(architecture, config)
    return native_shapes(architecture, module) if naming == "native" else shapes_of(module)


def settings(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("release", OFFICIAL)
def test_official_releases_are_recognised_to_the_last_shape(release):
    architecture, config, family, billions = OFFICIAL[release]
    module = on_meta(architecture, config)
    for naming, shapes in (
        ("native", native_shapes(architecture, module)),
        ("diffusers", shapes_of(module)),
    ):
        found = detect(shapes)
        assert (found.family.name, found.naming) == (family, naming)
        assert found.family.transformer_class == architecture.CLASS
        assert found.family.matches(found.config)
        expected = architecture.key_table(module.config).native_layers()
        assert found.family.key_table(found.config).native_layers() == expected
        assert found.parameters == sum(x.numel() for x in module.parameters())
        assert found.parameters / 1e9 == pytest.approx(billions, rel=0.01)
        rebuilt = on_meta(architecture, found.config)
        assert shapes_of(rebuilt) == shapes_of(module)
        assert settings(rebuilt.config) == settings(module.config)


@pytest.mark.parametrize("name", [name for name in CASES if name in FAMILIES])
@pytest.mark.parametrize("naming", ["native", "diffusers"])
def test_tiny_networks_are_recognised_with_what_their_header_states(name, naming):
    architecture, config = CASES[name]
    module = on_meta(architecture, config)
    header = {"config": json.dumps(settings(module.config))}
    found = detect(tiny(name, naming), metadata=header)
    assert found.family.name == name
    assert settings(on_meta(architecture, found.config).config) == settings(module.config)


def test_prefix_spelling_and_companions_do_not_matter():
    plain = tiny("hunyuan_video")
    dressed = {f"model.diffusion_model.{name}": shape for name, shape in plain.items()}
    for name in [name for name in dressed if name.endswith("_attn_qkv.weight")]:
        spelled = name.replace("_attn_qkv", "_attn.qkv")
        dressed[spelled] = dressed.pop(name)
        dressed[spelled.replace(".weight", ".scale_weight")] = ()
    dressed |= {"model.diffusion_model.scaled_fp8": (2,), "first_stage_model.encoder.a": (3, 3)}
    assert detect(dressed) == detect(plain)


def test_positions_follow_the_official_proportions():
    for heads, dim, axes in ((2, 128, (16, 56, 56)), (5, 96, (12, 42, 42)), (2, 16, (4, 6, 6))):
        config = HUNYUAN | {"num_attention_heads": heads, "attention_head_dim": dim}
        module = on_meta(hunyuan_video, config | {"rope_axes_dim": axes})
        assert detect(shapes_of(module)).config["rope_axes_dim"] == axes


def test_header_overrides_only_what_no_tensor_shows():
    header = {"config": json.dumps({"num_layers": 99, "num_attention_heads": 2, "text_dim": 1})}
    found = detect(tiny("wan_t2v"), metadata={"config": json.dumps({"num_layers": 99})})
    assert found.config["num_layers"] == WAN["num_layers"]
    with pytest.raises(AccVideoError, match="rows"):
        detect(tiny("wan_t2v"), metadata=header)  # 2 heads of 24 are not this network
    assert detect(tiny("wan_t2v"), metadata={"config": "no json"}) == detect(tiny("wan_t2v"))


def test_token_replace_is_told_by_header_or_caller_only():
    shapes = tiny("hunyuan_video_i2v_replace")
    assert shapes == tiny("hunyuan_video")
    assert detect(shapes).family.name == "hunyuan_video"
    asked = detect(shapes, variant="hunyuan_video_i2v_replace")
    header = {"config": json.dumps({"image_condition_type": "token_replace"})}
    assert asked == detect(shapes, metadata=header)
    assert asked.config["image_condition_type"] == "token_replace"
    assert detect(shapes, metadata=header, variant="hunyuan_video") == detect(shapes)
    with pytest.raises(AccVideoError, match="cannot be taken for 'wan_t2v'"):
        detect(shapes, variant="wan_t2v")


def test_two_experts_make_a_pair():
    text, image = detect(tiny("wan_t2v")), detect(tiny("wan22_i2v"))
    assert text.family.name == "wan_t2v"
    assert pair(text, text).name == "wan22_t2v"
    assert pair(image, image).name == "wan22_i2v"
    for other in (image, detect(tiny("hunyuan_video"))):
        with pytest.raises(AccVideoError, match="make no pair"):
            pair(text, other)
    deeper = detect(shapes_of(on_meta(wan, WAN | {"num_layers": 3})))
    with pytest.raises(AccVideoError, match="differ in num_layers"):
        pair(text, deeper)


def test_family_that_is_not_built_is_named(monkeypatch):
    monkeypatch.delitem(FAMILIES, "wan_t2v")
    with pytest.raises(AccVideoError, match="wan_t2v network, which is not supported yet"):
        detect(tiny("wan_t2v"))


def test_incomplete_and_modified_networks_are_refused():
    shapes = tiny("wan_t2v")
    lacking = {name: shape for name, shape in shapes.items() if "blocks.1.ffn.0" not in name}
    with pytest.raises(AccVideoError, match="lacks 1 layers of Wan, such as 'blocks.1.ffn.0'"):
        detect(lacking)
    first = {name: shape for name, shape in shapes.items() if "head.head" not in name}
    with pytest.raises(AccVideoError, match="'head.head.weight' is missing"):
        detect(first)
    with pytest.raises(AccVideoError, match="has tensors that it has not, such as 'blocks.0.gate"):
        detect(shapes | {"blocks.0.gate.weight": (4, 4)})
    with pytest.raises(AccVideoError, match="24 rows"):
        detect(shapes | {"blocks.1.self_attn.q.weight": (25, 24)})
    with pytest.raises(AccVideoError, match="names of Wan but not its shapes"):
        detect(shapes | {"patch_embedding.weight": (24,)})
    with pytest.raises(AccVideoError, match="0 tensors"):
        detect({})


@pytest.mark.parametrize(
    ("architecture", "config", "what"),
    [
        (hunyuan_video, HUNYUAN | {"in_channels": 8}, "SkyReels"),
        (hunyuan_video, HUNYUAN | {"in_channels": 5}, "variant of HunyuanVideo"),
        (wan, WAN | {"in_channels": 48, "out_channels": 16}, "Wan Fun, control"),
        (wan, WAN | {"in_channels": 100, "out_channels": 48}, "Wan Fun, control"),
        (cogvideox, COGVIDEOX | {"in_channels": 8}, "CogVideoX image to video"),
        (cogvideox, COGVIDEOX | {"in_channels": 12}, "CogVideoX an inpainting"),
    ],
)
def test_relatives_with_other_channels_are_refused_by_name(architecture, config, what):
    module = on_meta(architecture, config)
    for shapes in (shapes_of(module), native_shapes(architecture, module)):
        with pytest.raises(AccVideoError, match=what):
            detect(shapes)


@pytest.mark.parametrize(
    ("class_name", "config", "what"),
    [
        ("WanVACETransformer3DModel", {"num_layers": 1, "vace_layers": [0]}, "Wan VACE"),
        ("HunyuanVideo15Transformer3DModel", {"num_layers": 1}, "HunyuanVideo 1.5"),
        ("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1}, "Flux"),
        ("LTXVideoTransformer3DModel", {"num_layers": 1}, "LTX-Video"),
        ("MochiTransformer3DModel", {"num_layers": 1}, "Mochi"),
        ("UNet2DConditionModel", {}, "a UNet"),
        ("AutoencoderKLWan", {}, "a VAE"),
        ("AutoencoderKLHunyuanVideo", {}, "a VAE"),
        ("AutoencoderKLCogVideoX", {}, "a VAE"),
    ],
)
def test_other_networks_of_diffusers_are_named(class_name, config, what):
    with torch.device("meta"):
        module = getattr(diffusers, class_name)(**config)
    for prefix in ("", "model.diffusion_model."):
        with pytest.raises(AccVideoError, match=what):
            detect({prefix + name: shape for name, shape in shapes_of(module).items()})


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight", "a LoRA"),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "a LoRA"),
        ("transformer.blocks.0.attn1.to_q.lora_B.default.weight", "a LoRA"),
        ("blocks.0.self_attn.q.diff_b", "a LoRA"),
        ("model.layers.0.self_attn.q_proj.weight", "a text encoder"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a text encoder"),
        ("token_embedding.weight", "a text encoder"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "an image encoder"),
        ("decoder.conv1.weight", "a VAE"),
        ("double_blocks.0.img_attn.qkv.weight, txt_in.weight", "Flux"),
        ("vision_in.proj.0.weight", "HunyuanVideo 1.5"),
        ("face_adapter.fuser_blocks.0.linear2.weight", "Wan Animate"),
        ("casual_audio_encoder.weights", "Wan S2V"),
        ("control_adapter.conv.weight", "Wan Fun control"),
        ("img_emb.emb_pos", "first-and-last-frame"),
        ("t5_yproj.weight", "Mochi"),
        ("patchify_proj.weight", "LTX-Video"),
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight", "a UNet of images"),
        (
            "model.diffusion_model.transformer.layers.0.attention.query_key_value.weight",
            "SAT framework, .*; convert it with CogVideo's",
        ),
        ("something.weight", "no HunyuanVideo, Wan, CogVideoX or Stable"),
    ],
)
def test_native_names_of_other_files_are_named(name, what):
    with pytest.raises(AccVideoError, match=what):
        detect({key: (4, 4) for key in name.split(", ")})

"""Our networks against the official ones: outputs of Tencent's, AccVideo's and Wan's own code.

`docs/parity.md` says what is compared and how the reference files are made again. Their weights are
not stored: they are noise that follows from native names, so this also holds the key tables to
account.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accvideo_core.conditioning import Condition
from accvideo_core.models import FAMILIES, VideoModel
from accvideo_core.models.detect import detect
from accvideo_core.models.experts import Experts
from scripts.parity.regenerate import Tensors, load_reference, weight

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-6
NETWORKS = ("hunyuan_video", "accvideo", "hunyuan_video_i2v", "hunyuan_video_i2v_replace")
NETWORKS += ("wan_t2v", "wan_i2v", "wan22_ti2v", "wan22_ti2v_image")
PAIRS = ("wan22_t2v", "wan22_i2v")
EXPERTS = tuple(f"{pair}_{side}" for pair in PAIRS for side in ("high", "low"))
BLOCKS = {
    "hunyuan_double": "transformer_blocks.0",
    "hunyuan_single": "single_transformer_blocks.0",
    "wan": "blocks.0",
}


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def bare_network(info: dict[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, FAMILIES[info["family"]].transformer_class)(**info["config"])


def load_weights(network: Any, info: dict[str, Any], part: str = "") -> nn.Module:
    """Random weights by native name, through the key table; none may be left over or missing.

    `part` names the module of the network that gets them, which is returned; "" is all of it.
    """
    table = FAMILIES[info["family"]].key_table(network.config)
    prefix = f"{part}." if part else ""
    state: Tensors = {}
    for native, shape in info["parameters"].items():
        value = weight(native, tuple(shape), info["seed"])
        for name, x in table.to_diffusers(native, value):
            assert name.startswith(prefix)
            state[name.removeprefix(prefix)] = x
    module = network.get_submodule(part)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def network(info: dict[str, Any]) -> nn.Module:
    return load_weights(bare_network(info), info)


def video_model(module: nn.Module, info: dict[str, Any]) -> VideoModel:
    family = FAMILIES[info["family"]]
    return VideoModel(module, family, family.latent_spec(info["config"], {}), source="official")


def condition(tensors: Tensors) -> Condition:
    names = ("text", "pooled", "image", "image_tokens", "guidance")
    given = {name: tensors[name] for name in names if name in tensors}
    return Condition(mask=tensors["mask"], **given)


def compare(model: VideoModel, tensors: Tensors, info: dict[str, Any]) -> dict[str, float]:
    """Errors of the velocity and of every block's tokens."""
    x_t, t, cond = tensors["x_t"], tensors["t"], condition(tensors)
    features = model.features(x_t, t, cond, range(info["blocks"]))
    errors = {
        f"block.{i}": error(tokens.flatten(1, 3), tensors[f"block.{i}"])
        for i, tokens in enumerate(features)
    }
    v, theirs = model.velocity(x_t, t, cond), tensors["velocity"]
    # Frames that are the image have no velocity of the network's: the official samplers drop it.
    start = info["replaced"]
    return {**errors, "velocity": error(v[:, :, start:], theirs[:, :, start:])}


@pytest.mark.parametrize("name", NETWORKS)
def test_velocity_and_features_are_the_official_networks(name: str):
    tensors, info = load_reference(DATA / f"{name}.safetensors")
    model = video_model(network(info), info)
    assert model.num_blocks == info["blocks"]
    errors = compare(model, tensors, info)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("name", PAIRS)
def test_each_expert_of_a_pair_is_the_official_network(name: str):
    sides = [load_reference(DATA / f"{name}_{side}.safetensors") for side in ("high", "low")]
    pair = Experts(*(network(info) for _, info in sides))
    for tensors, info in sides:
        errors = compare(video_model(pair, info), tensors, info)
        assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("name", [*NETWORKS, *EXPERTS])
def test_the_official_tensors_are_recognised(name: str):
    _, info = load_reference(DATA / f"{name}.safetensors")
    shapes = {native: tuple(shape) for native, shape in info["parameters"].items()}
    alike = {"hunyuan_video_i2v_replace", "wan22_t2v"}  # as text to video and as Wan 2.1
    found = detect(shapes, variant=info["family"] if info["family"] in alike else None)
    assert (found.family.name, found.naming) == (info["family"], "native")
    stated = {key: _tuple(found.config[key]) for key in info["config"]}
    assert stated == {key: _tuple(value) for key, value in info["config"].items()}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_full_width_is_the_official_block(name: str):
    tensors, info = load_reference(DATA / f"block_{name}.safetensors")
    with torch.device("meta"):  # all but the block stays without weights
        whole = bare_network(info)
    block = load_weights(whole, info, BLOCKS[name])
    run = run_wan_block if name == "wan" else run_hunyuan_block
    outputs = run(whole, block, tensors, info)
    errors = {side: error(x, tensors[f"out.{side}"]) for side, x in outputs.items()}
    assert max(errors.values()) <= TOLERANCE, errors


def run_hunyuan_block(whole: Any, block: Any, x: Tensors, info: dict[str, Any]) -> Tensors:
    """Both kinds of block take (video, text, conditioning, mask of the keys, positions)."""
    frames, height, width = info["grid"]
    tokens, valid = x["video"].shape[1], info["valid"]
    mask = torch.arange(tokens + x["text"].shape[1]) < tokens + valid
    rope = whole.rope(torch.empty(1, 16, frames, 2 * height, 2 * width))
    video, text = block(x["video"], x["text"], x["vec"], mask[None, None, None], rope)
    return {"video": video, "text": text[:, :valid]}


def run_wan_block(whole: Any, block: Any, x: Tensors, info: dict[str, Any]) -> Tensors:
    frames, height, width = info["grid"]
    config = whole.config
    rope = type(whole.rope)(config.attention_head_dim, config.patch_size, 1024)
    positions = rope(torch.empty(1, 16, frames, 2 * height, 2 * width))
    return {"video": block(x["video"], x["text"], x["time"], positions)}

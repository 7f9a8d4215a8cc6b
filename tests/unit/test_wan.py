"""The Wan families: official settings, the network, given frames, experts, features."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_wan
import torch
from torch import Tensor, nn

from accvideo_core.conditioning import Condition
from accvideo_core.errors import AccVideoError
from accvideo_core.flow import euler_states, time_grid
from accvideo_core.guidance import Cfg, Guided
from accvideo_core.models import FAMILIES, VideoModel, family_of

NAMES = tiny_wan.FAMILY_NAMES
PAIRS = ("wan22_t2v", "wan22_i2v")


class Sinusoids(nn.Module):
    """Of times in thousandths [N], in float64 as in the release (diffusers computes in float32)."""

    def forward(self, timestep: Tensor) -> Tensor:
        phases = np.outer(timestep.double().numpy(), 1e4 ** -(np.arange(16) / 16))
        return torch.from_numpy(np.hstack([np.cos(phases), np.sin(phases)])).float()


def plain(module: nn.Module, x: Tensor, timestep: Tensor, text: Tensor, tokens: Any = None):
    """diffusers' network, asked by hand."""
    exact: Any = copy.deepcopy(module)
    exact.condition_embedder.timesteps_proj = Sinusoids()
    return exact(
        hidden_states=x,
        timestep=timestep,
        encoder_hidden_states=text,
        encoder_hidden_states_image=tokens,
        return_dict=False,
    )[0]


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-6 * b.abs().max())


def padded(text: Tensor) -> Tensor:
    return nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))


# Settings -------------------------------------------------------------------------------------


def test_official_settings():
    """wan/configs/*.py and generate.py of the two releases."""
    found = {n: (f.steps, f.shift, f.shift_low, f.boundary) for n, f in FAMILIES.items()}
    assert {name: found[name] for name in NAMES} == {
        "wan_t2v": (50, 5.0, None, 0.0),
        "wan_i2v": (40, 5.0, 3.0, 0.0),
        "wan22_t2v": (40, 12.0, None, 0.875),
        "wan22_i2v": (40, 5.0, None, 0.9),
        "wan22_ti2v": (50, 5.0, None, 0.0),
    }
    cfgs = [FAMILIES[name].cfg for name in NAMES]
    assert cfgs == [Cfg(5.0), Cfg(5.0), Cfg(4.0, low=3.0), Cfg(3.5), Cfg(5.0)]
    assert FAMILIES["wan_i2v"].time_grid(size=(480, 832)) == time_grid(40, 3.0)
    assert FAMILIES["wan_i2v"].time_grid(size=(720, 1280)) == time_grid(40, 5.0)


def test_negative_prompts_are_the_releases():
    digests = {
        name: hashlib.sha256(FAMILIES[name].negative_prompt.encode()).hexdigest()[:16]
        for name in NAMES
    }
    shaky = digests.pop("wan_i2v")
    assert set(digests.values()) == {"ce96e0324e4b54ce"} and shaky == "412753d092bcf370"


def test_variants_are_told_apart_by_configuration_and_number_of_networks():
    for name in NAMES:
        family, config = FAMILIES[name], tiny_wan.network(name).config
        found = family_of(family.transformer_class, config, family.pipeline_class, family.experts)
        assert found is family


@pytest.mark.parametrize(
    "foreign", [{"in_channels": 48}, {"in_channels": 36, "image_dim": 8, "pos_embed_seq_len": 514}]
)
def test_control_and_last_frame_networks_are_refused(foreign: dict[str, Any]):
    with pytest.raises(AccVideoError, match="not supported"):
        family_of("WanTransformer3DModel", foreign)


def test_one_expert_alone_is_refused():
    config = tiny_wan.network("wan22_i2v").config
    with pytest.raises(AccVideoError, match="consists of 2 networks, but 1 was given"):
        family_of("WanTransformer3DModel", config, "WanImageToVideoPipeline")


def test_latent_scaling_is_the_vaes_or_else_the_released_vaes():
    from diffusers import AutoencoderKLWan

    for name in NAMES:
        vae, config = tiny_wan.vae(name), tiny_wan.network(name).config
        spec = FAMILIES[name].latent_spec(config, vae.config)
        assert spec.shift == tuple(vae.config.latents_mean)
        assert spec.scale == pytest.approx([1 / s for s in vae.config.latents_std])
        released = FAMILIES[name].latent_spec(config, {})
        assert (released.stride_t, released.stride_hw) == (spec.stride_t, spec.stride_hw)
        assert len(released.scale) == len(released.shift) == spec.channels
    # diffusers' defaults are the 2.1 VAE's.
    default = AutoencoderKLWan(base_dim=4, num_res_blocks=1).config
    released = FAMILIES["wan_t2v"].latent_spec({}, {})
    assert released == FAMILIES["wan_t2v"].latent_spec({}, default)


def test_sizes_that_do_not_fit_are_refused():
    small, large = (tiny_wan.video_model(n).latent_spec for n in ("wan_t2v", "wan22_ti2v"))
    assert small.shape(81, 480, 832) == (16, 21, 60, 104)
    assert large.shape(121, 704, 1280) == (48, 31, 44, 80)
    with pytest.raises(AccVideoError, match="height 720 is not a multiple of 32; use 704 or 736"):
        large.shape(121, 720, 1280)
    with pytest.raises(AccVideoError, match="80 frames do not fit.*use 77 or 81"):
        small.shape(80, 480, 832)


# The network ----------------------------------------------------------------------------------


def test_velocity_is_the_network_over_512_text_tokens():
    model, x = tiny_wan.video_model("wan_t2v"), tiny_wan.latents("wan_t2v")
    cond = tiny_wan.condition("wan_t2v")
    expected = plain(model.module, x, torch.full((2,), 0.7) * 1000, padded(cond.text))
    assert same(model.velocity(x, 0.7, cond), expected)
    stored_whole = Condition(text=padded(cond.text))
    assert torch.equal(model.velocity(x, 0.7, stored_whole), model.velocity(x, 0.7, cond))


def test_texts_of_a_batch_do_not_leak_into_each_other():
    model, x = tiny_wan.video_model("wan_t2v"), tiny_wan.latents("wan_t2v", 1)
    cond = tiny_wan.condition("wan_t2v", 1, length=4)
    longer = Condition.cat([cond, tiny_wan.condition("wan_t2v", 1, length=9)]).tensors()
    longer["text"][0, 4:] = 7.0  # what is masked may hold anything
    both = model.velocity(x.expand(2, -1, -1, -1, -1), 0.5, Condition(**longer))
    assert torch.allclose(both[:1], model.velocity(x, 0.5, cond), atol=1e-5)


def test_texts_beyond_512_tokens_are_cut():
    model, x = tiny_wan.video_model("wan_i2v"), tiny_wan.latents("wan_i2v", 1)
    cond = tiny_wan.condition("wan_i2v", 1, length=600)
    cut = replace(cond, text=cond.text[:, :512], mask=None)
    assert torch.equal(model.velocity(x, 0.5, cond), model.velocity(x, 0.5, cut))


def test_low_precision_network_sees_exact_time(tmp_path):
    from diffusers import WanTransformer3DModel

    tiny_wan.network("wan_t2v").save_pretrained(tmp_path)
    module = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert next(module.parameters()).dtype == torch.float32  # diffusers keeps some layers so
    exact = tiny_wan.video_model("wan_t2v")
    model = VideoModel(module, exact.family, exact.latent_spec)
    assert model.dtype == torch.bfloat16
    seen = []
    module.condition_embedder.timesteps_proj.register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    )
    x, cond = tiny_wan.latents("wan_t2v"), tiny_wan.condition("wan_t2v")
    with torch.no_grad():
        v = model.velocity(x, 0.9655172413793104, cond)
    assert v.dtype == torch.bfloat16 and seen[0].dtype == torch.float32
    assert seen[0][0].item() == pytest.approx(965.5172, abs=1e-3)
    assert (v - exact.velocity(x, 0.9655172413793104, cond)).abs().mean() < 0.05


def test_no_hook_stays_on_the_network():
    model, x = tiny_wan.video_model("wan_t2v"), tiny_wan.latents("wan_t2v")
    cond = tiny_wan.condition("wan_t2v")
    model.features(x, 0.5, cond, [1])
    with pytest.raises(RuntimeError):
        model.velocity(x[:, :2], 0.5, cond)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


@pytest.mark.parametrize("name", ["wan_i2v", "wan22_i2v"])
def test_image_to_video_concatenates_the_image(name: str):
    model, x, cond = tiny_wan.video_model(name), tiny_wan.latents(name), tiny_wan.condition(name)
    assert cond.image is not None
    both = torch.cat([x, cond.image], dim=1)
    time = torch.full((2,), 950.0)
    expected = plain(model.expert(0.95), both, time, padded(cond.text), cond.image_tokens)
    assert same(model.velocity(x, 0.95, cond), expected)
    for field in set(cond.tensors()) & {"image", "image_tokens"}:
        other = model.velocity(x, 0.95, replace(cond, **{field: cond.tensors()[field].flip(0)}))
        assert (other - expected).abs().max() > 1e-3


def test_conditions_that_do_not_fit_are_refused():
    def refused(name: str, reason: str, **changes: Any) -> None:
        cond = replace(tiny_wan.condition(name), **changes)
        with pytest.raises(AccVideoError, match=reason):
            tiny_wan.video_model(name).velocity(tiny_wan.latents(name), 0.95, cond)

    refused("wan_t2v", "text is 7 wide.*takes 20.*UMT5", text=torch.ones(2, 5, 7))
    refused("wan22_i2v", "has no image", image=None)
    refused("wan_i2v", "image tokens 16 wide.*are none.*clip_vision_h", image_tokens=None)
    refused("wan_i2v", "tokens 16 wide.*are 9 wide", image_tokens=torch.ones(2, 5, 9))
    refused(
        "wan22_i2v", r"\[20, 2, 4, 6\].*needs \[20, 2, 4, 4\]", image=torch.ones(2, 20, 2, 4, 6)
    )
    refused(
        "wan22_ti2v", r"\[48, 3, 4, 4\].*needs \[48, 2, 4, 4\]", image=torch.ones(2, 48, 3, 4, 4)
    )


# Given frames of the 5B model -----------------------------------------------------------------


def test_5b_model_without_image_is_text_to_video():
    model, x = tiny_wan.video_model("wan22_ti2v"), tiny_wan.latents("wan22_ti2v")
    cond = tiny_wan.condition("wan22_ti2v").without_image()
    everywhere = torch.full((2, 8), 600.0)
    expected = plain(model.module, x, everywhere, padded(cond.text))
    assert same(model.velocity(x, 0.6, cond), expected)


def test_5b_network_sees_the_image_at_time_zero():
    model, x = tiny_wan.video_model("wan22_ti2v"), tiny_wan.latents("wan22_ti2v")
    cond = tiny_wan.condition("wan22_ti2v")
    assert cond.image is not None
    seen = torch.cat([cond.image, x[:, :, 1:]], dim=2)
    times = torch.tensor([600.0, 250.0])[:, None] * torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    expected = plain(model.module, seen, times, padded(cond.text))
    v = model.velocity(x, torch.tensor([0.6, 0.25]), cond)
    assert same(v[:, :, 1:], expected[:, :, 1:])
    wanted = (x[:, :, :1] - cond.image) / torch.tensor([0.6, 0.25]).reshape(-1, 1, 1, 1, 1)
    assert torch.allclose(v[:, :, :1], wanted, atol=1e-5)


@pytest.mark.parametrize("start", ["image", "noise"])
def test_5b_model_steps_to_its_image_and_stays_there(start: str):
    model, x = tiny_wan.video_model("wan22_ti2v"), tiny_wan.latents("wan22_ti2v")
    cond = tiny_wan.condition("wan22_ti2v")
    image, noise = cond.image, x[:, :, :1]
    assert image is not None
    if start == "image":
        x = torch.cat([image, x[:, :, 1:]], dim=2)
    guided = Guided(model, tiny_wan.condition("wan22_ti2v", 1, seed=9).without_image(), Cfg(5.0))
    times = time_grid(5, 5.0)
    states = euler_states(lambda x_t, t: guided.velocity(x_t, t, cond), x, times)
    for t, state in zip(times, states, strict=True):
        expected = image if start == "image" else (1 - t) * image + t * noise
        assert torch.allclose(state[:, :, :1], expected, atol=1e-4)


def test_5b_model_at_time_zero():
    model, x = tiny_wan.video_model("wan22_ti2v"), tiny_wan.latents("wan22_ti2v")
    cond = tiny_wan.condition("wan22_ti2v")
    v = model.velocity(x, 0.0, cond)
    assert torch.isfinite(v).all() and not v[:, :, :1].any()
    assert torch.isfinite(model.features(x, 0.0, cond, [1])[0]).all()


# Experts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_experts_switch_exactly_at_the_boundary(name: str):
    model, x, cond = tiny_wan.video_model(name), tiny_wan.latents(name), tiny_wan.condition(name)
    pair: Any = model.module
    family = model.family
    below = math.nextafter(torch.tensor(family.boundary).item(), 0) - 2**-24
    for t, expert in ((1.0, pair.high), (family.boundary, pair.high), (below, pair.low)):
        alone = VideoModel(expert, replace(family, boundary=0.0), model.latent_spec)
        assert model.expert(t) is expert
        assert torch.equal(model.velocity(x, t, cond), alone.velocity(x, t, cond))
    assert not torch.allclose(
        model.velocity(x, family.boundary, cond), model.velocity(x, below, cond), atol=1e-2
    )


def test_a_batch_may_need_both_experts():
    name = "wan22_i2v"
    model, x, cond = tiny_wan.video_model(name), tiny_wan.latents(name), tiny_wan.condition(name)
    mixed = model.velocity(x, torch.tensor([0.2, 0.95]), cond)
    for row, t in enumerate((0.2, 0.95)):
        alone = model.velocity(x[row : row + 1], t, cond.select(row))
        assert torch.allclose(mixed[row : row + 1], alone, atol=1e-5)


# Features and adapters ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_features_are_what_hooks_on_the_plain_network_see(name: str):
    model, x, cond = tiny_wan.video_model(name), tiny_wan.latents(name), tiny_wan.condition(name)
    seen: dict[int, Tensor] = {}
    handles = [
        block.register_forward_hook(lambda _m, _a, out, i=i: seen.update({i: out}))
        for i, block in enumerate(model.family.blocks(model.expert(0.95)))
    ]
    model.velocity(x, 0.95, cond)
    for handle in handles:
        handle.remove()
    assert len(seen) == model.num_blocks == 3
    for index, feature in zip([2, 0], model.features(x, 0.95, cond, [2, 0]), strict=True):
        assert feature.shape == (2, 2, 2, 2, tiny_wan.WIDTH)  # B, T, h, w, D
        assert torch.equal(feature.flatten(1, 3), seen[index])


def test_tokens_lie_on_the_grid_of_the_latents():
    model, x = tiny_wan.video_model("wan_t2v"), tiny_wan.latents("wan_t2v", 1)
    changed = x.clone()
    changed[:, :, 1, 2:4, 0:2] += 1.0
    module: Any = model.module
    tokens = [
        model.family.tokens(module, module.patch_embedding(y).flatten(2).mT, tuple(y.shape))
        for y in (x, changed)
    ]
    moved = (tokens[0] - tokens[1]).abs().sum(-1)[0] > 1e-4
    assert moved.nonzero().tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("name", NAMES)
def test_lora_targets_are_the_linear_layers_of_the_blocks(name: str):
    targets = FAMILIES[name].lora_targets
    module = tiny_wan.network(name)
    linear = {n for n, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    hit = {n for n in linear if any(n.endswith(f".{target}") for target in targets)}
    assert hit == {n for n in linear if n.startswith("blocks.")}

"""VideoModel over diffusers' HunyuanVideo network: velocity, features, fingerprint, conditions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from accvideo_core.conditioning import Condition
from accvideo_core.errors import AccVideoError
from accvideo_core.models import FAMILIES, family_of
from tests import tiny

FAMILY = FAMILIES["hunyuan_video"]
SPEC = tiny.video_model().latent_spec


def plain_forward(module: nn.Module, x, timestep, cond: Condition, guidance):
    return module(
        hidden_states=x,
        timestep=timestep,
        encoder_hidden_states=cond.text,
        encoder_attention_mask=cond.full_mask(),
        pooled_projections=cond.pooled,
        guidance=guidance,
        return_dict=False,
    )[0]


def test_velocity_is_the_network_at_thousandfold_time_and_guidance():
    model, x, cond = tiny.video_model(), tiny.latents(), tiny.condition()
    for scale in (None, 3.5):
        v = model.velocity(x, 0.7, cond.with_guidance(scale))
        guidance = torch.full((2,), 1000 * (scale or 6.0))
        expected = plain_forward(model.module, x, torch.full((2,), 0.7) * 1000, cond, guidance)
        assert torch.equal(v, expected)


def test_network_without_guidance_embedding():
    model, x, cond = tiny.video_model(guidance=False), tiny.latents(), tiny.condition()
    expected = plain_forward(model.module, x, torch.full((2,), 500.0), cond, None)
    assert torch.equal(model.velocity(x, 0.5, cond.with_guidance(6.0)), expected)


def test_time_may_differ_within_a_batch():
    model, x, cond = tiny.video_model(), tiny.latents(), tiny.condition()
    mixed = model.velocity(x, torch.tensor([0.9, 0.2]), cond)
    assert torch.allclose(mixed[:1], model.velocity(x[:1], 0.9, cond.select(0)), atol=1e-5)
    assert torch.allclose(mixed[1:], model.velocity(x[1:], 0.2, cond.select(1)), atol=1e-5)


def test_padded_text_tokens_have_no_influence():
    model, x, cond = tiny.video_model(), tiny.latents(1), tiny.condition(1, length=5)
    longer = Condition.cat([cond, tiny.condition(1, length=9)]).tensors()
    longer["text"][0, 5:] = 7.0
    padded = Condition(**{name: value[:1] for name, value in longer.items()})
    batched = Condition(**longer)
    v = model.velocity(x, 0.5, cond)
    assert torch.allclose(model.velocity(x, 0.5, padded), v, atol=1e-6)
    both = model.velocity(x.expand(2, -1, -1, -1, -1), 0.5, batched)
    assert torch.allclose(both[:1], v, atol=1e-5)


def test_low_precision_network_sees_exact_time():
    model = tiny.video_model()
    low = tiny.video_model()
    low.module.to(torch.bfloat16)
    seen = []
    low.module.time_text_embed.time_proj.register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    )
    x, cond = tiny.latents(), tiny.condition()
    v = low.velocity(x, 0.9655172413793104, cond)
    assert v.dtype == torch.bfloat16 and v.shape == x.shape
    time, guidance = seen
    assert time.dtype == guidance.dtype == torch.float32
    assert time[0].item() == pytest.approx(965.5172, abs=1e-3) and guidance[0].item() == 6000.0
    assert (v - model.velocity(x, 0.9655172413793104, cond)).abs().mean() < 0.05


def test_features_are_what_hooks_on_the_plain_network_see():
    model, x, cond = tiny.video_model(), tiny.latents(), tiny.condition()
    seen: dict[int, torch.Tensor] = {}
    handles = [
        block.register_forward_hook(lambda _m, _a, out, i=i: seen.update({i: out[0]}))
        for i, block in enumerate(FAMILY.blocks(model.module))
    ]
    model.velocity(x, 0.4, cond)
    for handle in handles:
        handle.remove()
    features = model.features(x, 0.4, cond, [3, 0, 1])
    for index, feature in zip([3, 0, 1], features, strict=True):
        assert feature.shape == (2, 2, 2, 2, 32)  # B, T, h, w, D
        assert torch.equal(feature.flatten(1, 3), seen[index])


def test_feature_tokens_lie_on_the_grid_of_the_latents():
    # With the blocks bypassed a token holds its own patch only: change one patch, look where.
    model, cond = tiny.video_model(), tiny.condition(1)
    x = tiny.latents(1)
    changed = x.clone()
    changed[:, :, 1, 2:4, 0:2] += 1.0
    tokens = [
        FAMILY.tokens(model.module, (model.module.x_embedder(y), None), tuple(y.shape))
        for y in (x, changed)
    ]
    moved = (tokens[0] - tokens[1]).abs().sum(-1)[0] > 1e-4
    assert moved.nonzero().tolist() == [[1, 1, 0]]
    assert model.features(x, 0.5, cond, [0])[0].shape[1:4] == moved.shape


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_features_stop_after_the_last_block_asked_for(last: int):
    model = tiny.video_model()
    ran = []
    layers = [*FAMILY.blocks(model.module), model.module.norm_out, model.module.proj_out]
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda _m, _a, _o, i=i: ran.append(i))
    model.features(tiny.latents(), 0.5, tiny.condition(), [0, last])
    assert ran == list(range(last + 1))


def test_features_leave_no_hooks_even_when_the_network_fails():
    model = tiny.video_model()
    model.features(tiny.latents(), 0.5, tiny.condition(), [1])
    with pytest.raises(RuntimeError):
        model.features(tiny.latents()[:, :2], 0.5, tiny.condition(), [1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_to_x_t_and_not_to_the_frozen_network(checkpointing: bool):
    model, cond = tiny.video_model(), tiny.condition()
    x = tiny.latents().requires_grad_()
    expected = torch.autograd.grad(model.features(x, 0.5, cond, [2])[0].square().sum(), x)[0]
    if checkpointing:
        model.module.enable_gradient_checkpointing()
        model.module.train()
    gradient = torch.autograd.grad(model.features(x, 0.5, cond, [2])[0].square().sum(), x)[0]
    assert gradient.abs().min() > 0 and torch.allclose(gradient, expected)
    assert all(p.grad is None for p in model.module.parameters())


def test_feature_block_is_accvideos_choice():
    model = tiny.video_model()
    model.family = copy.copy(FAMILY)
    object.__setattr__(model.family, "blocks", lambda _module: [nn.Identity()] * 60)
    # Sec. 4.3 counts from 1: layer 60 for t > 0, layer 40 for t = 0.
    assert [model.feature_block(t) for t in (1.0, 0.01, 0.0)] == [59, 59, 39]


def test_feature_blocks_outside_the_network_are_refused():
    for blocks in ([4], [-1], []):
        with pytest.raises(AccVideoError, match=r"must be one or more of 0\.\.3"):
            tiny.video_model().features(tiny.latents(), 0.5, tiny.condition(), blocks)


def test_fingerprint_tells_networks_apart_but_not_precisions():
    first = tiny.video_model().fingerprint
    assert first == tiny.video_model().fingerprint != tiny.video_model(seed=1).fingerprint
    low = tiny.video_model()
    low.module.to(torch.bfloat16)
    assert low.fingerprint == first


def test_fingerprint_ignores_adapters():
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny.video_model()
    before = model.fingerprint
    config = LoraConfig(r=2, target_modules=list(FAMILY.lora_targets))
    inject_adapter_in_model(config, model.module)
    assert any("lora_A" in name for name, _ in model.module.named_parameters())
    model._fingerprint = ""
    assert model.fingerprint == before


def test_lora_targets_name_layers_of_both_kinds_of_block_and_not_the_last_projection():
    module = tiny.network()
    linear = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]

    def hits(name: str, target: str) -> bool:
        return name == target or name.endswith(f".{target}")

    for target in FAMILY.lora_targets:
        index = target.split(".")[0]
        if not index.isdigit() or int(index) < 2:
            assert any(hits(name, target) for name in linear), target
    targeted = [name for name in linear if any(hits(name, t) for t in FAMILY.lora_targets)]
    assert "single_transformer_blocks.1.proj_out" in targeted and "proj_out" not in targeted
    for kind in ("transformer_blocks.0.", "single_transformer_blocks.0."):
        inside = {n for n in linear if n.startswith(kind)}
        left_out = inside - set(targeted)
        assert all(".norm" in name for name in left_out), left_out


def test_native_conditioning():
    text, pooled = torch.randn(1, 6, 3).half(), torch.randn(1, 2)
    cond = FAMILY.from_native(text, {"pooled_output": pooled}, SPEC)
    assert torch.equal(cond.text, text.float()) and cond.full_mask().all()
    assert cond.guidance.tolist() == [6.0] and torch.equal(cond.pooled, pooled)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    extra = {"pooled_output": pooled, "attention_mask": mask, "guidance": 1.0}
    cond = FAMILY.from_native(text, extra, SPEC)
    assert torch.equal(cond.text, text[:, 2:5].float()) and cond.guidance.tolist() == [1.0]


def test_prompts_without_pooled_text_are_refused():
    with pytest.raises(AccVideoError, match="no pooled_output"):
        FAMILY.from_native(torch.ones(1, 2, 3), {}, SPEC)
    bare = Condition(torch.ones(1, 5, tiny.TEXT))
    with pytest.raises(AccVideoError, match="no pooled text embedding"):
        tiny.video_model().velocity(tiny.latents(1), 0.5, bare)


def test_families_are_found_by_the_network_class():
    assert family_of("HunyuanVideoTransformer3DModel") is FAMILY
    with pytest.raises(AccVideoError, match="'UNet' are not supported.*HunyuanVideoTransformer3D"):
        family_of("UNet")

"""CogVideoX in flow coordinates: schedule, network, positions, conditions, recording, training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.student import LoraSpec
from accvideo_core.distill.trainer import distill
from accvideo_core.errors import AccVideoError
from accvideo_core.export import load_student, save_student
from accvideo_core.flow import euler_states, flow_from_vp_v, vp_levels
from accvideo_core.guidance import guided
from accvideo_core.models import FAMILIES, family_of
from accvideo_core.models.cogvideox import ZERO_SNR_SIGMA, grid, network_time, vp_times
from accvideo_core.sampling import sample
from accvideo_core.trajectories.record import RecordSpec, record
from tests import tiny_cogvideox as tiny

NAMES = list(tiny.KINDS)
CLASS = "CogVideoXTransformer3DModel"
ROTARY = {"use_rotary_positional_embeddings": True}


@pytest.mark.parametrize("name", NAMES)
def test_times_are_those_of_the_official_schedule(name: str):
    alpha_bar = tiny.scheduler(name).alphas_cumprod
    alpha, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    times = vp_times(FAMILIES[name].shift)
    assert torch.equal(times, s / (alpha + s)) and times[-1] == 1.0
    levels = torch.stack(vp_levels(times))
    assert torch.allclose(levels, torch.stack([alpha, s]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", [1, 3, 4, 48, 50, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_official_grid_asks_the_network_at_the_official_timesteps(name: str, steps: int):
    times, scheduler = FAMILIES[name].time_grid(steps), tiny.scheduler(name)
    scheduler.set_timesteps(steps)
    assert times[0] == 1.0 and times[-1] == 0.0 and len(times) == steps + 1
    assert all(a > b for a, b in zip(times, times[1:], strict=False))
    asked = network_time(torch.tensor(times[:-1]), vp_times(FAMILIES[name].shift))
    assert asked.tolist() == scheduler.timesteps[:steps].tolist()  # the very integers


def test_between_its_steps_the_network_is_asked_at_a_fraction():
    times = vp_times(3.0).float()
    middle = network_time((times[:-1] + times[1:]) / 2, vp_times(3.0))
    assert torch.allclose(middle, torch.arange(999) + 0.5, atol=1e-2)
    dense = network_time(torch.linspace(0, 1, 4001), vp_times(3.0))
    assert (dense.diff() >= 0).all() and dense[0] == 0 and dense[-1] == 999


def test_impossible_grids_are_refused():
    for steps in (0, 1001):
        with pytest.raises(AccVideoError, match="1 to 1000 steps"):
            grid(steps, 1.0)
    with pytest.raises(AccVideoError, match="shift is 0"):
        grid(10, 0)


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
@pytest.mark.parametrize("name", NAMES)
def test_euler_in_flow_coordinates_is_ddim(name: str, steps: int):
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def network(x: torch.Tensor, index: float) -> torch.Tensor:
        return torch.tanh(x @ mix + index / 500)

    def velocity(x_t: torch.Tensor, t: float) -> torch.Tensor:
        times = torch.full((len(x_t),), t, dtype=torch.float64)
        alpha, s = vp_levels(times)
        index = network_time(times.float(), vp_times(FAMILIES[name].shift))
        v = network((alpha + s)[:, None] * x_t, float(index[0]))
        return flow_from_vp_v(x_t, v, times)

    noise = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    *_, ours = euler_states(velocity, noise, FAMILIES[name].time_grid(steps))
    scheduler, x = tiny.scheduler(name), noise
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        v = network(x, float(timestep))
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    assert torch.allclose(ours, x, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_velocity_is_noise_minus_data_of_the_networks_prediction(name: str):
    model, x_t, cond = tiny.video_model(name), tiny.latents(), tiny.condition()
    index = torch.tensor([979, 400])
    t = vp_times(FAMILIES[name].shift)[index].float()
    alpha_bar = tiny.scheduler(name).alphas_cumprod[index].reshape(2, 1, 1, 1, 1).float()
    alpha, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x = (alpha + s) * x_t
    v = model.module(
        x.transpose(1, 2),
        cond.text,
        index,
        image_rotary_emb=pipeline_rotary(model.module, x_t),
        return_dict=False,
    )[0].transpose(1, 2)
    expected = (s * x + alpha * v) - (alpha * x - s * v)
    assert torch.allclose(model.velocity(x_t, t, cond), expected, atol=1e-4)


def pipeline_rotary(module: nn.Module, x_t: torch.Tensor):
    """The positions that diffusers' own pipeline prepares, for latents in place of pixels."""
    from diffusers import CogVideoXPipeline

    if not module.config.use_rotary_positional_embeddings:
        return None
    pipeline = SimpleNamespace(vae_scale_factor_spatial=1, transformer=module)
    prepare = CogVideoXPipeline._prepare_rotary_positional_embeddings
    return prepare(pipeline, *x_t.shape[3:], x_t.shape[2], x_t.device)


@pytest.mark.parametrize("latent_size", [(60, 90), (96, 170), (90, 60), (32, 32)])
@pytest.mark.parametrize("name", NAMES[1:])
def test_positions_are_the_pipelines_at_the_releases_sizes(name: str, latent_size: tuple[int, int]):
    from accvideo_core.models.cogvideox import _rotary

    trained = (60, 90) if name == "cogvideox_5b" else (300, 300)
    config = SimpleNamespace(
        attention_head_dim=64,
        patch_size=2,
        patch_size_t=tiny.KINDS[name].get("patch_size_t"),
        sample_height=trained[0],
        sample_width=trained[1],
        use_rotary_positional_embeddings=True,
    )
    x_t = torch.empty(1, 16, 6, *latent_size)
    module: Any = SimpleNamespace(config=config)
    ours, theirs = _rotary(module, x_t), pipeline_rotary(module, x_t)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_network_in_low_precision_sees_exact_time():
    model, seen = tiny.video_model("cogvideox_5b"), []
    model.module.to(torch.bfloat16)
    model.module.time_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    t = FAMILIES["cogvideox_5b"].time_grid(50)[1]
    v = model.velocity(tiny.latents(), t, tiny.condition())
    exact = tiny.video_model("cogvideox_5b").velocity(tiny.latents(), t, tiny.condition())
    assert v.dtype == torch.bfloat16 and seen[0].dtype == torch.float32
    assert seen[0].tolist() == [979.0, 979.0]
    assert (v - exact).abs().mean() < 0.03 * exact.abs().mean()


@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_blocks_video_tokens(name: str):
    model, x, cond = tiny.video_model(name), tiny.latents(), tiny.condition()
    seen: dict[int, torch.Tensor] = {}
    blocks = model.family.blocks(model.module)
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda _m, _a, out, i=i: seen.update({i: out[0]}))
    ran: list[str] = []
    model.module.norm_final.register_forward_hook(lambda *_: ran.append("tail"))
    features = model.features(x, 0.5, cond, [2, 0])
    frames = 1 if name == "cogvideox_1_5" else 2
    for index, feature in zip([2, 0], features, strict=True):
        assert feature.shape == (2, frames, 2, 3, 32)  # B, T, h, w, D
        assert torch.equal(feature.flatten(1, 3), seen[index])
    assert not ran
    model.velocity(x, 0.5, cond)
    assert ran == ["tail"]


@pytest.mark.parametrize("name", NAMES)
def test_feature_tokens_lie_on_the_grid_of_the_latents(name: str):
    # With the blocks bypassed a token holds its own patch only: change one patch, look where.
    model, text = tiny.video_model(name), tiny.condition(1).text
    x = tiny.latents(1)
    changed = x.clone()
    changed[:, :, 1, 2:4, 4:6] += 1.0
    embed = model.module.patch_embed
    tokens = [
        model.family.tokens(
            model.module, (embed(text, y.transpose(1, 2))[:, tiny.TOKENS :], None), tuple(y.shape)
        )
        for y in (x, changed)
    ]
    moved = (tokens[0] - tokens[1]).abs().sum(-1)[0] > 1e-4
    assert moved.nonzero().tolist() == [[0 if name == "cogvideox_1_5" else 1, 1, 2]]


def test_padding_of_the_text_is_kept_and_attended_to():
    model, x, cond = tiny.video_model("cogvideox_5b"), tiny.latents(1), tiny.condition(1)
    joined = Condition.cat([Prompt.of("a", cond).condition, tiny.condition(1, seed=5)])
    assert joined.trim().text.shape[1] == tiny.TOKENS
    v = model.velocity(x, 0.5, cond)
    assert torch.equal(model.velocity(x, 0.5, joined.select(0)), v)
    last = cond.text.clone()
    last[:, -1] += 3.0
    assert (model.velocity(x, 0.5, Condition(last)) - v).abs().max() > 1e-4


def test_variants_are_told_apart_by_their_configurations():
    found = {
        "cogvideox_2b": {"in_channels": 16, "patch_size_t": None},
        "cogvideox_5b": {"in_channels": 16, "out_channels": 16, **ROTARY},
        "cogvideox_1_5": {"in_channels": 16, "patch_size_t": 2, **ROTARY},
    }
    for name, config in found.items():
        assert family_of(CLASS, config, "CogVideoXPipeline") is FAMILIES[name]
    for image in ({"in_channels": 32, **ROTARY}, {"in_channels": 32, "patch_size_t": 2, **ROTARY}):
        with pytest.raises(AccVideoError, match="CogVideoXImageToVideoPipeline is a kind"):
            family_of(CLASS, image, "CogVideoXImageToVideoPipeline")


def test_geometry_and_scale_of_the_releases():
    vae = {"temporal_compression_ratio": 4, "block_out_channels": [128, 256, 256, 512]}
    for name, scale in (("cogvideox_2b", 1.15258426), ("cogvideox_5b", 0.7)):
        spec = FAMILIES[name].latent_spec({"in_channels": 16, "patch_size": 2}, vae)
        assert spec.scale == (scale,) and spec.shape(49, 480, 720) == (16, 13, 60, 90)
        assert FAMILIES[name].latent_spec({}, {"scaling_factor": 0.5}).scale == (0.5,)
    spec = FAMILIES["cogvideox_1_5"].latent_spec({"patch_size_t": 2}, {})
    assert spec.scale == (0.7,) and spec.shape(81, 768, 1360) == (16, 22, 96, 170)
    assert spec.crop(torch.arange(22.0).reshape(1, 1, 22, 1, 1), 81)[0, 0, 0] == 1.0
    assert spec.shape(85, 768, 1360)[1] == 22


def test_stock_conditioning_keeps_all_226_tokens():
    text = torch.randn(1, 226, 8).half()
    family = FAMILIES["cogvideox_5b"]
    cond = family.from_native(text, {"pooled_output": None}, tiny.spec(family.name))
    assert torch.equal(cond.text, text.float()) and set(cond.tensors()) == {"text"}
    for tokens in (77, 300):
        with pytest.raises(AccVideoError, match=f"{tokens} text tokens.*reads 226.*cogvideox"):
            family.from_native(torch.ones(1, tokens, 8), {}, tiny.spec(family.name))


def test_sigmas_are_those_of_comfyui():
    # ComfyUI: sigma = sqrt((1 - alpha_bar) / alpha_bar), with a small alpha_bar for the last step.
    family, times = FAMILIES["cogvideox_5b"], vp_times(1.0)
    alpha_bar = tiny.scheduler("cogvideox_5b").alphas_cumprod.clone()
    alpha_bar[-1] = 4.8973451890853435e-08
    expected = ((1 - alpha_bar) / alpha_bar).sqrt()
    ours = torch.tensor([family.to_sigma(float(t)) for t in times], dtype=torch.float64)
    assert torch.allclose(ours, expected, rtol=1e-9) and ours[-1] == ZERO_SNR_SIGMA
    assert family.to_sigma(0.0) == 0.0
    back = [family.from_sigma(float(sigma)) for sigma in ours.float()]
    assert back[-1] == 1.0
    assert torch.allclose(torch.tensor(back, dtype=torch.float64), times, atol=1e-7)
    assert FAMILIES["hunyuan_video"].to_sigma(0.25) == FAMILIES["hunyuan_video"].from_sigma(0.25)


@pytest.mark.parametrize("name", NAMES)
def test_lora_targets_are_the_linear_layers_of_the_blocks(name: str):
    linear = [n for n, m in tiny.network(name).named_modules() if isinstance(m, nn.Linear)]
    targets = FAMILIES[name].lora_targets
    hit = {n for n in linear if any(n.endswith(f".{target}") for target in targets)}
    blocks = {n for n in linear if n.startswith("transformer_blocks.") and ".norm" not in n}
    assert hit == blocks and len(hit) == 3 * len(targets)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_guided_distilled_saved_and_loaded_back(name: str, tmp_path: Path):
    teacher = tiny.video_model(name)
    prompts = [Prompt.of(f"clip {i}", tiny.condition(1, seed=10 + i)) for i in range(2)]
    negative = Prompt.of("nothing", tiny.condition(1, seed=3))
    spec = RecordSpec(9, 32, 48, steps=4, kept=4, batch_size=2, dtype="float32")
    dataset = record(teacher, prompts, spec, tmp_path / "data", negative=negative)
    assert dataset.info.cfg is not None and dataset.info.cfg.scale == 6.0
    states = dataset.read(dataset.ids()[0])
    asked = guided(teacher, negative, dataset.info.cfg)
    condition = dataset.prompt(states.prompt_id).condition
    end = sample(asked, condition, states.latents[None, 0], dataset.info.time_grid)
    assert torch.allclose(end[0], states.latents[-1], atol=1e-4)

    recipe = Recipe(student_steps=2, lora=LoraSpec(rank=2), train_steps=3, batch_size=2, lr=1e-2)
    result = distill(teacher, dataset, recipe, tmp_path / "run")
    assert len(result.losses) == 3 and all(0 < loss < 1e3 for loss in result.losses)
    saved = save_student(result.student, tmp_path / "student.safetensors")
    student = load_student(saved, tiny.video_model(name))
    x, cond = tiny.latents(1), tiny.condition(1)
    v = student.velocity(x, 1.0, cond)
    assert torch.equal(v, result.student.velocity(x, 1.0, cond))
    assert (v - teacher.velocity(x, 1.0, cond)).abs().max() > 1e-4

"""Stable Video Diffusion in flow coordinates: schedule, network, features, guidance, conditions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from accvideo_core.conditioning import Condition
from accvideo_core.errors import AccVideoError
from accvideo_core.flow import euler_states
from accvideo_core.guidance import Cfg, Guided
from accvideo_core.latents import seeded_noise
from accvideo_core.models import FAMILIES, family_of
from accvideo_core.models.svd import SIGMA_MAX, grid, noise_level
from accvideo_core.sampling import sample
from tests import tiny_svd as tiny

SVD = FAMILIES["svd"]
NOISE = seeded_noise((1, *tiny.SPEC.shape(3, 64, 64)), "svd")


@pytest.mark.parametrize("steps", [1, 2, 4, 25])
def test_grid_is_the_official_schedulers(steps: int):
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(steps)
    times = SVD.time_grid(steps)
    assert times[0] == 1.0 and times[-1] == 0.0 and len(times) == steps + 1
    ours = torch.tensor([SVD.to_sigma(t) for t in times], dtype=torch.float64)
    assert torch.allclose(ours, scheduler.sigmas.double(), rtol=1e-6)
    told = noise_level(torch.tensor(times[:-1]))
    assert torch.allclose(told, scheduler.timesteps, atol=1e-5)


def test_grid_without_steps_or_with_a_shift_is_refused():
    with pytest.raises(AccVideoError, match="at least 1 step"):
        grid(0, 1.0)
    with pytest.raises(AccVideoError, match="shift is 3.0, but the schedule of Stable Video"):
        SVD.time_grid(4, shift=3.0)


def test_sigmas_are_those_of_comfyui():
    # ModelSamplingContinuousEDM of sigma_min 0.002 and sigma_max 700
    sigmas = torch.linspace(torch.tensor(0.002).log(), torch.tensor(700.0).log(), 1000).exp()
    times = [SVD.from_sigma(float(sigma)) for sigma in sigmas]
    assert times[-1] == 1.0 and all(a < b for a, b in zip(times, times[1:], strict=False))
    back = torch.tensor([SVD.to_sigma(t) for t in times])
    assert torch.allclose(back, sigmas, rtol=1e-6)
    assert SVD.to_sigma(0.0) == SVD.from_sigma(0.0) == 0.0


def test_between_the_ends_and_beyond_the_network_is_told_a_level_of_the_schedule():
    level = noise_level(torch.tensor([0.0, 1e-4, 0.5, 0.9999, 1.0]))
    low, high = (torch.tensor(sigma).log() / 4 for sigma in (0.002, 700.0))
    assert torch.allclose(level, torch.stack([low, low, level[2], high, high]))
    assert level[2] == 0.0


def test_velocity_is_noise_minus_data_of_the_networks_prediction():
    model, x_t, cond = tiny.video_model(), tiny.latents(), tiny.condition()
    sigma = torch.tensor([3.0, 0.4])
    assert cond.image is not None
    wide = sigma.reshape(2, 1, 1, 1, 1)
    x = x_t * (1 + wide)
    scaled = torch.cat([x / (wide**2 + 1).sqrt(), cond.image.expand(-1, -1, 3, -1, -1)], dim=1)
    f = model.module(scaled.transpose(1, 2), sigma.log() / 4, cond.text, cond.micro).sample
    denoised = x / (wide**2 + 1) - f.transpose(1, 2) * wide / (wide**2 + 1).sqrt()
    expected = (x - denoised) / wide - denoised
    v = model.velocity(x_t, sigma / (1 + sigma), cond)
    assert torch.allclose(v, expected, atol=1e-4)


class Official:
    """What the real pipeline makes of an image, and what it asks its network about."""

    def __init__(self, steps: int, cfg: Cfg) -> None:
        self.pipeline = tiny.build_pipeline()
        self.asked: list[dict[str, Tensor]] = []
        self.pipeline.unet.register_forward_pre_hook(self._note, with_kwargs=True)
        picture = (seeded_noise((64, 64, 3), "picture").clamp(-2, 2) * 60 + 128).to(torch.uint8)
        output: Any = self.pipeline(
            Image.fromarray(picture.numpy()),
            height=64,
            width=64,
            num_frames=3,
            num_inference_steps=steps,
            min_guidance_scale=cfg.first or 1.0,
            max_guidance_scale=cfg.scale,
            generator=torch.Generator().manual_seed(0),
            latents=NOISE.transpose(1, 2),
            output_type="latent",
        )
        self.latents = output.frames.transpose(1, 2)

    def _note(self, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict) -> None:
        names = ("sample", "timestep")
        self.asked.append({**dict(zip(names, args, strict=False)), **kwargs})

    @property
    def condition(self) -> Condition:
        asked = {name: x[-1:] for name, x in self.asked[0].items() if name != "timestep"
                 and isinstance(x, Tensor)}  # fmt: skip
        return Condition(
            text=asked["encoder_hidden_states"],
            image=asked["sample"][:, :1, tiny.CHANNELS :].transpose(1, 2),
            micro=asked["added_time_ids"].float(),
        )


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("cfg", [Cfg(1.0), Cfg(3.0, first=1.5)])
def test_from_its_state_the_official_pipeline_is_repeated(steps: int, cfg: Cfg):
    official = Official(steps, cfg)
    model, condition = tiny.video_model(), official.condition
    asked = model if cfg.none else Guided(model, nothing(), cfg)
    # The pipeline begins with the noise sqrt(700^2 + 1) times at sigma 700, where t is 700 / 701.
    times = (SIGMA_MAX / (1 + SIGMA_MAX), *SVD.time_grid(steps)[1:])
    noise = NOISE * (1 + SIGMA_MAX**-2) ** 0.5
    ours = sample(asked, condition, noise, times)
    assert 0.3 < official.latents.std() < 5
    # Its float32 states begin 700 in size, and 4e-5 of that is lost in every step.
    assert (ours - official.latents).abs().max() < 5e-4


def test_from_t_1_the_first_question_is_the_official_one_and_the_rest_close():
    official = Official(10, Cfg(1.0))
    model, seen = tiny.video_model(), []
    model.module.register_forward_pre_hook(
        lambda _m, _args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    ours = sample(model, official.condition, NOISE, SVD.time_grid(10))
    first = official.asked[0]
    assert torch.allclose(seen[0]["sample"], first["sample"], atol=1e-6)
    assert torch.allclose(seen[0]["timestep"], first["timestep"], atol=1e-6)
    far = (ours - official.latents).norm() / official.latents.norm()
    assert 1e-5 < far < 0.02  # 1/700 of data that pure noise has not


def nothing() -> Condition:
    return Condition(torch.zeros(1, 1, tiny.EMBEDDING))


def test_guidance_leads_away_from_no_image_at_all():
    model, x, cond = tiny.video_model(), tiny.latents(), tiny.condition()
    assert cond.image is not None
    zeros = replace(cond, text=torch.zeros_like(cond.text), image=torch.zeros_like(cond.image))
    v, v_neg = model.velocity(x, 0.5, cond), model.velocity(x, 0.5, zeros)
    scale = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    for batched in ("in turn", "batched"):
        asked = Guided(model, nothing(), Cfg(3.0, first=1.0), batched)
        guided = asked.velocity(x, 0.5, cond)
        assert torch.allclose(guided, v_neg + scale * (v - v_neg), atol=1e-5)


def test_scale_of_the_last_frame_is_what_a_user_chooses():
    assert SVD.cfg_of(None) == Cfg(3.0, first=1.0) and SVD.cfg_of(2.0) == Cfg(2.0, first=1.0)
    assert Cfg(1.0, first=1.0).none and not Cfg(1.0, first=2.0).none
    chosen = SVD.cfg_of(1.0)
    assert chosen is not None and chosen.none
    assert FAMILIES["wan22_t2v"].cfg_of(2.0) == Cfg(2.0)
    assert FAMILIES["hunyuan_video"].cfg_of(None) is None
    with pytest.raises(AccVideoError, match="cfg is 0.5"):
        Cfg(3.0, first=0.5)


def kept(outputs: dict[int, Tensor], index: int) -> Any:
    """A forward hook that keeps the first of a block's outputs."""
    return lambda _module, _args, output: outputs.update({index: output[0]})


def test_features_are_the_encoders_blocks_and_nothing_later_runs():
    model, x, cond = tiny.video_model(), tiny.latents(), tiny.condition()
    outputs: dict[int, Tensor] = {}
    ran: list[str] = []
    for i, block in enumerate(model.family.blocks(model.module)):
        block.register_forward_hook(kept(outputs, i))
    model.family.tail(model.module).register_forward_hook(lambda *_: ran.append("middle"))
    features = model.features(x, 0.5, cond, [3, 0, 1, 2])
    sizes = {0: 4, 1: 2, 2: 1, 3: 1}
    for index, feature in zip([3, 0, 1, 2], features, strict=True):
        size = sizes[index]
        assert feature.shape == (2, 3, size, size, tiny.WIDTHS[index])  # B, T, h, w, D
        by_frame = feature.flatten(0, 1).movedim(-1, 1)
        assert torch.equal(by_frame, outputs[index])
    assert not ran and model.num_blocks == 4
    outputs.clear()
    model.features(x, 0.5, cond, [1])
    assert set(outputs) == {0, 1}
    model.velocity(x, 0.5, cond)
    assert ran == ["middle"]


def test_gradients_of_features_reach_the_latents():
    model, x = tiny.video_model(), tiny.latents().requires_grad_()
    (feature,) = model.features(x, 0.0, tiny.condition(), [3])
    feature.square().mean().backward()
    assert x.grad is not None and bool((x.grad.flatten(2).abs().amax(2) > 0).all())


def test_network_in_low_precision_sees_exact_levels_and_numbers():
    model, seen = tiny.video_model(), []
    model.module.to(torch.bfloat16)
    for name in ("time_proj", "add_time_proj"):
        layer = model.module.get_submodule(name)
        layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    v = model.velocity(tiny.latents(), 0.99, tiny.condition())
    exact = tiny.video_model().velocity(tiny.latents(), 0.99, tiny.condition())
    assert v.dtype == torch.bfloat16 and {x.dtype for x in seen} == {torch.float32}
    assert torch.allclose(seen[1][:3], torch.tensor([6.0, 127.0, 0.02]), atol=1e-6)
    assert (v - exact).abs().mean() < 0.03 * exact.abs().mean()


def test_a_prompt_without_image_or_of_another_size_is_refused():
    model, x, cond = tiny.video_model(), tiny.latents(), tiny.condition()
    with pytest.raises(AccVideoError, match="has no image.*encode it with a start image"):
        model.velocity(x, 0.5, cond.without_image())
    assert cond.image is not None
    small = replace(cond, image=cond.image[..., :4])
    with pytest.raises(AccVideoError, match=r"latents \[4, 1, 8, 4\].*needs \[4, 1, 8, 8\]"):
        model.velocity(x, 0.5, small)


def test_stock_conditioning_is_understood():
    text, latents = torch.randn(1, 1, 8).half(), torch.randn(1, 4, 8, 8)
    extra = {
        "concat_latent_image": latents,
        "motion_bucket_id": 60,
        "fps": 8,
        "augmentation_level": 0.1,
    }
    cond = SVD.from_native(text, extra, tiny.SPEC)
    assert cond.image is not None and cond.micro is not None
    assert torch.equal(cond.text, text.float()) and torch.equal(cond.image[:, :, 0], latents)
    assert torch.allclose(cond.micro, torch.tensor([[7.0, 60.0, 0.1]]))
    with pytest.raises(AccVideoError, match="has no image.*SVD_img2vid_Conditioning"):
        SVD.from_native(text, {}, tiny.SPEC)


def test_family_is_found_by_its_classes():
    found = family_of("UNetSpatioTemporalConditionModel", {}, "StableVideoDiffusionPipeline")
    assert found is SVD
    assert SVD.latent_spec({"out_channels": 4}, {"block_out_channels": (1,) * 4}) == tiny.SPEC
    assert tiny.SPEC.shape(14, 576, 1024) == (4, 14, 72, 128)


def test_one_step_lands_on_the_networks_clean_video():
    model, cond = tiny.video_model(), tiny.condition()
    x = tiny.latents()
    *_, end = euler_states(lambda x_t, t: model.velocity(x_t, t, cond), x, (1.0, 0.0))
    assert cond.image is not None
    seen = torch.cat([x, cond.image.expand(-1, -1, 3, -1, -1)], dim=1).transpose(1, 2)
    level = torch.tensor(SIGMA_MAX).log() / 4
    prediction = model.module(seen, level, cond.text, cond.micro).sample.transpose(1, 2)
    assert torch.allclose(end, -prediction, atol=1e-5)

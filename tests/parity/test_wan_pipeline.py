"""Our sampler against diffusers' Wan pipelines: same noise, same sigmas, same latents."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_wan
import torch
from PIL import Image
from torch import Tensor

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.flow import Times, time_grid
from accvideo_core.guidance import guided
from accvideo_core.models.experts import Experts
from accvideo_core.models.loading import Teacher, load_teacher
from accvideo_core.sampling import SamplePlan, sample

PROMPTS = ["a red circle moving left", "a blue square"]
NEGATIVE = "square circle"
FRAMES = 9
TOLERANCE = 1e-5
Folders = dict[str, Teacher]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: Folders = {}

    def teacher(name: str) -> Teacher:
        if name not in made:
            folder = tmp_path_factory.mktemp("wan") / name
            made[name] = load_teacher(tiny_wan.save_pipeline(name, folder, seed=10))
        return made[name]

    return teacher


def plan(name: str) -> SamplePlan:
    height, width = tiny_wan.picture(name).shape[:2]
    return SamplePlan(FRAMES, height, width)


def prompts(teacher: Teacher, image: Tensor | None) -> list[Prompt]:
    if image is None:
        return teacher.encode_prompts(PROMPTS)
    return [teacher.encode_image(text, image, FRAMES) for text in PROMPTS]


def ours(teacher: Teacher, image: Tensor | None, times: Times) -> tuple[Tensor, Tensor]:
    """(noise, latents)"""
    asked = prompts(teacher, image)
    noise = plan(teacher.model.family.name).noise(teacher.model.latent_spec, asked, seed=0)
    negative = teacher.encode_prompts([NEGATIVE])[0]
    model = guided(teacher.model, negative, teacher.model.family.cfg)
    return noise, sample(model, Condition.cat([p.condition for p in asked]), noise, times)


def theirs(teacher: Teacher, image: Tensor | None, noise: Tensor, times: Times) -> Tensor:
    import diffusers

    class Explicit(diffusers.FlowMatchEulerDiscreteScheduler):
        """The pipelines ask for a number of steps only; these are the sigmas they get."""

        def set_timesteps(self, *_args: Any, device: Any = None, **_kwargs: Any) -> None:
            super().set_timesteps(sigmas=list(times[:-1]), device=device)

    family = teacher.model.family
    cls = diffusers.WanPipeline if image is None else diffusers.WanImageToVideoPipeline
    pipeline: Any = cls.from_pretrained(teacher.folder)
    pipeline.scheduler = Explicit(shift=1.0)
    pipeline.set_progress_bar_config(disable=True)
    size = plan(family.name)
    given: dict[str, Any] = {}
    if image is not None:
        pixels = (image * 255).round().to(torch.uint8).numpy()
        given["image"] = Image.fromarray(pixels)
    if family.cfg.low is not None:
        given["guidance_scale_2"] = family.cfg.low
    return pipeline(
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        height=size.height,
        width=size.width,
        num_frames=FRAMES,
        num_inference_steps=len(times) - 1,
        guidance_scale=family.cfg.scale,
        latents=noise.clone(),
        output_type="latent",
        **given,
    ).frames


CASES = [(name, name.endswith("_i2v")) for name in tiny_wan.FAMILY_NAMES] + [("wan22_ti2v", True)]


@pytest.mark.parametrize("name, with_image", CASES)
def test_sampler_reproduces_the_pipeline(teachers: Any, name: str, with_image: bool):
    teacher = teachers(name)
    image = tiny_wan.picture(name) if with_image else None
    times = time_grid(6, teacher.model.family.shift)
    noise, mine = ours(teacher, image, times)
    other = theirs(teacher, image, noise, times)
    assert (mine - noise).abs().max() > 0.1
    assert (mine - other).abs().max() <= TOLERANCE * other.abs().max()


def test_first_frame_of_the_5b_model_is_its_image(teachers: Any):
    teacher = teachers("wan22_ti2v")
    image = tiny_wan.picture("wan22_ti2v")
    _, x = ours(teacher, image, time_grid(4, 5.0))
    latents = teacher.vae.encode(image[None, None])
    assert (x[:, :, :1] - latents).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["wan22_t2v", "wan22_i2v"])
def test_experts_are_the_folders_networks_in_order(teachers: Any, name: str):
    teacher = teachers(name)
    pair = teacher.model.module
    assert isinstance(pair, Experts)
    for seed, expert in ((10, pair.high), (11, pair.low)):
        expected = tiny_wan.network(name, seed).state_dict()
        assert all(torch.equal(x, expected[n]) for n, x in expert.state_dict().items())


@pytest.mark.parametrize("name", ["wan_t2v", "wan22_ti2v"])
def test_decoded_clips_are_the_pipelines(teachers: Any, name: str):
    from diffusers import WanPipeline

    teacher = teachers(name)
    asked = prompts(teacher, None)
    x = plan(name).noise(teacher.model.latent_spec, asked, seed=1)
    pipeline: Any = WanPipeline.from_pretrained(teacher.folder)
    config = pipeline.vae.config
    mean, std = (
        torch.tensor(v).reshape(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
    )
    with torch.no_grad():
        video = pipeline.vae.decode(x * std + mean).sample
    frames = torch.from_numpy(pipeline.video_processor.postprocess_video(video))
    assert (teacher.vae.decode(x) - frames).abs().max() <= TOLERANCE


def test_grid_is_diffusers_shifted_grid():
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    for name in tiny_wan.FAMILY_NAMES:
        family = tiny_wan.family(name)
        grid = torch.tensor(family.time_grid())
        euler = FlowMatchEulerDiscreteScheduler(shift=family.shift)
        uniform = torch.linspace(1, 0, family.steps + 1)[:-1]
        euler.set_timesteps(sigmas=uniform.tolist())
        assert torch.allclose(euler.sigmas, grid, atol=1e-6)
        # The pipelines' own solver spreads its steps over .999 instead of 1 before the shift.
        unipc = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=family.shift
        )
        unipc.set_timesteps(family.steps)
        unshifted = unipc.sigmas / (family.shift - (family.shift - 1) * unipc.sigmas)
        assert (unshifted - torch.linspace(1, 0, family.steps + 1)).abs().max() < 0.00101

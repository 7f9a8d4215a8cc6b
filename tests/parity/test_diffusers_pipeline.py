"""Our sampler against diffusers' HunyuanVideoPipeline: same noise, same sigmas, same latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from accvideo_core.conditioning import Condition
from accvideo_core.flow import time_grid
from accvideo_core.models.loading import Teacher, load_teacher
from accvideo_core.models.tiny import embedded_teacher_path
from accvideo_core.sampling import SamplePlan, sample
from tests import tiny

PROMPTS = ["a red circle moving left", "a blue square"]
PLAN = SamplePlan(frames=9, height=32, width=48)
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["random", "embedded"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    if request.param == "random":
        folder = tiny.save_random_pipeline(tmp_path_factory.mktemp("parity") / "tiny", seed=3)
    else:
        folder = embedded_teacher_path()
        if not (folder / "model_index.json").is_file():
            pytest.skip("this checkout has no embedded teacher")
    return load_teacher(folder)


def diffusers_latents(
    folder: Path,
    noise: torch.Tensor,
    sigmas,
    shift: float,
    guidance: float,
    condition: Condition | None = None,
):
    """The pipeline's latents, from the prompts' text or from a condition in its place."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    pipeline = HunyuanVideoPipeline.from_pretrained(folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipeline.set_progress_bar_config(disable=True)
    given: dict = {"prompt": PROMPTS}
    if condition is not None:
        given = {
            "prompt_embeds": condition.text,
            "prompt_attention_mask": condition.full_mask(),
            "pooled_prompt_embeds": condition.pooled,
        }
    return pipeline(
        **given,
        height=PLAN.height,
        width=PLAN.width,
        num_frames=PLAN.frames,
        sigmas=sigmas,
        latents=noise.clone(),
        guidance_scale=guidance,
        output_type="latent",
    ).frames


@pytest.mark.parametrize("steps, guidance", [(5, 6.0), (5, 1.0), (50, 6.0)])
def test_sampler_reproduces_the_pipeline(teacher: Teacher, steps: int, guidance: float):
    prompts = teacher.encode_prompts(PROMPTS, guidance)
    noise = PLAN.noise(teacher.model.latent_spec, prompts, seed=0)
    times = time_grid(steps, 7.0)
    condition = Condition.cat([p.condition for p in prompts])
    ours = sample(teacher.model, condition, noise, times)
    # The very same sigmas: a scheduler of shift 1 takes them as they are.
    theirs = diffusers_latents(teacher.folder, noise, times[:-1], 1.0, guidance, condition)
    assert (ours - noise).abs().max() > 0.1
    assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("steps", [5, 50])
def test_sampler_reproduces_the_pipeline_that_pads_its_text(teacher: Teacher, steps: int):
    # The pipeline attends over 256 mostly masked tokens, we over the valid ones. That is the same
    # sum in another order; a trained network, which must decide, amplifies such roundings over 50
    # steps where a random one does not.
    prompts = teacher.encode_prompts(PROMPTS)
    noise = PLAN.noise(teacher.model.latent_spec, prompts, seed=0)
    times = time_grid(steps, 7.0)
    ours = sample(teacher.model, Condition.cat([p.condition for p in prompts]), noise, times)
    theirs = diffusers_latents(teacher.folder, noise, times[:-1], 1.0, 6.0)
    difference = (ours - theirs).abs()
    assert difference.quantile(0.999) <= TOLERANCE
    assert difference.max() <= 10 * TOLERANCE


def test_our_grid_is_the_pipelines_shifted_grid(teacher: Teacher):
    # diffusers shifts in float32, we in float64: the grids agree to a rounding, the latents nearly.
    prompts = teacher.encode_prompts(PROMPTS)
    noise = PLAN.noise(teacher.model.latent_spec, prompts, seed=1)
    times = time_grid(50, 7.0)
    ours = sample(teacher.model, Condition.cat([p.condition for p in prompts]), noise, times)
    uniform = np.linspace(1.0, 0.0, 51)[:-1]
    theirs = diffusers_latents(teacher.folder, noise, uniform, 7.0, 6.0)
    assert (ours - theirs).abs().max() <= 10 * TOLERANCE


def test_decoded_clips_are_the_pipelines(teacher: Teacher):
    from diffusers import HunyuanVideoPipeline

    x = PLAN.noise(teacher.model.latent_spec, teacher.encode_prompts(PROMPTS), seed=2)
    pipeline = HunyuanVideoPipeline.from_pretrained(teacher.folder)
    with torch.no_grad():
        video = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    frames = torch.from_numpy(pipeline.video_processor.postprocess_video(video))
    assert (teacher.vae.decode(x) - frames).abs().max() <= TOLERANCE

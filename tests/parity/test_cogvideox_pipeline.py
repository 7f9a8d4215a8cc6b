"""Our sampler against diffusers' CogVideoXPipeline with its DDIM scheduler: the same videos."""

from __future__ import annotations

import pytest
import torch

from accvideo_core.conditioning import Condition
from accvideo_core.guidance import Cfg, guided
from accvideo_core.models.loading import Teacher, load_teacher
from accvideo_core.sampling import SamplePlan, sample
from tests import tiny_cogvideox as tiny

PROMPTS = ["a red circle moving left", "a blue square"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=list(tiny.KINDS))
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tiny.save_pipeline(tmp_path_factory.mktemp("parity") / "tiny", request.param, seed=3)
    return load_teacher(folder)


def our_latents(teacher: Teacher, plan: SamplePlan, steps: int, cfg: float) -> torch.Tensor:
    prompts = teacher.encode_prompts(PROMPTS)
    negative = teacher.encode_prompts([teacher.model.family.negative_prompt])[0]
    noise = plan.noise(teacher.model.latent_spec, prompts, seed=0)
    model = guided(teacher.model, negative, Cfg(cfg))
    times = teacher.model.family.time_grid(steps)
    return sample(model, Condition.cat([p.condition for p in prompts]), noise, times)


def their_video(
    teacher: Teacher, plan: SamplePlan, steps: int, cfg: float, output: str = "latent"
) -> torch.Tensor:
    """The pipeline's latents [B, C, T, H, W], or its frames [B, T, C, H, W]."""
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(teacher.folder)
    pipeline.set_progress_bar_config(disable=True)
    prompts = teacher.encode_prompts(PROMPTS)
    noise = plan.noise(teacher.model.latent_spec, prompts, seed=0)
    frames = pipeline(
        prompt=PROMPTS,
        height=plan.height,
        width=plan.width,
        num_frames=plan.frames,
        num_inference_steps=steps,
        guidance_scale=cfg,
        latents=noise.transpose(1, 2).clone(),
        output_type=output,
    ).frames
    return frames.transpose(1, 2) if output == "latent" else frames


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("steps, cfg", [(5, 1.0), (5, 6.0), (50, 1.0), (50, 6.0)])
def test_sampler_reproduces_the_pipeline(teacher: Teacher, steps: int, cfg: float):
    # 9 frames are 3 latent frames: CogVideoX 1.5 samples a fourth that leads them.
    plan = SamplePlan(frames=9, height=32, width=48)
    ours, theirs = (f(teacher, plan, steps, cfg) for f in (our_latents, their_video))
    assert ours.shape[2] == (4 if teacher.model.latent_spec.patch_t == 2 else 3)
    assert relative(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("height, width", [(48, 64), (64, 32), (80, 112)])
def test_any_size_has_the_pipelines_positions(teacher: Teacher, height: int, width: int):
    plan = SamplePlan(frames=5, height=height, width=width)
    ours, theirs = (f(teacher, plan, 4, 1.0) for f in (our_latents, their_video))
    assert relative(ours, theirs) <= TOLERANCE


def test_decoded_video_is_the_pipelines(teacher: Teacher):
    # The pipeline drops the latent frames that fill the last time patch, which lead the others.
    plan = SamplePlan(frames=9, height=32, width=48)
    latents, video = (their_video(teacher, plan, 2, 1.0, kind) for kind in ("latent", "pt"))
    frames = teacher.vae.decode(teacher.model.latent_spec.crop(latents, plan.frames))
    assert frames.shape == (2, 9, 32, 48, 3)
    assert (frames - video.permute(0, 1, 3, 4, 2)).abs().max() <= TOLERANCE

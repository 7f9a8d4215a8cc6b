"""Our sampler against diffusers' HunyuanVideoImageToVideoPipeline: the same videos."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from accvideo_core.conditioning import Condition
from accvideo_core.flow import time_grid
from accvideo_core.models import FAMILIES, VideoModel
from accvideo_core.models.vae import VideoVAE
from accvideo_core.sampling import sample
from tests import tiny_hunyuan_i2v as tiny

PROMPT = "a red circle moving left"
HEIGHT, WIDTH, FRAMES = 32, 48, 9
TOLERANCE = 1e-5


def picture() -> torch.Tensor:
    """[H, W, 3] in whole 255ths, as a picture's file holds them."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (HEIGHT, WIDTH, 3), generator=generator).float() / 255


class Case:
    """One kind of network in diffusers' pipeline and in our hands."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pipeline = tiny.build_pipeline(name, seed=3)
        self.model = VideoModel(self.pipeline.transformer.eval(), FAMILIES[name], tiny.SPEC)

    def condition(self, guidance: float) -> Condition:
        encode = self.model.family.encode_image
        assert encode is not None
        vae = VideoVAE(self.pipeline.vae, tiny.SPEC)
        with torch.no_grad():
            cond = encode(self.pipeline, vae, PROMPT, picture(), FRAMES, torch.device("cpu"))
        return cond.with_guidance(guidance)

    def ours(self, noise: torch.Tensor, times: tuple[float, ...], guidance: float) -> torch.Tensor:
        cond = self.condition(guidance)
        assert cond.image is not None
        # The pipeline's start, the official stable mode: a thousandth of it is the image.
        start = 0.999 * noise + (1 - torch.tensor(0.999)) * cond.image
        return sample(self.model, cond, start, times)

    def theirs(
        self, noise: torch.Tensor, times: tuple[float, ...], guidance: float
    ) -> torch.Tensor:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        pixels = (picture() * 255).round().to(torch.uint8).numpy()
        return self.pipeline(
            image=Image.fromarray(pixels),
            prompt=PROMPT,
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            sigmas=list(times[:-1]),
            guidance_scale=guidance,
            latents=noise.clone(),
            output_type="latent",
        ).frames


@pytest.fixture(scope="module", params=[tiny.CONCAT, tiny.REPLACE])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def noise() -> torch.Tensor:
    shape = tiny.SPEC.shape(FRAMES, HEIGHT, WIDTH)
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("steps, guidance", [(5, 6.0), (5, 1.0), (50, 6.0)])
def test_sampler_reproduces_the_pipeline(case: Case, steps: int, guidance: float):
    times = time_grid(steps, 7.0)
    ours, theirs = (f(noise(), times, guidance) for f in (case.ours, case.theirs))
    if case.name == tiny.CONCAT:
        ours = ours[:, :, 1:]  # the pipeline drops the frame that repeats the image
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_encoded_image_and_prompt(case: Case):
    cond = case.condition(6.0)
    interleave = 2 if case.name == tiny.CONCAT else 4
    # Every second or fourth of 576 image tokens, the 5 words, and the line break after them.
    assert cond.text.shape == (1, 576 // interleave + 5 + 1, tiny.TEXT)
    assert cond.image is not None and cond.image.shape == (1, 16, 1, HEIGHT // 4, WIDTH // 4)
    with torch.no_grad():
        pixels = picture().permute(2, 0, 1)[None, :, None] * 2 - 1
        mode = case.pipeline.vae.encode(pixels).latent_dist.mode()
    assert torch.allclose(cond.image, mode * case.pipeline.vae.config.scaling_factor, atol=1e-6)


def test_the_replaced_frame_ends_as_the_image():
    case = Case(tiny.REPLACE)
    cond = case.condition(6.0)
    end = sample(case.model, cond, noise(), time_grid(5, 7.0))
    assert cond.image is not None
    assert torch.allclose(end[:, :, :1], cond.image, atol=1e-6)

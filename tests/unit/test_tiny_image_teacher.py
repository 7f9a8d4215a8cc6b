"""The embedded image-to-video teacher as it ships: real classes, small, offline, and able."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from accvideo_core.evaluate import image_world, metrics
from accvideo_core.evaluate.judge import ImageJudge
from accvideo_core.models import tiny_svd

FOLDER = tiny_svd.embedded_image_teacher_path()
CLIPS = range(12)


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Any]:
    from diffusers import StableVideoDiffusionPipeline

    # local_files_only: a missing file must fail here and not be looked for elsewhere.
    pipe = StableVideoDiffusionPipeline.from_pretrained(
        FOLDER, local_files_only=True, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    yield pipe


@pytest.fixture(scope="module")
def one() -> ImageJudge:
    return ImageJudge.of_clips(len(CLIPS), seed=11)


def continued(pipeline: Any, first: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    """Frames [N, 8, 32, 32, 3] in [0, 1] that the pipeline makes of first frames [N, 32, 32, 3]."""
    video = pipeline(
        [Image.fromarray(x.numpy()) for x in (first * 255).round().byte()],
        height=image_world.SIZE,
        width=image_world.SIZE,
        num_inference_steps=steps,
        max_guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    return video.permute(0, 1, 3, 4, 2)


def test_folder_is_small_and_holds_no_pickle() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    assert not [file for file in files if file.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]


def test_folder_does_not_name_the_machine_it_was_made_on() -> None:
    for file in FOLDER.rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert "_name_or_path" not in text
        assert str(Path.home()) not in text


def test_parts_are_the_real_classes_with_svds_settings(pipeline: Any) -> None:
    index = json.loads((FOLDER / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableVideoDiffusionPipeline"
    assert index["unet"][1] == "UNetSpatioTemporalConditionModel"
    assert index["vae"][1] == "AutoencoderKLTemporalDecoder"
    assert index["image_encoder"][1] == "CLIPVisionModelWithProjection"
    settings = pipeline.scheduler.config
    assert (settings.sigma_min, settings.sigma_max) == (0.002, 700.0)
    assert settings.prediction_type == "v_prediction" and settings.use_karras_sigmas
    assert settings.timestep_type == "continuous"
    assert pipeline.vae.config.scaling_factor == tiny_svd.SCALING_FACTOR
    assert len(pipeline.unet.down_blocks) == 4 and pipeline.unet.config.num_frames == 8


def test_autoencoder_keeps_what_a_clip_shows(pipeline: Any, one: ImageJudge) -> None:
    real = one.real_frames(CLIPS)
    with torch.no_grad():
        latents = pipeline.vae.encode(real.flatten(0, 1).permute(0, 3, 1, 2) * 2 - 1)
        mode = latents.latent_dist.mode()
        decoded = pipeline.vae.decode(mode, num_frames=image_world.FRAMES).sample
    frames = ((decoded.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).view_as(real)
    assert 0.8 < (mode * tiny_svd.SCALING_FACTOR).std() < 1.2
    assert metrics.psnr(frames, real).mean() > 22
    assert one.judge(frames, CLIPS)[0]["all"].mean() >= 0.9


def test_pipeline_continues_first_frames_as_they_announce(pipeline: Any, one: ImageJudge) -> None:
    first = one.first_frames(CLIPS)
    frames = continued(pipeline, first, steps=4, guidance=1.0)
    hits, _ = one.judge(frames, CLIPS)
    assert hits["motion"].mean() >= 0.75 and hits["colour"].mean() >= 0.9
    assert metrics.psnr(frames[:, :1], first[:, None]).mean() > 18


def test_guidance_leaves_the_first_frame_and_changes_the_last(
    pipeline: Any, one: ImageJudge
) -> None:
    first = one.first_frames(CLIPS[:2])
    plain, guided = (continued(pipeline, first, 2, guidance) for guidance in (1.0, 3.0))
    change = (guided - plain).square().mean((0, 2, 3, 4))
    assert change[-1] > 4 * change[0]

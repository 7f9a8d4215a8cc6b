"""The embedded teacher as it ships: it loads offline, is small, and its judge is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from accvideo_core.evaluate import world
from accvideo_core.evaluate.classifier import FEATURES, classifier_path, load_classifier
from accvideo_core.models import tiny

FOLDER = tiny.embedded_teacher_path()


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Any]:
    from diffusers import HunyuanVideoPipeline

    # local_files_only: a missing file must fail here and not be looked for elsewhere.
    pipe = HunyuanVideoPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    yield pipe


def test_all_assets_together_are_small() -> None:
    files = [file for file in FOLDER.parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 22e6
    assert not [file for file in files if file.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]


def test_tokenizer_class_is_one_that_transformers_4_knows() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "HunyuanVideoPipeline"
    for name in ("tokenizer", "tokenizer_2"):
        assert index[name] == ["transformers", "PreTrainedTokenizerFast"]
        settings = json.loads((FOLDER / name / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_no_file_names_the_machine_it_was_made_on() -> None:
    for file in FOLDER.rglob("*.json"):
        text = file.read_text()
        assert "_name_or_path" not in text
        assert str(Path.home()) not in text


def test_default_prompt_template_is_cut_off_exactly(pipeline: Any) -> None:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    caption = world.all_prompts()[0]
    ids = pipeline.tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].format(caption))["input_ids"]
    kept = pipeline.tokenizer.convert_ids_to_tokens(ids)[DEFAULT_PROMPT_TEMPLATE["crop_start"] :]
    assert kept == [*caption.split(), "<eot>"]


def test_every_caption_is_known_and_told_apart(pipeline: Any) -> None:
    captions = world.all_prompts()
    assert pipeline.tokenizer.unk_token_id not in {
        token for ids in pipeline.tokenizer(captions)["input_ids"] for token in ids
    }
    with torch.no_grad():
        embeds, pooled, mask = pipeline.encode_prompt(captions, max_sequence_length=16)
    assert set(mask.sum(1).tolist()) == {9, 10}
    assert torch.pdist(pooled).min() > 0.1
    assert torch.pdist(embeds[:, :9].flatten(1)).min() > 1


def test_pipeline_makes_a_clip_from_a_prompt(pipeline: Any) -> None:
    prompt = "a red circle moving left on a striped background"
    clips = [
        pipeline(
            prompt,
            height=world.SIZE,
            width=world.SIZE,
            num_frames=world.FRAMES,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).frames
        for _ in range(2)
    ]
    assert clips[0].shape == (1, world.FRAMES, 3, world.SIZE, world.SIZE)
    assert torch.equal(clips[0], clips[1])


def test_real_clips_survive_the_autoencoder(pipeline: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    specs = world.sample_specs(16, generator)
    video = world.render(specs, generator)
    with torch.no_grad():
        latents = pipeline.vae.encode(video).latent_dist.mode()
        again = pipeline.vae.decode(latents).sample.clamp(-1, 1)
    scaled = latents * pipeline.vae.config.scaling_factor
    assert latents.shape == (16, 16, 5, 8, 8)
    assert 0.85 < scaled.std() < 1.15
    psnr = 10 * torch.log10(4 / (again - video).square().mean())
    assert psnr > 24


def test_teacher_draws_what_the_prompt_says(pipeline: Any) -> None:
    """A few clips at few steps; the real figures are in the model card."""
    generator = torch.Generator().manual_seed(4)
    prompts = world.sample_prompts(16, generator)
    embeds, pooled, mask = pipeline.encode_prompt(prompts)
    frames = pipeline(
        prompt_embeds=embeds[:, :12],
        pooled_prompt_embeds=pooled,
        prompt_attention_mask=mask[:, :12],
        height=world.SIZE,
        width=world.SIZE,
        num_frames=world.FRAMES,
        num_inference_steps=12,
        generator=generator,
        output_type="pt",
    ).frames
    video = frames.permute(0, 2, 1, 3, 4).float() * 2 - 1
    wanted = world.labels([world.parse(text) for text in prompts])
    right = load_classifier().predict(video) == wanted
    assert right.float().mean() > 0.9


def test_classifier_is_right_on_fresh_real_clips() -> None:
    judge = load_classifier()
    generator = torch.Generator().manual_seed(2024)
    specs = world.sample_specs(512, generator)
    right = torch.cat(
        [
            judge.predict(world.render(part, generator)) == world.labels(part)
            for part in (specs[i : i + 64] for i in range(0, 512, 64))
        ]
    )
    assert (right.float().mean(0) >= 0.99).all()


def test_classifier_features_see_that_a_texture_fades() -> None:
    judge = load_classifier()
    specs = [world.ClipSpec("circle", "red", "growing", "mosaic")] * 64
    plain = [world.ClipSpec("circle", "red", "growing", "plain")] * 64
    crisp, other = (world.render(specs, torch.Generator().manual_seed(s)) for s in (1, 2))
    faded = torch.lerp(crisp, world.render(plain, torch.Generator().manual_seed(1)), 0.3)
    with torch.no_grad():
        mean = [judge.features(video).mean(0) for video in (crisp, other, faded)]
    assert mean[0].shape == (FEATURES,)
    assert (mean[2] - mean[0]).norm() > 3 * (mean[1] - mean[0]).norm()


def test_classifier_ships_with_the_package() -> None:
    assert classifier_path().parent == FOLDER.parent
    assert classifier_path().stat().st_size < 2e6

"""Stable Video Diffusion's folder: its image as a condition, and its VAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from accvideo_core.conditioning import Micro
from accvideo_core.errors import AccVideoError
from accvideo_core.latents import seeded_noise
from accvideo_core.models import frame_vae
from accvideo_core.models.frame_vae import decode_frames
from accvideo_core.models.loading import Teacher, load_teacher
from accvideo_core.models.vae import VideoVAE
from accvideo_core.models.vae_file import load_vae
from tests import tiny_svd as tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("svd") / "tiny")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return load_teacher(folder)


def image(height: int = 64, width: int = 64, seed: str = "a") -> Tensor:
    """[H, W, 3] of whole 255ths, as files hold."""
    return (seeded_noise((height, width, 3), seed).clamp(-2, 2) * 60 + 128).round() / 255


def pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().to(torch.uint8).numpy())


def test_folder_loads_with_its_geometry(teacher: Teacher):
    assert teacher.model.family.name == "svd" and teacher.model.latent_spec == tiny.SPEC
    assert teacher.model.fingerprint == tiny.video_model().fingerprint
    assert teacher.has_text_encoders and teacher.tokenizer is None


def official_condition(picture: Tensor, augmentation: float) -> dict[str, Tensor]:
    """What the real pipeline asks its network about, without guidance."""
    pipeline, asked = tiny.build_pipeline(), {}

    def note(_module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        asked.update(kwargs, sample=args[0])

    pipeline.unet.register_forward_pre_hook(note, with_kwargs=True)
    pipeline(
        pil(picture),
        height=picture.shape[0],
        width=picture.shape[1],
        num_frames=2,
        num_inference_steps=1,
        max_guidance_scale=1.0,
        noise_aug_strength=augmentation,
        output_type="latent",
    )
    return asked


@pytest.mark.parametrize("size", [(64, 64), (256, 232)])
def test_image_becomes_the_official_condition(teacher: Teacher, size: tuple[int, int]):
    official = official_condition(image(*size), augmentation=0.0)
    teacher.micro = Micro(augmentation=0.0)
    condition = teacher.encode_image("a caption", image(*size), 14).condition
    teacher.micro = Micro()
    expected = official["sample"][:, :1, tiny.CHANNELS :].transpose(1, 2)
    assert condition.image is not None and condition.micro is not None
    assert torch.allclose(condition.text, official["encoder_hidden_states"], atol=1e-6)
    assert torch.allclose(condition.image, expected, atol=1e-4)
    assert torch.equal(condition.micro, official["added_time_ids"])


def test_noise_on_the_image_follows_from_the_image_and_has_its_strength(teacher: Teacher):
    encoded = [teacher.encode_image("", image(seed=s), 3).condition.image for s in "aab"]
    assert encoded[0] is not None and encoded[1] is not None and encoded[2] is not None
    assert torch.equal(encoded[0], encoded[1]) and not torch.equal(encoded[0], encoded[2])
    seen: list[Tensor] = []

    class Seeing(VideoVAE):
        def encode(self, frames: Tensor) -> Tensor:
            seen.append(frames)
            return super().encode(frames)

    family = teacher.model.family
    assert family.with_micro is not None
    seeing = Seeing(teacher.vae.module, tiny.SPEC)
    pipeline = tiny.build_pipeline()
    for strength in (0.0, 0.5):
        encode = family.with_micro(Micro(augmentation=strength))
        encode(pipeline, seeing, "", image(), 3, torch.device("cpu"))
    noise = (seen[1] - seen[0]) * 2  # of pixels in [-1, 1]
    assert torch.equal(seen[0][0, 0], image()) and noise.std() == pytest.approx(0.5, rel=0.03)
    assert abs(noise.mean()) < 0.02


def test_numbers_beside_the_image_can_be_chosen_and_are_checked(teacher: Teacher):
    teacher.micro = Micro(fps=12, motion_bucket=40, augmentation=0.1)
    condition = teacher.encode_image("", image(), 3).condition
    teacher.micro = Micro()
    assert condition.micro is not None
    assert torch.allclose(condition.micro, torch.tensor([[11.0, 40.0, 0.1]]))
    for wrong in ({"fps": 0}, {"motion_bucket": -1}, {"augmentation": float("nan")}):
        with pytest.raises(AccVideoError, match=f"{next(iter(wrong))} is .*must be at least"):
            Micro(**wrong)


def test_cached_conditions_are_kept_apart_by_the_numbers(folder: Path, tmp_path: Path):
    teacher = load_teacher(folder)
    teacher.text_cache = tmp_path
    first = teacher.encode_image("", image(), 3).condition.micro
    teacher.micro = Micro(fps=12)
    second = teacher.encode_image("", image(), 3).condition.micro
    assert first is not None and second is not None
    assert (first[0, 0], second[0, 0]) == (6.0, 11.0)


def test_a_text_alone_is_refused_and_no_text_is_no_image(teacher: Teacher):
    with pytest.raises(AccVideoError, match="not prompted with a text.*start image"):
        teacher.encode_prompts(["a dog"])
    negative = teacher.encode_negative().condition
    assert negative.text.shape == (1, 1, tiny.EMBEDDING) and not negative.text.any()


def test_image_of_a_size_that_does_not_fit_is_refused(teacher: Teacher):
    with pytest.raises(AccVideoError, match="width 60 is not a multiple of 8; use 56 or 64"):
        teacher.encode_image("", image(64, 60), 3)


def test_frames_are_encoded_and_decoded_as_by_the_official_pipeline(teacher: Teacher):
    frames = torch.stack([image(seed=str(i)) for i in range(3)])[None]
    latents = teacher.vae.encode(frames)
    pipeline = tiny.build_pipeline()
    pixels = frames[0].permute(0, 3, 1, 2) * 2 - 1
    mode = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert latents.shape == (1, 4, 3, 8, 8)
    assert torch.allclose(latents[0].transpose(0, 1), mode, atol=1e-5)
    video = pipeline.decode_latents(latents.transpose(1, 2), num_frames=3)
    expected = (video / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)
    assert torch.allclose(teacher.vae.decode(latents), expected, atol=1e-5)
    both = torch.cat([latents, latents.flip(2)])
    assert torch.allclose(teacher.vae.decode(both)[0], expected[0], atol=1e-5)


def test_long_clips_are_decoded_in_parts_and_short_memory_makes_them_shorter(
    monkeypatch: pytest.MonkeyPatch,
):
    module, z = tiny.vae(), tiny.latents(1)
    asked: list[int] = []
    plain = module.decode

    def decode(z: Tensor, num_frames: int, **kwargs: Any) -> Any:
        asked.append(num_frames)
        if num_frames > 2:
            raise frame_vae.OUT_OF_MEMORY("too many")
        return plain(z, num_frames=num_frames, **kwargs)

    monkeypatch.setattr(module, "decode", decode)
    video = decode_frames(module, z)
    assert asked == [3, 2, 1]
    assert torch.equal(video, decode_frames(module, z, at_once=2))
    parts = [decode_frames(module, part) for part in z.split(2, dim=2)]
    assert torch.equal(video, torch.cat(parts, dim=2))


def test_vae_stays_in_float32_where_float16_is_asked_for(folder: Path):
    assert load_vae(folder, "cpu", torch.float16).dtype == torch.float32
    assert load_vae(folder, "cpu", torch.bfloat16).dtype == torch.bfloat16


def test_incomplete_folders_are_refused(folder: Path, tmp_path: Path):
    import shutil

    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model_index.json").unlink()
    with pytest.raises(AccVideoError, match="no model_index.json.*or choose its folder 'unet'"):
        load_teacher(broken)
    again = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(again / "image_encoder")
    with pytest.raises(AccVideoError, match="lacks the folder 'image_encoder'"):
        load_teacher(again)


def test_condition_keeps_its_numbers_wide():
    narrow = tiny.condition().to("cpu", torch.bfloat16)
    assert narrow.micro is not None and narrow.micro.dtype == torch.float32
    assert narrow.image is not None and narrow.image.dtype == torch.bfloat16
    text = replace(tiny.condition()).without_image()
    assert set(text.tensors()) == {"text"}

"""What Wan is conditioned on: prompts, images, and ComfyUI's CONDITIONING."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_wan
import torch
from torch import Tensor

from accvideo_core.conditioning import Prompt
from accvideo_core.errors import AccVideoError
from accvideo_core.models import FAMILIES
from accvideo_core.models.loading import Teacher
from accvideo_core.models.vae import VideoVAE

NAMES = tiny_wan.FAMILY_NAMES


def padded(text: Tensor) -> Tensor:
    return torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))


# Text and images ------------------------------------------------------------------------------


def pipeline(name: str) -> Any:
    """The part of a pipeline that encodes."""
    import diffusers

    encoders: dict[str, Any] = {}
    if name == "wan_i2v":
        encoders["image_encoder"], encoders["image_processor"] = tiny_wan.image_encoder()
    cls = getattr(diffusers, FAMILIES[name].pipeline_class)
    return cls(
        tokenizer=tiny_wan.tokenizer(tiny_wan.WORDS),
        text_encoder=tiny_wan.text_encoder(),
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=None,
        **encoders,
    )


@torch.no_grad()
def test_prompts_are_cleaned_and_stored_without_padding():
    texts = ["a red &amp;  circle", "square"]
    pipe = pipeline("wan_t2v")
    cond = FAMILIES["wan_t2v"].encode(pipe, texts, torch.device("cpu"))
    whole, _ = pipe.encode_prompt(texts, None, False, max_sequence_length=512)
    assert cond.text.shape[1] == 5 and cond.full_mask().sum(dim=1).tolist() == [5, 2]  # with <bos>
    assert torch.equal(padded(cond.text), whole)
    clean = FAMILIES["wan_t2v"].encode(pipe, ["a red & circle", "square"], torch.device("cpu"))
    assert torch.equal(clean.text, cond.text)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny_wan.IMAGE_FAMILIES)
def test_images_are_encoded_as_mask_latents_and_tokens(name: str):
    family, image = FAMILIES[name], tiny_wan.picture(name)
    module = tiny_wan.vae(name)
    vae = VideoVAE(module, family.latent_spec(tiny_wan.network(name).config, module.config))
    assert family.encode_image is not None
    cond = family.encode_image(pipeline(name), vae, "square", image, 9, torch.device("cpu"))
    assert cond.image is not None and len(cond) == 1
    first = vae.encode(image[None, None])
    assert torch.allclose(cond.image[:, -vae.spec.channels :, :1], first, atol=1e-5)
    assert (cond.image_tokens is not None) == (name == "wan_i2v")
    if name == "wan22_ti2v":
        assert cond.image.shape == (1, 48, 1, 4, 6)
    else:
        assert cond.image.shape == (1, 20, 3, 4, 6)
        mask = torch.zeros(4, 3, 4, 6)
        mask[:, 0] = 1
        assert torch.equal(cond.image[0, :4], mask)


def test_images_that_do_not_fit_are_refused():
    def refused(name: str, image: Tensor, frames: int, reason: str) -> None:
        teacher = Teacher(tiny_wan.video_model(name), Path("nowhere"))
        with pytest.raises(AccVideoError, match=reason):
            teacher.encode_image("square", image, frames)

    refused("wan_t2v", torch.zeros(32, 32, 3), 5, "takes no image")
    refused("wan_i2v", torch.zeros(32, 40, 3), 5, "width 40 is not a multiple of 16; use 32 or 48")
    refused("wan22_i2v", torch.zeros(32, 32, 3), 6, "6 frames do not fit.*use 5 or 9")
    refused("wan22_ti2v", torch.zeros(48, 64, 3), 5, "height 48 is not a multiple of 32")
    refused("wan_i2v", torch.zeros(1, 32, 32, 3), 5, r"shape \(1, 32, 32, 3\)")


def test_prompts_with_other_images_are_other_prompts():
    one, other = (tiny_wan.condition("wan22_i2v", 1, seed=seed) for seed in (1, 2))
    other = replace(one, image=other.image)
    assert Prompt.of("square", one).id != Prompt.of("square", other).id
    alone = one.without_image()
    assert Prompt.of("square", alone).id == Prompt.of("square", other.without_image()).id


def test_prompts_need_ftfy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffusers.utils.is_ftfy_available", lambda: False)
    with pytest.raises(AccVideoError, match="pip install ftfy"):
        FAMILIES["wan_t2v"].encode(None, ["square"], torch.device("cpu"))


# ComfyUI's CONDITIONING -----------------------------------------------------------------------


def native_text(length: int = 5) -> Tensor:
    text = torch.zeros(1, 512, tiny_wan.TEXT)
    text[:, :length] = torch.randn(
        length, tiny_wan.TEXT, generator=torch.Generator().manual_seed(3)
    )
    return text


def native_image(name: str, frames: int = 3) -> dict[str, Any]:
    """What WanImageToVideo puts into a CONDITIONING: 0 in the mask is a given frame."""
    mask = torch.ones(1, 1, frames, 4, 4)
    mask[:, :, :1] = 0
    return {
        "concat_latent_image": torch.randn(1, tiny_wan.channels(name), frames, 4, 4),
        "concat_mask": mask,
        "clip_vision_output": SimpleNamespace(penultimate_hidden_states=torch.randn(1, 5, 16)),
    }


@pytest.mark.parametrize("name", NAMES)
def test_native_text_is_trimmed_and_exact(name: str):
    spec, text = tiny_wan.video_model(name).latent_spec, native_text()
    cond = FAMILIES[name].from_native(text.half(), native_image(name), spec)
    assert cond.text.dtype == torch.float32 and cond.text.shape[1] == 5
    assert torch.equal(padded(cond.text), text.half().float())


@pytest.mark.parametrize("name", ["wan_i2v", "wan22_i2v"])
def test_native_image_becomes_mask_and_model_space_latents(name: str):
    spec, extra = tiny_wan.video_model(name).latent_spec, native_image(name)
    cond = FAMILIES[name].from_native(native_text(), extra, spec)
    assert cond.image is not None and cond.image.shape == (1, 20, 3, 4, 4)
    assert cond.image[:, :4, 0].min() == 1 and cond.image[:, :4, 1:].max() == 0
    assert torch.equal(cond.image[:, 4:], spec.to_model(extra["concat_latent_image"]))
    if name == "wan_i2v":
        wanted = extra["clip_vision_output"].penultimate_hidden_states
        assert cond.image_tokens is not None and torch.equal(cond.image_tokens, wanted)
    else:
        assert cond.image_tokens is None
    del extra["concat_mask"]
    unmasked = FAMILIES[name].from_native(native_text(), extra, spec)
    assert unmasked.image is not None and unmasked.image[:, :4].max() == 0


def test_native_image_of_the_5b_model():
    family, spec = FAMILIES["wan22_ti2v"], tiny_wan.video_model("wan22_ti2v").latent_spec
    extra = native_image("wan22_ti2v")
    wanted = spec.to_model(extra["concat_latent_image"][:, :, :1])
    latent = {"samples": extra["concat_latent_image"], "noise_mask": extra["concat_mask"]}
    for given in (extra, latent):
        cond = family.from_native(native_text(), given, spec)
        assert cond.image is not None and torch.equal(cond.image, wanted)
    assert family.from_native(native_text(), {}, spec).image is None


def test_native_conditioning_without_its_image_is_refused():
    spec = tiny_wan.video_model("wan_i2v").latent_spec
    with pytest.raises(AccVideoError, match="no start image.*WanImageToVideo"):
        FAMILIES["wan22_i2v"].from_native(native_text(), {}, spec)
    extra = native_image("wan_i2v")
    del extra["clip_vision_output"]
    with pytest.raises(AccVideoError, match="no clip_vision_output.*CLIPVisionEncode"):
        FAMILIES["wan_i2v"].from_native(native_text(), extra, spec)

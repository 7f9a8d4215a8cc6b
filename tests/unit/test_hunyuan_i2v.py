"""HunyuanVideo I2V: how an image gets into the network, out of ComfyUI's nodes, and stays put."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.student import LoraSpec
from accvideo_core.distill.trainer import distill
from accvideo_core.errors import AccVideoError
from accvideo_core.flow import interpolate, predict_x0
from accvideo_core.models import FAMILIES, family_of
from accvideo_core.models.loading import load_teacher
from accvideo_core.sampling import sample
from accvideo_core.trajectories.record import RecordSpec, record
from tests import tiny_hunyuan_i2v as tiny

NAMES = [tiny.CONCAT, tiny.REPLACE]


def plain_forward(name: str, hidden: torch.Tensor, t: float, cond: Condition) -> torch.Tensor:
    guidance = torch.full((len(hidden),), 6000.0) if name == tiny.REPLACE else None
    return tiny.network(name)(
        hidden_states=hidden,
        timestep=torch.full((len(hidden),), t * 1000),
        encoder_hidden_states=cond.text,
        encoder_attention_mask=cond.full_mask(),
        pooled_projections=cond.pooled,
        guidance=guidance,
        return_dict=False,
    )[0]


def test_concat_adds_the_image_and_a_mask_of_the_known_frame():
    model, x, cond = tiny.video_model(tiny.CONCAT), tiny.latents(), tiny.condition()
    image = torch.cat([cond.image, torch.zeros(2, 16, 2, 4, 6)], dim=2)
    mask = torch.tensor([1.0, 0, 0]).reshape(1, 1, 3, 1, 1).expand(2, 1, 3, 4, 6)
    expected = plain_forward(tiny.CONCAT, torch.cat([x, image, mask], dim=1), 0.5, cond)
    assert torch.equal(model.velocity(x, 0.5, cond), expected)


def test_replace_shows_the_network_the_image_instead_of_the_first_frame():
    model, x, cond = tiny.video_model(tiny.REPLACE), tiny.latents(), tiny.condition()
    shown = torch.cat([cond.image, x[:, :, 1:]], dim=2)
    expected = plain_forward(tiny.REPLACE, shown, 0.5, cond)
    v = model.velocity(x, 0.5, cond)
    assert torch.equal(v[:, :, 1:], expected[:, :, 1:])
    other = x.clone()
    other[:, :, 0] = 7.0
    assert torch.equal(model.velocity(other, 0.5, cond)[:, :, 1:], v[:, :, 1:])


def test_replaced_frame_points_at_the_image_from_everywhere():
    model, cond = tiny.video_model(tiny.REPLACE), tiny.condition()
    for t in (1.0, 0.3, 0.02):
        x = tiny.latents(seed=int(100 * t))
        v = model.velocity(x, t, cond)
        assert torch.allclose(predict_x0(x, v, t)[:, :, :1], cond.image, atol=1e-6)
    at_rest = torch.cat([cond.image, tiny.latents()[:, :, 1:]], dim=2)
    assert model.velocity(at_rest, 0.0, cond)[:, :, 0].abs().max() == 0
    assert model.velocity(at_rest, 0.7, cond)[:, :, 0].abs().max() == 0


def test_replaced_frame_goes_straight_from_noise_to_image():
    model, cond, noise = tiny.video_model(tiny.REPLACE), tiny.condition(), tiny.latents()
    for times in ((1.0, 0.0), (1.0, 0.9, 0.2), (1.0, 0.8, 0.5, 0.1, 0.0)):
        end = sample(model, cond, noise, times)
        line = interpolate(cond.image, noise[:, :, :1], times[-1])
        assert torch.allclose(end[:, :, :1], line, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_tokens_of_all_frames(name: str):
    model, x, cond = tiny.video_model(name), tiny.latents(), tiny.condition()
    for feature in model.features(x, 0.5, cond, [3, 0]):
        assert feature.shape == (2, 3, 2, 3, 32)


@pytest.mark.parametrize("name", NAMES)
def test_images_that_are_missing_or_of_another_size_are_refused(name: str):
    model, x, cond = tiny.video_model(name), tiny.latents(), tiny.condition()
    with pytest.raises(AccVideoError, match="no image.*start image"):
        model.velocity(x, 0.5, cond.without_image())
    large = Condition(**{**cond.tensors(), "image": torch.zeros(2, 16, 1, 8, 6)})
    with pytest.raises(AccVideoError, match="video's width and height"):
        model.velocity(x, 0.5, large)
    with pytest.raises(AccVideoError, match="together with an image"):
        model.family.encode(None, ["a"], torch.device("cpu"))


def test_variants_are_told_apart_by_their_configurations():
    cls, pipeline = "HunyuanVideoTransformer3DModel", "HunyuanVideoImageToVideoPipeline"
    for name in NAMES:
        config = tiny.KINDS[name] | {"out_channels": 16}
        assert family_of(cls, config, pipeline) is FAMILIES[name]
        assert FAMILIES[name].latent_spec(config, {}).shape(9, 32, 32) == (16, 3, 4, 4)
    # SkyReels' network has no condition type, and more channels in than out.
    with pytest.raises(AccVideoError, match="not supported"):
        family_of(cls, {"in_channels": 32, "out_channels": 16}, "HunyuanSkyreelsImageToVideo")


def test_official_settings():
    concat, replace = FAMILIES[tiny.CONCAT], FAMILIES[tiny.REPLACE]
    assert (concat.guidance, replace.guidance) == (None, 6.0)
    assert concat.cfg is replace.cfg is None
    assert concat.time_grid() == replace.time_grid() == FAMILIES["hunyuan_video"].time_grid()


@pytest.mark.parametrize("key", ["concat_latent_image", "ref_latent"])
def test_stock_conditioning_with_an_image(key: str):
    text, pooled = torch.randn(2, 6, 8).half(), torch.randn(2, 4)
    image = torch.randn(1, 16, 2, 4, 6)
    extra = {"pooled_output": pooled, key: image, "guidance": 3.0}
    cond = FAMILIES[tiny.REPLACE].from_native(text, extra, tiny.SPEC)
    assert torch.equal(cond.text, text.float()) and cond.guidance.tolist() == [3.0, 3.0]
    assert torch.equal(cond.image, 0.5 * image[:, :, :1].expand(2, -1, -1, -1, -1))


def test_stock_conditioning_without_an_image_is_refused():
    extra = {"pooled_output": torch.randn(1, 4), "guiding_frame_index": 0}
    for name in NAMES:
        with pytest.raises(AccVideoError, match=r"HunyuanImageToVideo.*v1 \(concat\)"):
            FAMILIES[name].from_native(torch.ones(1, 6, 8), extra, tiny.SPEC)


@pytest.mark.parametrize("name", NAMES)
def test_folder_loads_as_its_family(name: str, tmp_path: Path):
    teacher = load_teacher(tiny.save_pipeline(tmp_path / "tiny", name))
    assert teacher.model.family is FAMILIES[name] and teacher.model.latent_spec.channels == 16
    image = torch.full((16, 24, 3), 0.5)
    assert teacher.vae.encode(image[None, None]).shape == (1, 16, 1, 4, 6)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_and_distilled(name: str, tmp_path: Path):
    teacher = tiny.video_model(name)
    prompts = [Prompt.of(f"clip {i}", tiny.condition(1, seed=10 + i)) for i in range(2)]
    spec = RecordSpec(9, 16, 24, steps=4, kept=4, batch_size=2, dtype="float32")
    dataset = record(teacher, prompts, spec, tmp_path / "data")
    end = dataset.read(dataset.ids()[0])
    image = dataset.prompt(end.prompt_id).condition.image
    assert image is not None
    same = torch.allclose(end.latents[-1][:, :1], image[0], atol=1e-6)
    assert same == (name == tiny.REPLACE)
    recipe = Recipe(student_steps=2, lora=LoraSpec(rank=2), train_steps=3, batch_size=2, lr=1e-2)
    losses = distill(teacher, dataset, recipe, tmp_path / "run").losses
    assert len(losses) == 3 and all(0 < loss < 1e3 for loss in losses)

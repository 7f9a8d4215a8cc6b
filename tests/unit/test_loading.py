"""Loading a teacher from a pipeline folder: what works, and one sentence for every fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoPipeline

from accvideo_core.conditioning import Condition
from accvideo_core.errors import AccVideoError
from accvideo_core.latents import LatentSpec, seeded_noise
from accvideo_core.models.loading import Teacher, load_teacher
from tests import tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_random_pipeline(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_weight(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["proj_out.bias"]
    save_file(tensors, path, metadata={"format": "pt"})


def test_teacher_is_frozen_and_knows_its_geometry(folder: Path):
    teacher = load_teacher(folder)
    assert not teacher.model.module.training
    assert not any(p.requires_grad for p in teacher.model.module.parameters())
    expected = LatentSpec(16, stride_t=4, stride_hw=4, scale=(0.5,), patch=2)
    assert teacher.model.latent_spec == expected and teacher.model.source == "tiny"
    assert load_teacher(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_prompts_are_those_of_diffusers_and_trimmed(folder: Path):
    pipeline = HunyuanVideoPipeline.from_pretrained(folder)
    texts = ["a red circle moving left", "a blue square"]
    with torch.no_grad():
        text, pooled, mask = pipeline.encode_prompt(texts, device=torch.device("cpu"))
    prompts = load_teacher(folder).encode_prompts(texts)
    for i, prompt in enumerate(prompts):
        cond = prompt.condition
        assert prompt.text == texts[i] and cond.guidance is not None
        assert torch.allclose(cond.text[0], text[i][mask[i].bool()], atol=1e-6)
        assert torch.allclose(cond.pooled, pooled[i : i + 1], atol=1e-6)
        assert cond.guidance.tolist() == [6.0] and cond.text.dtype == torch.float32
    assert prompts[0].condition.text.shape[1] == 6  # five words and the end of the turn


def test_guidance_and_number_of_prompts_are_the_callers(folder: Path):
    teacher = load_teacher(folder)
    prompts = teacher.encode_prompts(["a red circle"] * 2 + ["a blue square"] * 17, guidance=1.0)
    assert len(prompts) == 19 and {p.condition.guidance.item() for p in prompts} == {1.0}
    assert len({p.id for p in prompts}) == 2
    with pytest.raises(AccVideoError, match="list of prompts is empty"):
        teacher.encode_prompts([])


def test_everything_made_in_inference_mode_can_be_trained_on(folder: Path):
    with torch.inference_mode():
        teacher = load_teacher(folder).to("cpu", torch.float32)
        cond = teacher.encode_prompts(["a red circle"])[0].condition
        x = teacher.vae.encode(torch.rand(1, 5, 16, 16, 3))
    assert not any(p.is_inference() for p in teacher.model.module.parameters())
    weight = teacher.model.module.proj_out.weight.requires_grad_()
    teacher.model.velocity(x, 0.5, cond).square().mean().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_vae_is_diffusers_vae_in_model_space(folder: Path):
    vae = load_teacher(folder).vae
    x = seeded_noise((2, 16, 2, 4, 4), "vae")
    frames = vae.decode(x)
    assert frames.shape == (2, 5, 16, 16, 3) and 0 <= frames.min() < frames.max() <= 1
    with torch.no_grad():
        video = vae.module.decode(x / 0.5).sample
        mode = vae.module.encode(frames.permute(0, 4, 1, 2, 3) * 2 - 1).latent_dist.mode()
    assert torch.allclose(frames, (video / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1))
    assert torch.allclose(vae.encode(frames), mode * 0.5, atol=1e-6)


def test_vae_cuts_large_batches(folder: Path, monkeypatch: pytest.MonkeyPatch):
    vae = load_teacher(folder).vae
    x = seeded_noise((3, 16, 2, 4, 4), "vae")
    whole = vae.decode(x)
    monkeypatch.setattr("accvideo_core.models.vae.PIXELS_AT_ONCE", 1)
    assert torch.allclose(vae.decode(x), whole, atol=1e-5)


def test_vae_refuses_foreign_shapes(folder: Path):
    vae = load_teacher(folder).vae
    with pytest.raises(AccVideoError, match=r"expected \[B, T, H, W, 3\]"):
        vae.encode(torch.rand(1, 3, 5, 16, 16))
    with pytest.raises(AccVideoError, match="6 frames do not fit"):
        vae.encode(torch.rand(1, 6, 16, 16, 3))
    with pytest.raises(AccVideoError, match=r"expected \[B, 16"):
        vae.decode(torch.zeros(1, 4, 2, 4, 4))


def test_a_dataset_prompt_and_a_fresh_one_give_the_same_velocity(folder: Path):
    teacher = load_teacher(folder)
    prompts = teacher.encode_prompts(["a red circle moving left", "a blue square"])
    x = seeded_noise((2, 16, 2, 4, 4), "x")
    together = teacher.model.velocity(x, 0.5, Condition.cat([p.condition for p in prompts]))
    for i, prompt in enumerate(prompts):
        alone = teacher.model.velocity(x[i : i + 1], 0.5, prompt.condition)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-4)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "does not exist; check the path"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
    "index cut": (lambda f: cut(f / "model_index.json"), "model_index.json' is not valid JSON"),
    "pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="HunyuanVideoImageToVideoPipeline"),
        "HunyuanVideoImageToVideoPipeline is a kind of .* a folder of class HunyuanVideoPipeline",
    ),
    "network": (
        lambda f: edit(f / "model_index.json", transformer=["diffusers", "FluxTransformer2DModel"]),
        "'FluxTransformer2DModel' are not supported.*HunyuanVideoTransformer3DModel",
    ),
    "no network": (
        lambda f: edit(f / "model_index.json", transformer=[None, None]),
        "'none' are not supported",
    ),
    "vae class": (
        lambda f: edit(f / "vae/config.json", _class_name="AutoencoderKLTomorrow"),
        "has no class 'AutoencoderKLTomorrow'; update diffusers",
    ),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "lacks the folder 'vae'"),
    "no text": (lambda f: shutil.rmtree(f / "text_encoder_2"), "lacks the folder 'text_encoder_2'"),
    "no config": (
        lambda f: (f / "transformer/config.json").unlink(),
        "transformer/config.json' cannot be read",
    ),
    "no vae config": (lambda f: (f / "vae/config.json").unlink(), "vae' holds no VAE; give the fo"),
    "no weights": (
        lambda f: (f / "transformer" / WEIGHTS).unlink(),
        "transformer' holds no weights .* download the model again",
    ),
    "cut network": (
        lambda f: cut(f / "transformer" / WEIGHTS),
        f"transformer/{WEIGHTS}' is damaged or cut short",
    ),
    "cut vae": (lambda f: cut(f / "vae" / WEIGHTS), f"vae/{WEIGHTS}' is damaged or cut short"),
    "garbage": (
        lambda f: (f / "transformer" / WEIGHTS).write_bytes(b"\xff" * 1000),
        f"transformer/{WEIGHTS}' is damaged or cut short",
    ),
    "empty": (
        lambda f: (f / "transformer" / WEIGHTS).write_bytes(b""),
        f"transformer/{WEIGHTS}' is empty; download it again",
    ),
    "other size": (
        lambda f: edit(f / "transformer/config.json", num_attention_heads=2),
        r"has shape \(128,\) where the network has \(64,\); choose the file of one whole network",
    ),
    "missing key": (
        lambda f: drop_a_weight(f / "transformer" / WEIGHTS),
        r"lacks 1 of the network's weights \(such as proj_out.bias\)",
    ),
    "cut text": (
        lambda f: cut(f / "text_encoder/model.safetensors"),
        "text_encoder/model.safetensors' is damaged or cut short",
    ),
    "tokenizer": (
        lambda f: (f / "tokenizer/tokenizer.json").write_text("{}"),
        "could not be loaded",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_sentence(fault: str, broken: Path):
    plant, message = FAULTS[fault]
    plant(broken)
    with pytest.raises(AccVideoError, match=message) as caught:
        teacher = load_teacher(broken)
        assert teacher.vae is not None
        teacher.encode_prompts(["a red circle"])
    assert "\n" not in str(caught.value)


def test_nothing_is_unpickled(broken: Path):
    # A folder with pickled weights only is refused, whatever is in them.
    (broken / "transformer" / WEIGHTS).unlink()
    (broken / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(AccVideoError, match="holds no weights"):
        load_teacher(broken)


def test_prompts_are_encoded_alone_and_at_their_turn(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """So that the numbers of one never follow from its neighbours, and none is held."""
    pipeline, encoded = HunyuanVideoPipeline.encode_prompt, []

    def counted(self: HunyuanVideoPipeline, prompt: list[str], **options: object) -> object:
        encoded.append(prompt)
        return pipeline(self, prompt, **options)

    monkeypatch.setattr(HunyuanVideoPipeline, "encode_prompt", counted)
    teacher = load_teacher(folder)
    texts = ["a red circle", "a blue square moving left"]
    for number, prompt in enumerate(teacher.encode_each((text, None) for text in texts)):
        assert encoded == [[text] for text in texts[: number + 1]]
        assert torch.is_grad_enabled() and not prompt.condition.text.requires_grad
        (alone,) = teacher.encode_prompts([texts[number]])
        assert encoded.pop() == [texts[number]]
        assert alone.id == prompt.id
        assert alone.condition.fingerprint() == prompt.condition.fingerprint()


def test_the_tokenizer_comes_without_the_encoders(folder: Path, broken: Path):
    for weights in broken.glob("text_encoder*/*.safetensors"):
        weights.write_bytes(b"")
    teacher = load_teacher(broken)
    tokens = teacher.tokenizer("a red circle")["input_ids"]
    with pytest.raises(AccVideoError, match="text_encoder"):
        teacher.encode_prompts(["a red circle"])
    whole = load_teacher(folder)
    assert whole.encode_prompts(["a red circle"])
    assert whole.tokenizer("a red circle")["input_ids"] == tokens
    assert Teacher(whole.model, folder / "transformer").tokenizer is None

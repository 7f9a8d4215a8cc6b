"""LoRA files of every trainer are read as their makers meant, and bad ones are named."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accvideo_core.errors import AccVideoError
from accvideo_core.models import FAMILIES, VideoModel
from accvideo_core.models.keys.spelling import native_spelling
from accvideo_core.models.lora import DiffDelta, LoraDelta, apply_loras, match_lora
from accvideo_core.models.lora_file import read_lora
from tests import tiny_families, tiny_wan
from tests.lora_files import (
    ENDINGS,
    NAMINGS,
    RANK,
    Namer,
    comfy,
    factors_of,
    native_shapes,
    write,
)


@pytest.mark.parametrize("spelling", ["tencent", "comfy", "diffusers"])
@pytest.mark.parametrize("name", ["hunyuan_video", "wan_t2v"])
def test_every_spelling_gives_the_same_deltas(name: str, spelling: str, tmp_path: Path) -> None:
    model = tiny_families.case(name).model
    factors = factors_of(native_shapes(model))
    reference = match_lora(write(tmp_path / "r.safetensors", factors), model).deltas
    expected = {d.layer: d for d in reference}
    rename: Namer = comfy if spelling == "comfy" else str
    if spelling == "diffusers":
        factors = {d.layer: (d.a, d.b) for d in reference if isinstance(d, LoraDelta)}
    for naming, ending in itertools.product(NAMINGS, ENDINGS):
        alpha = 1.5 if ENDINGS[ending][2] else None
        path = write(tmp_path / "a.safetensors", factors, naming, ending, alpha, rename)
        found = match_lora(path, model)
        assert found.unmatched == (), (naming, ending)
        assert sorted(d.layer for d in found.deltas) == sorted(expected)
        for one in found.deltas:
            other = expected[one.layer]
            assert isinstance(one, LoraDelta) and isinstance(other, LoraDelta)
            assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)
            assert one.scale == (1.0 if alpha is None else alpha / RANK)


def test_comfys_spelling_is_what_comfy_calls_them() -> None:
    for layer in native_shapes(tiny.video_model()):
        assert native_spelling(comfy(layer)) == layer
    assert comfy("double_blocks.0.img_attn_qkv") == "double_blocks.0.img_attn.qkv"


def effective(deltas: tuple[LoraDelta | DiffDelta, ...]) -> dict[str, Tensor]:
    return {
        f"{d.layer}.{d.kind}": d.scale * d.b @ d.a if isinstance(d, LoraDelta) else d.value
        for d in deltas
    }


def theirs(converted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Effective changes in a file of diffusers' converters."""
    found = {}
    for name, a in converted.items():
        layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        if name.endswith(".lora_A.weight"):
            found[f"{layer}.weight"] = converted[f"transformer.{layer}.lora_B.weight"] @ a
        elif name.endswith(".lora_B.bias"):
            layer = name.removeprefix("transformer.").removesuffix(".lora_B.bias")
            found[f"{layer}.bias"] = a
    return found


def test_full_width_hunyuan_video_is_read_as_diffusers_converter_reads_it(tmp_path: Path) -> None:
    from diffusers import HunyuanVideoTransformer3DModel
    from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers

    with torch.device("meta"):  # the converter knows width 3072 only
        network = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1)
    model = VideoModel(network, FAMILIES["hunyuan_video"], tiny.SPEC)
    shapes = native_shapes(model)
    # In the refiner and the last layer the converter cuts up A, whose rows are ranks, like B.
    chosen = {n: s for n, s in shapes.items() if n.startswith(("double_blocks", "single_blocks"))}
    assert chosen["single_blocks.0.linear1"] == (21504, 3072)
    generator = torch.Generator().manual_seed(0)
    factors = {
        n: (torch.randn(1, s[1], generator=generator), torch.randn(s[0], 1, generator=generator))
        for n, s in chosen.items()
    }
    path = write(tmp_path / "a.safetensors", factors)
    mine = {d.layer: d for d in match_lora(path, model).deltas}
    converted = _convert_hunyuan_video_lora_to_diffusers(load_file(path))
    assert {f"transformer.{n}.lora_A.weight" for n in mine} < converted.keys()
    assert len(converted) == 2 * len(mine) == 40
    for layer, delta in mine.items():
        assert isinstance(delta, LoraDelta)
        assert torch.equal(delta.a, converted[f"transformer.{layer}.lora_A.weight"])
        assert torch.equal(delta.b, converted[f"transformer.{layer}.lora_B.weight"])


@pytest.mark.parametrize("name", ["wan_t2v", "wan_i2v"])
def test_wan_files_are_read_as_diffusers_converters_read_them(name: str, tmp_path: Path) -> None:
    from diffusers.loaders import lora_conversion_utils as diffusers_loras

    model = tiny_wan.video_model(name)
    factors = factors_of(native_shapes(model))
    blocks = {n: f for n, f in factors.items() if n.startswith("blocks.")}
    biases = {f"diffusion_model.{n}.diff_b": torch.ones(b.shape[0]) for n, (_, b) in blocks.items()}
    plain = write(tmp_path / "plain.safetensors", blocks, ending="down/up", alpha=2.0, extra=biases)
    convert = diffusers_loras._convert_non_diffusers_wan_lora_to_diffusers
    expected = theirs(convert(load_file(plain)))
    mine = effective(match_lora(plain, model).deltas)
    assert mine.keys() == expected.keys() and len(mine) == 2 * len(blocks)
    for key, value in mine.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)

    musubi = write(tmp_path / "musubi.safetensors", blocks, "kohya", "down/up", 2.0)
    convert = diffusers_loras._convert_musubi_wan_lora_to_diffusers
    expected = theirs(convert(load_file(musubi)))
    mine = effective(match_lora(musubi, model).deltas)
    assert mine.keys() == expected.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)


def test_pefts_own_alpha_is_used(tmp_path: Path) -> None:
    model = tiny.video_model()
    layer = "transformer_blocks.0.attn.to_q"
    a, b = torch.ones(RANK, 32), torch.ones(32, RANK)
    tensors = {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}
    path = tmp_path / "adapter_model.safetensors"

    def scale(settings: dict[str, object] | None, beside: dict[str, object] | None = None) -> float:
        header = {"lora_adapter_metadata": json.dumps(settings)} if settings else {}
        save_file(tensors, path, {"format": "pt", **header})
        (tmp_path / "adapter_config.json").write_text(json.dumps(beside or {}))
        (delta,) = match_lora(path, model).deltas
        return delta.scale

    assert scale(None) == 1.0
    assert scale({"transformer.r": 3, "transformer.lora_alpha": 6}) == 2.0
    pattern = {"transformer.alpha_pattern": {"attn.to_q": 9}, "transformer.lora_alpha": 6}
    assert scale(pattern) == 3.0
    assert scale(None, {"r": 3, "lora_alpha": 12}) == 4.0
    rooted = {"lora_alpha": 6, "use_rslora": True}
    assert scale(None, rooted) == pytest.approx(6 / RANK**0.5)


def test_a_partial_match_warns_and_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = tiny_families.case("wan_t2v")
    factors = factors_of(native_shapes(tiny_wan.video_model("wan_i2v")))
    strange = {"some.tensor": torch.ones(1)}
    path = write(tmp_path / "i2v.safetensors", factors, extra=strange)
    with caplog.at_level(logging.WARNING):
        found = match_lora(path, case.model)
    lost = {f"diffusion_model.{n}" for n in factors if "_img" in n or n.startswith("img_emb")}
    assert set(found.unmatched) == lost | {"some.tensor"}
    assert f"{len(lost) + 1} names of LoRA i2v.safetensors have no place in tiny" in caplog.text
    assert "diffusion_model.blocks.0.cross_attn.k_img" in caplog.text
    assert len(found.deltas) == len(factors) - len(lost)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["diffusion_model.blocks.0.self_attn.q"], "Wan"),
        (["lora_unet_blocks_0_cross_attn_k"], "Wan"),
        (["transformer.blocks.3.attn1.to_q"], "Wan"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in"], "Stable Diffusion or SDXL"),
        (["transformer.transformer_blocks.0.attn1.to_q"], "CogVideoX or LTX-Video"),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1"], "a text encoder"),
    ],
)
def test_a_lora_for_something_else_is_named(names: list[str], kind: str, tmp_path: Path) -> None:
    tensors = {f"{n}.lora_A.weight": torch.ones(1, 4) for n in names}
    tensors |= {f"{n}.lora_B.weight": torch.ones(4, 1) for n in names}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(AccVideoError, match=f"matches no layer .* it seems to be for {kind}"):
        apply_loras(tiny.video_model(), [(tmp_path / "other.safetensors", 1.0)])


def test_flux_is_not_taken_for_hunyuan_video(tmp_path: Path) -> None:
    tensors = {}
    for stack, count in (("double_blocks.{}.img_attn.proj", 19), ("single_blocks.{}.linear2", 38)):
        for i in range(count):
            tensors[f"diffusion_model.{stack.format(i)}.lora_A.weight"] = torch.ones(1, 32)
            tensors[f"diffusion_model.{stack.format(i)}.lora_B.weight"] = torch.ones(32, 1)
    save_file(tensors, tmp_path / "flux.safetensors")
    with pytest.raises(AccVideoError, match="flux.safetensors' is for Flux"):
        apply_loras(tiny.video_model(), [(tmp_path / "flux.safetensors", 1.0)])


def test_bad_files_are_one_sentence(tmp_path: Path) -> None:
    model = tiny.video_model()
    factors = factors_of(native_shapes(model))
    good = write(tmp_path / "good.safetensors", factors)

    def refused(path: Path, message: str) -> None:
        with pytest.raises(AccVideoError, match=message):
            apply_loras(model, [(path, 1.0)])

    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-50])
    refused(tmp_path / "cut.safetensors", "cut.safetensors' is damaged or cut short")
    refused(tmp_path / "missing.safetensors", "missing.safetensors' does not exist")
    save_file({"x.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "model.safetensors holds no LoRA .*'x.weight'")
    wide = {n: (torch.cat([a, a], 1), torch.cat([b, b])) for n, (a, b) in factors.items()}
    refused(write(tmp_path / "wide.safetensors", wide), "is for a HunyuanVideo of another size")
    for kind, ending in (("DoRA", "dora_scale"), ("LoKr", "lokr_w1"), ("LoHa", "hada_w1_a")):
        extra = {f"diffusion_model.final_layer.linear.{ending}": torch.ones(2)}
        refused(
            write(tmp_path / "x.safetensors", factors, extra=extra), f"x.safetensors is a {kind}"
        )
    lone = {"diffusion_model.final_layer.linear.lora_A.weight": torch.ones(1, 32)}
    some = {n: f for n, f in factors.items() if n != "final_layer.linear"}
    refused(write(tmp_path / "lone.safetensors", some, extra=lone), "only one of its two factors")
    bad = {"final_layer.linear": (torch.ones(2, 32), torch.ones(16, 3))}
    refused(write(tmp_path / "bad.safetensors", bad), "do not multiply")


def test_reading_keeps_what_is_no_lora_apart(tmp_path: Path) -> None:
    factors = {"final_layer.linear": (torch.ones(2, 32), torch.ones(16, 2))}
    extra = {"strange": torch.ones(1)}
    path = write(tmp_path / "a.safetensors", factors, ending="down/up", alpha=4.0, extra=extra)
    raw = read_lora(path)
    assert raw.others == ("strange",)
    assert raw.layers["diffusion_model.final_layer.linear"].alpha == 4.0

"""Products in fp8: rounded as said, near what they stand for, and gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_families
import tiny_wan
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from tiny import randomise
from torch import Tensor, nn
from updates import FarAway

from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.errors import AccVideoError
from accvideo_core.models import FAMILIES, VideoModel, fp8
from accvideo_core.models.fp8 import (
    FP8,
    fp8_products,
    product_for,
    rounded_rows,
    scaled_afterwards,
    scaled_rows,
)
from accvideo_core.models.loading import load_teacher
from accvideo_core.models.packing import pack_fp8, pack_weights
from accvideo_core.models.quantised import Fp8Linear
from accvideo_core.models.swapping import spread_blocks, swapped_blocks
from accvideo_core.models.tiny import embedded_teacher_path

CPU = torch.device("cpu")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(name: str) -> tiny_families.Case:
    """A family's tiny network; Wan's a little wider, since fp8 wants multiples of 16."""
    if name != "wan_t2v":
        return tiny_families.case(name)
    family = FAMILIES[name]
    module = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=tiny_wan.TEXT,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=32,
    )
    randomise(module)
    module.eval().requires_grad_(False)
    model = VideoModel(module, family, family.latent_spec(module.config, {}), "tiny")
    return tiny_families.Case(model, tiny_wan.latents(name), tiny_wan.condition(name))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def velocities(one: tiny_families.Case, model: VideoModel | None = None) -> Tensor:
    return one.velocities(model or one.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_once_to_numbers_of_four_bits(dtype: torch.dtype):
    sizes = torch.tensor([1e-4, 1.0, 30.0, 6e4])[:, None]
    x = (numbers(4, 64).clamp(-1, 1) * sizes).to(dtype)
    rounded, scale = rounded_rows(x)
    assert rounded.dtype == FP8 and scale.shape == (4, 1)
    assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))
    back, exact = rounded.float() * scale, x.float()
    # Half of the last of 4 bits; below 2^-6 of the scale, half of 2^-9.
    bound = torch.maximum(exact.abs() / 16, scale * 2.0**-10)
    assert ((back - exact).abs() <= bound).all()
    assert (rounded.float().abs().amax(dim=1) > 448 / 2 - 16).all()  # no bit is given away


def test_a_row_of_zeros_stays_one_and_one_of_nan_is_seen():
    x = torch.zeros(2, 32)
    x[1, 3] = float("nan")
    rounded, scale = rounded_rows(x)
    back = rounded.float() * scale
    assert torch.equal(back[0], torch.zeros(32)) and back[1].isnan().any()


@pytest.mark.parametrize("product", [scaled_rows, scaled_afterwards])
@pytest.mark.parametrize("public", [True, False])
def test_products_are_those_of_the_rounded_numbers(
    product: fp8.Product, public: bool, monkeypatch: pytest.MonkeyPatch
):
    if not public:
        monkeypatch.delattr(F, "scaled_mm", raising=False)
    sizes = torch.logspace(-2, 2, 7)[:, None]
    x, x_scale = rounded_rows(numbers(7, 32) * sizes)
    layer = pack_fp8(numbers(48, 32, seed=1) * torch.logspace(-1, 1, 48)[:, None])
    assert layer.scale is not None
    found = product(x, x_scale, layer.weight.view(FP8), layer.scale)
    expected = (x.float() * x_scale) @ layer.dense(torch.float32).t()
    assert found.dtype == torch.bfloat16
    # Of the sums' own size: rounded to bfloat16 at the end, before or after the scales.
    size = (x.float() * x_scale).norm(dim=1)[:, None] * layer.dense(torch.float32).norm(dim=1)
    assert ((found.float() - expected).abs() <= size / 100).all()


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("hunyuan_video", 0.08),
        ("hunyuan_video_i2v_replace", 0.04),
        ("wan_t2v", 0.06),
        ("cogvideox_2b", 0.03),
        ("cogvideox_5b", 0.03),
        ("cogvideox_1_5", 0.03),
    ],
)
def test_every_family_is_near_itself_and_afterwards_is_itself(name: str, bound: float):
    one = case(name)
    exact, structure = velocities(one), list(one.model.module.named_modules())
    with fp8_products(one.model):
        found = velocities(one)
    assert 0.002 < error(found, exact) < bound
    assert torch.equal(velocities(one), exact)
    assert list(one.model.module.named_modules()) == structure


def test_the_embedded_teacher_is_near_itself():
    teacher = load_teacher(embedded_teacher_path())
    (prompt,) = teacher.encode_prompts(["a red circle moving right"])
    x = numbers(1, *teacher.model.latent_spec.shape(17, 32, 32))
    with torch.no_grad():
        exact = teacher.model.velocity(x, 0.7, prompt.condition)
        with fp8_products(teacher.model):
            found = teacher.model.velocity(x, 0.7, prompt.condition)
    assert 0.002 < error(found, exact) < 0.12


def test_it_takes_the_layers_of_the_tokens_and_no_other():
    one = case("hunyuan_video")
    network: Any = one.model.module
    with fp8_products(one.model):
        changed = [name for name, m in network.named_modules() if isinstance(m, Fp8Linear)]
    assert len(changed) == 2 * 12 + 2 * 5
    assert "transformer_blocks.0.attn.to_q" in changed
    assert "single_transformer_blocks.1.proj_out" in changed
    assert not any("norm" in name or "embed" in name or name == "proj_out" for name in changed)
    # Wan's tiny network is 24 wide.
    narrow = tiny_families.case("wan_t2v")
    with fp8_products(narrow.model):
        assert not any(isinstance(m, Fp8Linear) for m in narrow.model.module.modules())


def test_weights_that_are_packed_serve_as_they_lie(monkeypatch: pytest.MonkeyPatch):
    one, other = case("wan_t2v"), case("wan_t2v")
    with fp8_products(one.model):
        expected = velocities(one)
    packed = pack_weights(other.model, "fp8")
    monkeypatch.setattr(fp8, "pack_fp8", lambda *_: pytest.fail("packed again"))
    with fp8_products(packed):
        found = velocities(other, packed)
    # But for the modulation's layers, which are packed and not multiplied in fp8.
    assert error(found, expected) < 0.05
    layer = packed.module.get_submodule("blocks.0.attn1.to_q")
    assert isinstance(layer, Fp8Linear)
    x = numbers(2, 3, 32)
    with fp8_products(packed), torch.no_grad():
        y = packed.module.get_submodule("blocks.0.attn1.to_q")(x)
    exact = F.linear(x, layer.dense(torch.float32), layer.bias)
    assert 0.002 < error(y, exact) < 0.05


@pytest.mark.parametrize("scale", [None, torch.tensor(0.5)], ids=["no scale", "one scale"])
def test_packed_weights_may_have_one_scale_or_none(scale: Tensor | None):
    one = case("wan_t2v")
    weight = numbers(32, 32).to(FP8)
    layer = Fp8Linear(weight, scale, numbers(32))
    one.model.module.get_submodule("blocks.0.attn1").to_q = layer
    x = numbers(5, 32, seed=3)
    with fp8_products(one.model), torch.no_grad():
        y = one.model.module.get_submodule("blocks.0.attn1.to_q")(x)
    assert 0.002 < error(y, F.linear(x, layer.dense(torch.float32), layer.bias)) < 0.05


def student_of(model: VideoModel) -> Student:
    info = StudentInfo(
        family=model.family.name,
        base=model.fingerprint,
        key_times=(1.0, 0.0),
        guidance=None,
        lora=LoraSpec(rank=4),
        latent_spec=model.latent_spec,
        frames=5,
        height=32,
        width=32,
    )
    student = Student.create(model, info)
    with torch.no_grad():
        for i, p in enumerate(student.trainable().values()):
            p.copy_(0.1 * numbers(*p.shape, seed=i))
    return student


def test_a_student_multiplies_its_base_in_fp8_and_its_adapters_in_bfloat16():
    one = case("hunyuan_video")
    one.model.module.to(torch.bfloat16)
    student = student_of(one.model)
    before = {name: p.clone() for name, p in student.trainable().items()}
    exact = velocities(one, student.model).float()
    seen = []
    lora: Any = student.model.module.get_submodule("transformer_blocks.0.attn.to_q.lora_A.default")
    lora.register_forward_hook(lambda _m, args, out: seen.append((args[0].dtype, out.dtype)))
    with fp8_products(student.model):
        found = velocities(one, student.model).float()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert 0.002 < error(found, exact) < 0.1
    for name, p in student.trainable().items():
        assert p.dtype == torch.float32 and torch.equal(p, before[name])
    assert torch.equal(velocities(one, student.model).float(), exact)


def test_swapped_blocks_multiply_in_fp8_what_was_packed():
    one = case("wan_t2v")
    packed = pack_weights(one.model, "fp8")
    with fp8_products(packed):
        expected = velocities(one, packed)
    transfer = FarAway()
    with fp8_products(packed), swapped_blocks([spread_blocks(packed, 3)], transfer):
        found = velocities(one, packed)
    assert torch.equal(found, expected) and transfer.started > 3


def test_where_gradients_are_asked_for_products_are_plain():
    one = case("wan_t2v")
    layer: Any = one.model.module.get_submodule("blocks.0.ffn.net.2")
    x = numbers(3, 64).requires_grad_(True)
    with fp8_products(one.model):
        y = one.model.module.get_submodule("blocks.0.ffn.net.2")(x)
    assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias)) and y.requires_grad


def test_cards_without_fp8_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 3090")
    with pytest.raises(AccVideoError, match="RTX 3090 has compute capability 8.6.*leave fp8 off"):
        product_for(torch.device("cuda"))


def test_what_a_device_can_is_found_out(monkeypatch: pytest.MonkeyPatch):
    def cannot(*_: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nat line 3")

    assert product_for(CPU) is scaled_rows
    monkeypatch.setattr(fp8, "scaled_rows", cannot)
    assert product_for(CPU) is scaled_afterwards
    monkeypatch.setattr(fp8, "scaled_afterwards", cannot)
    with pytest.raises(AccVideoError, match=r"cannot multiply fp8 on cpu \(no such kernel\)"):
        product_for(CPU)

"""LoRAs on a network: merged or kept beside its weights, on the layers that they name alone."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accvideo_core.errors import AccVideoError
from accvideo_core.models.lora import LoraDelta, apply_loras, match_lora
from accvideo_core.models.lora_layout import fuse, split, truncate
from accvideo_core.models.quantised import AdaptedLinear, Fp8Linear
from tests import tiny_families
from tests.lora_files import (
    RANK,
    changed,
    factors_of,
    native_shapes,
    packed,
    products,
    table_of,
    with_both,
    write,
)


@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_a_native_lora_changes_the_network_as_the_sum_of_native_weights(
    name: str, tmp_path: Path
) -> None:
    case = tiny_families.case(name)
    factors = factors_of(native_shapes(case.model))
    path = write(tmp_path / "a.safetensors", factors)
    expected = case.velocities(with_both(case.model, products(factors, 0.5)))
    before = case.velocities(case.model)
    assert (expected - before).abs().max() > 1e-2
    for how in ("merge", "adapter"):
        model = apply_loras(case.model, [(path, 0.5)], how=how)
        torch.testing.assert_close(case.velocities(model), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(case.velocities(case.model), before)


@pytest.mark.parametrize("name", ["hunyuan_video", "wan_t2v", "cogvideox_5b"])
def test_merging_keeping_and_peft_give_one_velocity(name: str, tmp_path: Path) -> None:
    case = tiny_families.case(name)
    path = write(tmp_path / "a.safetensors", factors_of(native_shapes(case.model)))
    deltas = [d for d in match_lora(path, case.model).deltas if isinstance(d, LoraDelta)]
    state = {f"transformer.{d.layer}.lora_A.weight": d.a.clone() for d in deltas}
    state |= {f"transformer.{d.layer}.lora_B.weight": d.b.clone() for d in deltas}
    network = copy.deepcopy(case.model.module)
    network.load_lora_adapter(state, prefix="transformer")  # pyright: ignore
    expected = case.velocities(replace(case.model, module=network))
    save_file(state, tmp_path / "diffusers.safetensors")
    for file in (path, tmp_path / "diffusers.safetensors"):
        for how in ("merge", "adapter"):
            found = case.velocities(apply_loras(case.model, [(file, 1.0)], how=how))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_full_differences_of_weights_biases_norms_and_parameters(tmp_path: Path) -> None:
    case = tiny_families.case("wan_t2v")
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "head.head.diff": ("head.head.weight", (64, 24)),
        "head.head.diff_b": ("head.head.bias", (64,)),
        "patch_embedding.diff": ("patch_embedding.weight", (24, 16, 1, 2, 2)),
        "blocks.1.norm3.diff": ("blocks.1.norm3.weight", (24,)),
        "blocks.1.norm3.diff_b": ("blocks.1.norm3.bias", (24,)),
        "blocks.0.self_attn.norm_q.diff": ("blocks.0.self_attn.norm_q.weight", (24,)),
        "blocks.2.modulation.diff": ("blocks.2.modulation", (1, 6, 24)),
        "head.modulation.diff": ("head.modulation", (1, 2, 24)),
        "blocks.0.self_attn.q.diff_b": ("blocks.0.self_attn.q.bias", (24,)),
    }
    values = {n: torch.randn(shape, generator=generator) for n, (_, shape) in shapes.items()}
    save_file({f"diffusion_model.{n}": x for n, x in values.items()}, tmp_path / "d.safetensors")
    native = {shapes[n][0]: 0.5 * x for n, x in values.items()}
    expected = case.velocities(changed(case.model, native))
    for how in ("merge", "adapter"):
        model = apply_loras(case.model, [(tmp_path / "d.safetensors", 0.5)], how=how)
        torch.testing.assert_close(case.velocities(model), expected, rtol=1e-5, atol=1e-5)


def test_loras_add_up_and_share_what_they_leave_alone(tmp_path: Path) -> None:
    case = tiny_families.case("hunyuan_video")
    base, shapes = case.model, native_shapes(case.model)
    some = {n: s for n, s in shapes.items() if n.startswith("single_blocks.1")}
    one, two = factors_of(some, 1), factors_of(some, 2)
    files = [
        (write(tmp_path / "one.safetensors", one), 0.5),
        (write(tmp_path / "two.safetensors", two, ending="down/up", alpha=6.0), -1.0),
    ]
    values = {n: p.clone() for n, p in base.module.named_parameters()}
    fingerprint = base.fingerprint
    native = {n: 0.5 * x - 2 * products(two)[n] for n, x in products(one).items()}
    expected = case.velocities(changed(base, native))
    for how in ("merge", "adapter"):
        model = apply_loras(base, files, how=how)
        torch.testing.assert_close(case.velocities(model), expected, rtol=1e-4, atol=1e-5)
        shared = {id(p) for p in base.module.parameters()}
        own = [n for n, p in model.module.named_parameters() if id(p) not in shared]
        assert own and all("single_transformer_blocks.1." in n for n in own)
        assert model.source == "tiny + one.safetensors x 0.5 + two.safetensors x -1"
        assert not any(p.requires_grad for p in model.module.parameters())
    assert base.fingerprint == fingerprint
    assert all(torch.equal(p, values[n]) for n, p in base.module.named_parameters())


def test_the_fingerprint_tells_loras_apart_but_not_how_they_are_kept(tmp_path: Path) -> None:
    model = tiny.video_model()
    shapes = native_shapes(model)
    a = write(tmp_path / "a.safetensors", factors_of(shapes, 1))
    b = write(tmp_path / "b.safetensors", factors_of(shapes, 2))
    prints = [
        model.fingerprint,
        *(apply_loras(model, files).fingerprint
          for files in ([(a, 1.0)], [(a, 0.5)], [(b, 1.0)], [(a, 1.0), (b, 1.0)])),
    ]  # fmt: skip
    assert len(set(prints)) == len(prints)
    for how in ("merge", "adapter"):
        assert apply_loras(model, [(b, 1.0), (a, 1.0)], how=how).fingerprint == prints[-1]
        assert apply_loras(model, [(a, 0.0)], how=how).fingerprint == model.fingerprint


def test_merging_in_bfloat16_rounds_once(tmp_path: Path) -> None:
    model = tiny.video_model()
    model.module.to(torch.bfloat16)
    factors = factors_of({"final_layer.linear": native_shapes(model)["final_layer.linear"]})
    files = [(write(tmp_path / f"{i}.safetensors", factors), s) for i, s in enumerate((0.3, 0.01))]
    weight = model.module.proj_out.weight  # pyright: ignore
    a, b = factors["final_layer.linear"]
    merged = apply_loras(model, files).module.proj_out.weight  # pyright: ignore
    assert merged.dtype == torch.bfloat16
    exact = weight.double() + 0.31 * (b @ a).double()
    assert (merged.double() - exact).abs().max() <= (exact.abs() * 2**-8).max()
    assert torch.equal(merged, (weight.float() + 0.3 * (b @ a) + 0.01 * (b @ a)).bfloat16())


def test_quantised_layers_keep_their_loras_beside_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = tiny_families.case("wan_t2v")
    model = packed(case.model)
    dense = copy.deepcopy(model.module)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, Fp8Linear):
            plain = nn.Linear(layer.in_features, layer.out_features)
            plain.weight.data, plain.bias = layer.dense(torch.float32), layer.bias
            path, _, last = name.rpartition(".")
            setattr(dense.get_submodule(path), last, plain)
    reference = replace(case.model, module=dense, _fingerprint="")
    factors = factors_of(native_shapes(case.model))
    extra = {"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(40)}
    extra["diffusion_model.blocks.0.self_attn.q.diff"] = torch.ones(24, 24)
    del factors["blocks.0.self_attn.q"]
    path = write(tmp_path / "a.safetensors", factors, extra=extra)
    native = products(factors) | {"blocks.0.ffn.0.bias": torch.ones(40)}
    native["blocks.0.self_attn.q.weight"] = torch.ones(24, 24)
    expected = case.velocities(changed(reference, native))
    with caplog.at_level(logging.WARNING):
        merged = apply_loras(model, [(path, 1.0)])
    assert "30 layers are quantised and keep their LoRAs beside their weights" in caplog.text
    torch.testing.assert_close(case.velocities(merged), expected, rtol=1e-4, atol=1e-5)
    kinds = {type(m) for m in merged.module.modules()}
    assert AdaptedLinear in kinds and type(merged.module.proj_out) is nn.Linear  # pyright: ignore
    again = apply_loras(merged, [(path, -1.0)])
    torch.testing.assert_close(case.velocities(again), case.velocities(model), rtol=1e-4, atol=1e-4)


def test_two_experts_take_their_own_files(tmp_path: Path) -> None:
    case = tiny_families.case("wan22_t2v")
    high = case.model.module.high  # pyright: ignore
    factors = factors_of(native_shapes(case.model))
    path = write(tmp_path / "a.safetensors", factors)
    native = products(factors)
    for expert in ("high", "low"):
        expected = case.velocities(changed(case.model, native, expert))
        model = apply_loras(case.model, [(path, 1.0)], experts=expert)
        torch.testing.assert_close(case.velocities(model), expected, rtol=1e-4, atol=1e-5)
        said = tmp_path / "said.safetensors"
        save_file(load_file(path), said, {"accvideo.expert": expert})
        model = apply_loras(case.model, [(said, 1.0)])
        torch.testing.assert_close(case.velocities(model), expected, rtol=1e-4, atol=1e-5)
    assert model.module.high.proj_out.weight is high.proj_out.weight  # pyright: ignore

    second = factors_of(native_shapes(case.model), 9)
    names = table_of(case.model)
    both = {}
    for prefix, chosen in (("transformer", factors), ("transformer_2", second)):
        for layer, (a, b) in chosen.items():
            ours = names.parts(layer)[0].layer
            both |= {f"{prefix}.{ours}.lora_A.weight": a, f"{prefix}.{ours}.lora_B.weight": b}
    save_file(both, tmp_path / "both.safetensors")
    only = {n: x for n, x in both.items() if n.startswith("transformer_2.")}
    save_file(only, tmp_path / "only.safetensors")
    model = apply_loras(case.model, [(tmp_path / "only.safetensors", 1.0)])
    expected = changed(case.model, products(second), "low")
    torch.testing.assert_close(
        case.velocities(model), case.velocities(expected), rtol=1e-4, atol=1e-5
    )
    expected = changed(changed(case.model, native, "high"), products(second), "low")
    model = apply_loras(case.model, [(tmp_path / "both.safetensors", 1.0)])
    torch.testing.assert_close(
        case.velocities(model), case.velocities(expected), rtol=1e-4, atol=1e-5
    )


def test_bad_choices_are_named(tmp_path: Path) -> None:
    model = tiny.video_model()
    for choice, message in (
        ({"how": "add"}, "how is 'add'; it must be one of merge, adapter"),
        ({"experts": "middle"}, "experts is 'middle'"),
        ({"experts": "low"}, "experts is 'low', but tiny is one network"),
    ):
        with pytest.raises(AccVideoError, match=message):
            apply_loras(model, [], **choice)
    with pytest.raises(AccVideoError, match="strength of x is nan"):
        apply_loras(model, [(Path("x"), float("nan"))])


def test_works_inside_inference_mode_and_students_grow_on_it(tmp_path: Path) -> None:
    from test_student import make

    case = tiny_families.case("hunyuan_video")
    path = write(tmp_path / "a.safetensors", factors_of(native_shapes(case.model)))
    for how in ("merge", "adapter"):
        with torch.inference_mode():
            model = apply_loras(case.model, [(path, 1.0)], how=how)
        student = make(model)
        v = student.velocity(case.x, 0.5, case.condition)
        assert torch.equal(v, model.velocity(case.x, 0.5, case.condition))
        v.square().mean().backward()
        assert all(p.grad is not None for n, p in student.trainable().items() if "lora_B" in n)
        assert student.model.fingerprint == model.fingerprint != case.model.fingerprint


# Layout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_families.NAMES)
def test_fusing_is_exact_and_undone_bit_for_bit(name: str) -> None:
    model = tiny_families.case(name).model
    table, shapes = table_of(model), native_shapes(model)
    generator = torch.Generator().manual_seed(0)
    adapters, ones = {}, {}
    for native, (_, width) in shapes.items():
        for part in table.parts(native):
            a = torch.randn(RANK, width, generator=generator)
            b = torch.randn(part.rows, RANK, generator=generator)
            adapters[part.layer] = a, b
            ones[f"{part.layer}.weight"] = b @ a
    fused = fuse(table, adapters)
    assert fused.keys() == shapes.keys()
    whole = table.to_native(ones)
    for native, (a, b) in fused.items():
        assert a.shape[0] == RANK * len(table.parts(native))
        torch.testing.assert_close(b @ a, whole[f"{native}.weight"], rtol=1e-6, atol=1e-6)
        for layer, (back_a, back_b) in split(table, native, a, b).items():
            assert torch.equal(back_a, adapters[layer][0])
            assert torch.equal(back_b, adapters[layer][1])


def test_fusing_some_parts_of_a_layer() -> None:
    model = tiny.video_model()
    table, native = table_of(model), "single_blocks.0.linear1"
    parts = table.parts(native)
    chosen = {p.layer: (torch.randn(2, 32), torch.randn(p.rows, 2)) for p in (parts[1], parts[3])}
    a, b = fuse(table, chosen)[native]
    assert a.shape == (4, 32) and not b[: parts[0].stop].any()
    for layers in (None, set(chosen)):
        back = split(table, native, a, b, layers)
        assert back.keys() == chosen.keys()
        for layer, (x, y) in chosen.items():
            assert torch.equal(back[layer][0], x) and torch.equal(back[layer][1], y)
    zero = split(table, native, a, torch.zeros_like(b), set(chosen))
    assert all(torch.equal(zero[n][0], chosen[n][0]) for n in chosen)


def test_truncation_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 20, generator=generator)
    b = torch.randn(30, 8, generator=generator)
    values = torch.linalg.svdvals((b @ a).double())
    for rank in (1, 3, 7):
        cut = truncate(a, b, rank)
        assert cut.a.shape == (rank, 20) and cut.b.shape == (30, rank)
        error = (cut.b @ cut.a - b @ a).double().square().sum()
        best = values[rank:].square().sum()
        assert float(error) == pytest.approx(float(best), rel=1e-5)
        assert cut.lost == pytest.approx(float(best), rel=1e-6)
        assert cut.total == pytest.approx(float(values.square().sum()), rel=1e-6)
    same = truncate(a, b, 8)
    assert same.a is a and same.b is b and same.lost == 0
    assert same.total == pytest.approx(float(values.square().sum()), rel=1e-6)

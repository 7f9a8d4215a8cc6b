"""Packing a loaded teacher: what becomes of its weights, its memory, its numbers and its name."""

from __future__ import annotations

import copy
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_families
import torch
from torch import Tensor, nn

from accvideo_core.cli import main
from accvideo_core.errors import AccVideoError
from accvideo_core.models import packing
from accvideo_core.models.experts import networks_of
from accvideo_core.models.packing import PACKERS, pack_fp8, pack_nf4, pack_weights
from accvideo_core.models.quantised import AdaptedLinear, Fp8Linear, Nf4Linear, PackedLinear
from accvideo_core.models.source import TeacherSource

KINDS = {"fp8": Fp8Linear, "nf4": Nf4Linear}


@pytest.fixture(params=KINDS)
def how(request: pytest.FixtureRequest) -> str:
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes", reason="NF4 weights need bitsandbytes")
    return request.param


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_fp8_rounds_every_number_to_a_sixteenth_of_itself() -> None:
    rows = random(5, 1) * torch.tensor([[1e-6], [1.0], [1e4], [0.0], [3e-38]])
    weight = rows * random(5, 300, seed=1)
    layer = pack_fp8(weight)
    dense = layer.dense(torch.float32)
    largest = weight.abs().amax(dim=1, keepdim=True)
    # Three bits of mantissa, and subnormals under 2^-15 of a row's largest number.
    assert ((dense - weight).abs() <= weight.abs() / 16 + largest * 2**-17 + 1e-38).all()
    exact = (dense.abs().amax(dim=1) / largest[:, 0])[:3]
    assert torch.allclose(exact, torch.ones(3), atol=1e-6)
    assert layer.scale is not None and layer.scale.shape == (5, 1) and not dense[3].any()
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == weight.numel()


def test_nf4_rounds_to_the_levels_of_a_block() -> None:
    pytest.importorskip("bitsandbytes", reason="NF4 weights need bitsandbytes")
    weight = random(6, 64)
    layer = pack_nf4(weight)
    dense, largest = layer.dense(torch.float32), weight.abs().amax(dim=1, keepdim=True)
    # The widest gap between levels lies from -1 to -.696.
    assert ((dense - weight).abs() <= 0.153 * largest).all()
    assert all(len((dense / largest)[row].unique()) <= 16 for row in range(6))
    assert layer.weight.shape == (6, 32) and layer.scale.shape == (6,)
    assert (layer.in_features, layer.out_features) == (64, 6)


def test_the_linear_layers_of_the_blocks_are_packed_and_nothing_else(how: str) -> None:
    case = tiny_families.case("hunyuan_video")
    before = copy.deepcopy(case.model.module)
    model = pack_weights(case.model, how)
    blocks = {id(x) for block in model.family.blocks(model.module) for x in block.modules()}
    for name, layer in model.module.named_modules():
        if id(layer) in blocks and isinstance(before.get_submodule(name), nn.Linear):
            assert type(layer) is KINDS[how], name
            assert not layer.training and not layer.weight.requires_grad
        else:
            assert type(layer) is type(before.get_submodule(name)), name
            for key, x in layer.named_parameters(recurse=False):
                assert torch.equal(x, before.get_submodule(name).get_parameter(key))
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    # Not far from what it was.
    plain = case.velocities(replace(case.model, module=before))
    error = (case.velocities(model) - plain).norm() / plain.norm()
    assert 0 < error < (0.1 if how == "fp8" else 0.4)


@pytest.mark.parametrize("family", ["hunyuan_video", "wan22_t2v"])
def test_it_goes_by_the_name_of_the_unpacked_weights(how: str, family: str) -> None:
    plain = tiny_families.case(family).model
    packed = pack_weights(tiny_families.case(family).model, how)
    assert packed.fingerprint == plain.fingerprint and packed.source == f"tiny ({how})"
    for network in networks_of(packed.module).values():
        for block in packed.family.blocks(network):
            assert any(isinstance(x, PackedLinear) for x in block.modules())


def test_weights_never_exist_twice(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_families.case("hunyuan_video").model
    blocks = [x for block in model.family.blocks(model.module) for x in block.modules()]
    dense = [weakref.ref(x.weight) for x in blocks if isinstance(x, nn.Linear)]
    del blocks
    alive: list[int] = []
    pack = PACKERS[how]

    def counting(weight: Tensor, bias: Tensor | None) -> PackedLinear:
        alive.append(sum(ref() is not None for ref in dense))
        return pack(weight, bias)

    monkeypatch.setitem(packing.PACKERS, how, counting)
    pack_weights(model, how)
    assert alive == list(range(len(dense), 0, -1))


def test_a_lora_beside_a_layer_stays_and_the_layer_is_packed(how: str) -> None:
    model = tiny_families.case("wan_t2v").model
    block = model.family.blocks(model.module)[0]
    inner = block.get_submodule("ffn.net.2")
    assert isinstance(inner, nn.Linear)
    factors = [(random(2, inner.in_features), random(inner.out_features, 2), 1.0)]
    block.get_submodule("ffn.net").register_module("2", AdaptedLinear(inner, factors))
    pack_weights(model, how)
    adapted = block.get_submodule("ffn.net.2")
    assert isinstance(adapted, AdaptedLinear) and type(adapted.inner) is KINDS[how]
    assert torch.equal(adapted.down[0], factors[0][0])


def test_what_cannot_be_packed_is_refused() -> None:
    model = tiny_families.case("wan_t2v").model
    with pytest.raises(AccVideoError, match="weights 'int3' are unknown; choose one of fp8, nf4"):
        pack_weights(model, "int3")
    packed = pack_weights(model, "fp8")
    with pytest.raises(AccVideoError, match=r"of tiny \(fp8\) are packed already; leave out"):
        pack_weights(packed, "fp8")


def test_a_missing_library_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(AccVideoError, match="need bitsandbytes .*; pip install bitsandbytes, or"):
        pack_nf4(random(4, 64))


def test_a_teacher_is_loaded_packed(how: str) -> None:
    plain = TeacherSource(device="cpu").load().model
    with torch.inference_mode():
        teacher = TeacherSource(device="cpu", dtype="bfloat16", weights=how).load()
    model = teacher.model
    assert model.fingerprint == plain.fingerprint and model.dtype == torch.bfloat16
    assert sum(isinstance(x, KINDS[how]) for x in model.module.modules()) > 20
    assert not any(p.is_inference() or p.requires_grad for p in model.module.parameters())


def test_the_terminal_asks_for_packed_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[TeacherSource] = []

    def load(self: TeacherSource) -> None:
        asked.append(self)
        raise AccVideoError("enough")

    monkeypatch.setattr(TeacherSource, "load", load)
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--weights", "fp8"], ["--weights", "nf4"]):
        assert main(["sample", "out", "--prompt", "x", *more]) == 2
    assert [source.weights for source in asked] == [None, "fp8", "nf4"]
    with pytest.raises(SystemExit):
        main(["sample", "out", "--prompt", "x", "--weights", "int3"])
    assert "invalid choice: 'int3'" in capsys.readouterr().err

"""Packed and adapted linear layers against the dense layers that they stand for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from accvideo_core.models.quantised import (
    AdaptedLinear,
    Fp8Linear,
    GgufLinear,
    Nf4Linear,
    PackedLinear,
    gguf_dense,
    packed_weights,
    trainable_in_full,
)

IN, OUT = 256, 6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fp8(dtype: torch.dtype, scale: Tensor | None) -> tuple[PackedLinear, Tensor]:
    weight = random(OUT, IN).to(dtype)
    numbers = weight.double() * (1.0 if scale is None else scale.double())
    return Fp8Linear(weight, scale, random(OUT, seed=1)), numbers


def nf4() -> tuple[PackedLinear, Tensor]:
    functional = pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes").functional
    packed, state = functional.quantize_4bit(random(OUT, IN), quant_type="nf4", blocksize=64)
    numbers = functional.dequantize_4bit(packed, state).double()
    return Nf4Linear.pack(random(OUT, IN), random(OUT, seed=1)), numbers


def blocks(kind: str) -> tuple[PackedLinear, Tensor]:
    gguf = pytest.importorskip("gguf")
    quant = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(random(OUT, IN).numpy(), quant)
    numbers = torch.from_numpy(gguf.quants.dequantize(packed, quant)).double()
    return GgufLinear(torch.from_numpy(packed), int(quant), random(OUT, seed=1)), numbers


LAYERS = {
    "plain e4m3": lambda: fp8(torch.float8_e4m3fn, None),
    "plain e5m2": lambda: fp8(torch.float8_e5m2, None),
    "scaled": lambda: fp8(torch.float8_e4m3fn, torch.tensor(0.0123)),
    "scaled rows": lambda: fp8(torch.float8_e4m3fn, random(OUT, 1, seed=3)),
    "NF4": nf4,
    "Q8_0": lambda: blocks("Q8_0"),
    "Q4_0": lambda: blocks("Q4_0"),
    "Q5_1": lambda: blocks("Q5_1"),
}


@pytest.fixture(params=LAYERS)
def layer_and_numbers(request: pytest.FixtureRequest) -> tuple[PackedLinear, Tensor]:
    return LAYERS[request.param]()


def test_the_weight_is_exact_and_the_product_computes_in_the_inputs_dtype(layer_and_numbers):
    layer, numbers = layer_and_numbers
    assert torch.equal(layer.dense(torch.float32), numbers.float())
    # The scale is not rounded to the dtype before it is used.
    assert torch.equal(layer.dense(torch.bfloat16), numbers.float().bfloat16())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = random(2, 3, IN, seed=2).to(dtype)
        y = layer(x)
        expected = F.linear(x, numbers.float().to(dtype), layer.bias.to(dtype))
        assert y.dtype == dtype and y.shape == (2, 3, OUT) and torch.equal(y, expected)


def test_elements_are_those_of_the_flattened_weight(layer_and_numbers):
    layer, numbers = layer_and_numbers
    index = torch.tensor([0, 5, IN - 1, IN, 3 * IN + 7, OUT * IN - 1])
    assert torch.equal(layer.elements(index), numbers.float().reshape(-1)[index])


def test_no_change_of_dtype_touches_what_is_stored(layer_and_numbers):
    layer, numbers = layer_and_numbers
    bits = layer.weight.clone()
    moved = copy.deepcopy(layer).to(torch.bfloat16).half().float().double()
    assert torch.equal(moved.weight, bits) and moved.weight.dtype == torch.uint8
    assert torch.equal(moved.dense(torch.float32), numbers.float())
    assert moved.bias.dtype == torch.float64 and not moved.weight.requires_grad
    assert moved.to("meta").weight.is_meta


def test_gradients_are_those_of_the_dense_layer_and_nothing_dense_is_kept(layer_and_numbers):
    layer, numbers = layer_and_numbers
    kept: list[Tensor] = []
    x = random(3, IN, seed=2).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    (gradient,) = torch.autograd.grad((y * random(3, OUT, seed=4)).sum(), x)
    assert torch.allclose(gradient, random(3, OUT, seed=4) @ numbers.float(), atol=1e-4)
    assert [x.data_ptr() for x in kept] == [layer.weight.data_ptr()]
    _, tangent = torch.func.jvp(layer, (x.detach(),), (random(3, IN, seed=5),))
    assert torch.allclose(tangent, random(3, IN, seed=5) @ numbers.float().T, atol=1e-4)


class Net(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.first = nn.Linear(IN, IN)
        self.proj = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.tanh(self.first(x)))


def dense_net(net: Net, numbers: Tensor) -> Net:
    twin = copy.deepcopy(net)
    twin.proj = nn.Linear(IN, OUT)
    twin.proj.weight.data = numbers.float()
    twin.proj.bias.data = net.proj.bias.data.clone()  # type: ignore[union-attr]
    return twin


def adapted_by_peft(net: Net) -> dict[str, nn.Parameter]:
    net.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["first", "proj"]), net)
    found = {n: p for n, p in net.named_parameters() if ".lora_" in n}
    for i, (_, p) in enumerate(sorted(found.items())):
        p.data = random(*p.shape, seed=10 + i)
    assert len(found) == 4 and {p.dtype for p in found.values()} == {torch.float32}
    return found


def test_peft_trains_adapters_on_packed_layers(layer_and_numbers):
    layer, numbers = layer_and_numbers
    net = Net(layer)
    twin = dense_net(net, numbers)
    ours, theirs = adapted_by_peft(net), adapted_by_peft(twin)
    x = random(5, IN, seed=6)
    y, expected = net(x), twin(x)
    assert torch.allclose(y, expected, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, p in ours.items():
        gradient = theirs[name].grad
        assert p.grad is not None and gradient is not None and gradient.abs().sum() > 0
        assert torch.allclose(p.grad, gradient, rtol=1e-4, atol=1e-3 * gradient.abs().max()), name
    assert all(p.grad is None for n, p in net.named_parameters() if ".lora_" not in n)


def deltas() -> list[tuple[Tensor, Tensor, float]]:
    return [
        (random(2, IN, seed=20), random(OUT, 2, seed=21), 0.5),
        (random(3, IN, seed=22).bfloat16(), random(OUT, 3, seed=23).bfloat16(), -1.5),
    ]


def test_an_adapted_layer_is_the_layer_with_its_loras_merged(layer_and_numbers):
    layer, numbers = layer_and_numbers
    adapted = AdaptedLinear(layer, deltas())
    merged = numbers + sum(scale * b.double() @ a.double() for a, b, scale in deltas())
    x = random(2, 3, IN, seed=2)
    expected = F.linear(x.double(), merged, layer.bias.double())
    assert torch.allclose(adapted(x).double(), expected, atol=1e-4)
    y = adapted(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.double(), expected, atol=0.05 * float(expected.abs().max()))
    assert adapted.weight is layer.weight and adapted.bias is layer.bias
    assert (adapted.in_features, adapted.out_features) == (IN, OUT)
    assert not any(".lora_" in name for name in nn.ModuleDict({"x": adapted}).state_dict())
    assert not any(p.requires_grad for n, p in adapted.named_parameters() if "inner" not in n)


def test_peft_trains_adapters_on_adapted_layers():
    layer, numbers = LAYERS["scaled"]()
    net = Net(AdaptedLinear(layer, deltas()))
    change = sum(scale * b.float() @ a.float() for a, b, scale in deltas())
    twin = dense_net(net, numbers + change)
    ours, theirs = adapted_by_peft(net), adapted_by_peft(twin)
    x = random(5, IN, seed=6)
    assert torch.allclose(net(x), twin(x), atol=1e-3)
    net(x).sum().backward()
    twin(x).sum().backward()
    for name, p in ours.items():
        assert torch.allclose(p.grad, theirs[name].grad, rtol=1e-3, atol=1e-2), name


def test_packed_weights_go_by_the_names_before_adapters():
    net = Net(LAYERS["scaled"]()[0])
    before = packed_weights(net)
    adapted_by_peft(net)
    assert list(before) == ["proj.weight"] and list(packed_weights(net)) == ["proj.weight"]


def test_what_cannot_be_trained_in_full_says_why():
    assert trainable_in_full(Net(nn.Linear(IN, OUT))) is None
    said = trainable_in_full(Net(LAYERS["scaled"]()[0]))
    assert said is not None and "stored as float8_e4m3fn" in said and "train a LoRA" in said
    said = trainable_in_full(Net(AdaptedLinear(nn.Linear(IN, OUT), deltas())))
    assert said is not None and "merge the teacher's LoRA" in said
    pytest.importorskip("gguf")
    said = trainable_in_full(Net(LAYERS["Q8_0"]()[0]))
    assert said is not None and "stored as GGUF Q8_0" in said


GGUF = ("BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")


@pytest.mark.parametrize("kind", [*GGUF, "IQ4_NL", "IQ4_XS"])
def test_every_gguf_format_unpacks_to_the_numbers_of_the_gguf_package(kind: str):
    gguf = pytest.importorskip("gguf")
    quant = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[quant][1]
    packed = torch.randint(0, 256, (3, 2, 4 * size), generator=torch.Generator().manual_seed(0))
    packed = packed.to(torch.uint8)
    with np.errstate(all="ignore"):  # random bytes make scales that are no numbers, too
        expected = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), quant))
    found = gguf_dense(packed, int(quant), torch.float32)
    assert found.shape == expected.shape and expected.isfinite().float().mean() > 0.5
    assert torch.equal(found[expected.isfinite()], expected[expected.isfinite()])

"""Operations and bytes of calls, against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_wan
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from accvideo_core.models import tiny as embedded
from accvideo_core.models.packing import pack_fp8
from accvideo_core.profiling.counting import Call, Cost, Counter, Operations, call_of, total


def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Cost:
    return Call.of(module, args, kwargs).cost()


class Does(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.forward = function


def linear_flops(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of the linear layers and convolutions in a call, from their inputs and outputs."""
    found = 0

    def hook(layer: Any, inputs: tuple[Tensor], out: Tensor) -> None:
        nonlocal found
        found += 2 * out.numel() * layer.weight[0].numel()

    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    layers = [layer for layer in module.modules() if isinstance(layer, kinds)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        module(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


def test_operations_of_a_wan_network_are_those_of_its_layers_and_attention() -> None:
    network: Any = tiny_wan.network("wan_t2v")
    batch, frames, size, text = 2, 3, 8, 512
    kwargs = {
        "hidden_states": torch.randn(batch, 16, frames, size, size),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": torch.randn(batch, text, tiny_wan.TEXT),
        "return_dict": False,
    }
    tokens = frames * (size // 2) ** 2
    attention = len(network.blocks) * 4 * batch * tiny_wan.WIDTH * tokens * (tokens + text)
    layers = linear_flops(network, (), kwargs)
    assert counted(network, **kwargs).flops == layers + attention
    assert attention > layers / 10


def test_operations_of_a_hunyuan_network_are_those_of_its_layers_and_attention() -> None:
    model = tiny.video_model()
    network: Any = model.module
    text = 7
    cond = tiny.condition(length=text)
    kwargs = {
        "hidden_states": tiny.latents(),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": cond.text,
        "encoder_attention_mask": cond.full_mask(),
        "pooled_projections": cond.pooled,
        "guidance": torch.tensor([6000.0, 6000.0]),
        "return_dict": False,
    }
    width, tokens = 32, 2 * 2 * 2
    blocks = 4 * (tokens + text) ** 2 * 4
    refiner = text**2 * 4
    attention = 2 * width * (blocks + refiner)
    assert counted(network, **kwargs).flops == linear_flops(network, (), kwargs) + attention


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_attention_is_counted_by_whatever_kernel(masked: bool, mode: Any) -> None:
    q, k, v = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool) if masked else None
    with mode(), Operations() as operations:
        scaled_dot_product_attention(q, k, v, mask)
    assert operations.cost.flops == 4 * 2 * 3 * 10 * 6 * 8


def test_packed_and_scaled_products_are_counted() -> None:
    linear = nn.Linear(32, 48)
    x = torch.randn(2, 5, 32)
    packed = pack_fp8(linear.weight.detach(), linear.bias.detach())
    assert counted(packed, x).flops == counted(linear, x).flops == 2 * 10 * 32 * 48

    def scaled(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return torch._scaled_mm(a, b, scale, scale, out_dtype=torch.bfloat16)

    a = torch.randn(16, 32).to(torch.float8_e4m3fn)
    b = torch.randn(48, 32).to(torch.float8_e4m3fn).t()
    assert counted(Does(scaled), a, b, torch.ones(())).flops == 2 * 16 * 32 * 48


def test_a_count_without_values_is_the_count_with_values() -> None:
    decoder = embedded.vae().decoder
    x = torch.randn(1, 16, 2, 8, 8)
    with torch.no_grad(), Operations() as real:
        decoder(x)
    assert counted(decoder, x) == real.cost
    assert real.cost.flops > 1e6


def test_bytes_are_those_of_what_is_read_and_written() -> None:
    x, y = torch.randn(100, 10), torch.randn(100, 10)
    assert counted(Does(lambda a, b: a + b), x, y).bytes == 3 * 4000
    assert counted(Does(lambda a: a + a), x).bytes == 2 * 4000
    assert counted(Does(lambda a: a.t().reshape(-1, 5).view(2, 500)[0]), x.t()).bytes == 0
    # One row, read a hundred times.
    assert counted(Does(lambda a, b: a + b), x, y[:1].expand(100, 10)).bytes < 2 * 4000 + 4001


def test_a_call_is_counted_as_it_was_made() -> None:
    """A list that the module changes, such as a VAE's cache, is kept as it was."""
    cache: list[Any] = [None]

    def fill(x: Tensor, kept: list[Any]) -> Tensor:
        kept[0] = x if kept[0] is None else torch.cat([kept[0], x])
        return kept[0] @ torch.ones(4, 4)

    module, x = Does(fill), torch.randn(3, 4)
    first = Call.of(module, (x, cache), {})
    module(x, cache)
    second = Call.of(module, (x, cache), {})
    assert first.cost().flops == 2 * 3 * 16 and second.cost().flops == 2 * 6 * 16
    assert cache[0] is x and first.key != second.key


def test_a_call_that_needs_values_is_not_known() -> None:
    counter = Counter()
    needs = Call.of(Does(lambda x: x.numpy()), (torch.ones(2),), {})
    assert counter.cost(needs) is None and counter.cost(needs) is None
    (fault,) = counter.faults
    assert fault.startswith("the operations of Does are not known (")
    assert total([Cost(1, 2), None]) is None and total([]) is None
    assert total([Cost(1, 2), Cost(3, 4)]) == Cost(4, 6)


def test_a_call_is_taken_without_being_made() -> None:
    ran: list[Tensor] = []
    module, x = Does(lambda x: ran.append(x) or x @ x), torch.ones(4, 4)
    assert call_of(module, lambda: module(x)).cost().flops == 2 * 4**3
    assert len(ran) == 1 and not module._forward_pre_hooks  # the count's own, without values
    with pytest.raises(ValueError, match="Does was not called"):
        call_of(module, lambda: None)

"""The ledger's counts against sizes known in advance, and against what real kernels keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from accvideo_core.models.ledger import Ledger, fused_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
META = torch.device("meta")


def test_memory_is_counted_once_and_for_as_long_as_it_is_used() -> None:
    with Ledger() as ledger:
        x = torch.empty(10, 100, device="meta")
        assert ledger.live == ledger.peak == 4000
        views = x.view(100, 10).t()[:3], x.detach()
        assert ledger.live == 4000
        y = x + 1
        x += y
        assert ledger.live == ledger.peak == 8000
        del y
        assert ledger.live == 4000
        del x
        assert ledger.live == 4000
        del views
        assert (ledger.live, ledger.peak) == (0, 8000)


def test_the_same_operation_again_takes_memory_again() -> None:
    x = torch.empty(10, 100, device="meta")
    with Ledger() as ledger:
        results = [torch.nn.functional.gelu(x) for _ in range(5)]
        assert ledger.live == 5 * 4000
        assert all(y.shape == x.shape and y.is_meta for y in results)
        # 1 and 1.0 are equal, and give integers other results.
        whole = torch.ones(10, dtype=torch.int64, device="meta")
        assert [(whole * one).dtype for one in (1, 1.0)] == [torch.int64, torch.float32]


def test_values_are_asked_for_without_harm() -> None:
    with Ledger():
        x = torch.empty(3, device="meta")
        assert float(x.sum()) == 1.0 and int(x.sum().long()) == 1 and bool((x > 0).any()) is True
    # What has values keeps them.
    with Ledger() as ledger:
        assert float(torch.full((3,), 2.0).sum()) == 6.0 and ledger.peak == 0


def test_backward_and_recomputation_are_counted() -> None:
    """A chain of tanh keeps every output; in checkpoints of its own each one's input."""

    def chain(x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = torch.tanh(x)
        return x

    def peaks(forward: Callable[[Tensor], Tensor]) -> tuple[int, int]:
        with Ledger() as ledger:
            x = torch.empty(1000, device="meta", requires_grad=True)
            y = forward(x)
            kept = ledger.live
            torch.autograd.backward(y, torch.empty_like(y))
        return kept, ledger.peak

    assert peaks(lambda x: chain(x, 12))[0] == 13 * 4000
    kept, peak = peaks(
        lambda x: chain_of_checkpoints(x, lambda y: checkpoint(chain, y, 4, use_reentrant=False))
    )
    assert kept == 4 * 4000
    # The last piece is computed again: 3 more, its end, and gradients on the way.
    assert 4 * 4000 + 3 * 4000 < peak <= 13 * 4000


def chain_of_checkpoints(x: Tensor, piece: Callable[[Tensor], Tensor]) -> Tensor:
    for _ in range(3):
        x = piece(x)
    return x


def attention(device: torch.device, mask: bool) -> tuple[Tensor, int]:
    """Attention of 3 heads of 16 over 200 tokens, and the bytes that it keeps for the way back."""
    q, k, v = (
        torch.empty(2, 200, 3, 16, device=device).zero_().requires_grad_().transpose(1, 2)
        for _ in range(3)
    )
    allowed = torch.ones(2, 1, 1, 200, dtype=torch.bool, device=device) if mask else None
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[id(x.untyped_storage())] = x
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    large = [x for x in kept.values() if x.dtype == torch.float32 and x.numel() > 400]
    return out, sum(x.numel() * x.element_size() for x in large)


@pytest.mark.parametrize("mask", [False, True])
def test_attention_keeps_what_the_real_kernel_keeps(mask: bool) -> None:
    out, kept = attention(CPU, mask)
    with fused_kernels(CPU):
        meta_out, meta_kept = attention(META, mask)
    assert meta_kept == kept > 4 * out.numel() * 4
    assert meta_out.shape == out.shape and meta_out.stride() == out.stride()
    # Without it, torch counts a matrix of all pairs.
    assert attention(META, mask)[1] > 2 * 3 * 200 * 200 * 4


def test_gradients_of_fused_kernels_have_their_shapes() -> None:
    with Ledger(), fused_kernels(CUDA):
        q = torch.empty(1, 2, 30, 8, device="meta", requires_grad=True)
        k, v = (torch.empty(1, 2, 50, 8, device="meta", requires_grad=True) for _ in range(2))
        norm = torch.nn.RMSNorm(8, device="meta")
        out = norm(F.scaled_dot_product_attention(q, k, v))
        torch.autograd.backward(out.sum())
    for x in (q, k, v, norm.weight):
        assert x.grad is not None and x.grad.shape == x.shape


def test_cuda_norm_keeps_its_input_once() -> None:
    def kept(device: torch.device) -> int:
        norm = torch.nn.RMSNorm(64, device="meta", dtype=torch.bfloat16)
        with Ledger() as ledger, fused_kernels(device):
            x = torch.empty(1000, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
            y = norm(x)
            assert y.shape == x.shape
            return ledger.live

    if not hasattr(torch.ops.aten, "_fused_rms_norm_backward"):
        pytest.skip("this torch has no fused RMS norm")
    assert kept(CUDA) == 2 * 1000 * 64 * 2 + 1000 * 4 < kept(CPU)

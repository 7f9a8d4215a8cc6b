"""Ledger: what memory a computation takes, without computing it or taking the memory.

The computation runs on tensors of torch's meta device, which have shapes and no values. The ledger
sees every operation, the backward pass's and a checkpoint's recomputation among them, and counts
the bytes that its results would hold for as long as anything refers to them.

Kernels differ between devices only where they are fused: attention is counted as a fused kernel
wherever it runs (torch's CPU, flash and memory-efficient kernels keep the same tensors), and RMS
norm where CUDA's is. What they take to work in is known of torch's own convolution on a CPU alone:
it unfolds its input, which makes it as many times larger as its kernel has places, or else brings
input and weight into another order.

Shapes: B batch, H heads, L query and S key tokens, D width of a head.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode

_READ = torch.ops.aten._local_scalar_dense.default
_CONVOLUTION = torch.ops.aten.convolution.default
_UNFOLDING = ("Slow2d", "Slow3d")


class Ledger(TorchDispatchMode):
    """Counts the bytes of meta tensors while it is entered: `live` now, `peak` at most.

    `convolved` are the values of the largest tensor that a convolution takes or gives.

    A value that the computation asks for (`.item()`, `float(x)`) is answered with one, because
    there is none.

    Args:
        device: whose convolutions are counted with what they take to work in; None is a device
            that takes nothing.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.live = self.peak = self.convolved = 0
        self._works = device is not None and device.type == "cpu"
        self._held: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is _READ and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        out = self._run(func, args, named)
        if func is _CONVOLUTION:
            self.convolved = max(self.convolved, args[0].numel(), out.numel())
            if self._works:
                self.peak = max(self.peak, self.live + _convolution_bytes(*args))
        return out

    def _run(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """An operation's results, which it has made or which it would make."""
        if not _gives_new_tensors(func):
            out = func(*args, **named)
            self._count(out)
            return out
        call = func, _key(args), _key(tuple(named.items()))
        if call in _results:
            made = [None if like is None else like.make() for like in _results[call]]
            out = made[0] if len(made) == 1 else tuple(made)
            self._count(out)
            return out
        out = func(*args, **named)
        if self._count(out):
            found = out if isinstance(out, tuple) else (out,)
            _results[call] = [None if x is None else _Like.of(x) for x in found]
        return out

    def _count(self, out: Any) -> bool:
        """Count an operation's results; whether all of them take memory of their own."""
        results = out if isinstance(out, (tuple, list)) else (out,)
        return all([self._add(x) for x in results if isinstance(x, Tensor)])

    def _add(self, x: Tensor) -> bool:
        """Count a result; False for one that shares memory counted before, or is no meta tensor."""
        storage = x.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if not x.is_meta or key in self._held:
            return False
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone(_: object) -> None:
            self.live -= size
            del self._held[key]

        self._held[key] = weakref.ref(storage, gone)
        return True


class _Like(NamedTuple):
    """All of a tensor but its values."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, x: Tensor) -> _Like:
        return cls(x.shape, x.stride(), x.dtype, x.device.type)

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


_results: dict[Any, list[_Like | None]] = {}
"""What operations on meta tensors gave: to find that out takes most of the time, and a network's
blocks, and plans of one run with other settings, repeat the same operations."""


def _key(x: Any) -> Any:
    """An argument of an operation as a key of a dictionary."""
    if isinstance(x, Tensor):
        return _Like.of(x)
    if isinstance(x, (list, tuple)):
        return tuple(_key(each) for each in x)
    return type(x), x  # 1, 1.0 and True would be the same key


@cache
def _gives_new_tensors(func: Any) -> bool:
    """Whether an operation changes no argument, and its results are no views."""
    schema = func._schema
    return all(x.alias_info is None for x in schema.arguments) and all(
        str(x.type) == "Tensor" for x in schema.returns
    )


def _convolution_bytes(x: Tensor, weight: Tensor, _bias: Any, *options: Any) -> int:
    """What a CPU's convolution of x [B, C, ...] takes beside its result."""
    choose = getattr(torch._C, "_select_conv_backend", None)
    if choose is None:
        return 0
    # Torch chooses by type and shape; these have no values, and no memory either.
    alike = (torch.empty(1, dtype=t.dtype).expand(t.shape) for t in (x, weight))
    kernel = choose(*alike, None, *options, None).name
    if kernel == "Mkldnn":
        return (x.numel() + weight.numel()) * x.element_size()
    places = math.prod(weight.shape[2:])
    if kernel not in _UNFOLDING or places == 1:
        return 0
    sizes = zip(x.shape[2:], weight.shape[2:], *options[:3], strict=True)
    out = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
    return math.prod((*x.shape[:2], places, *out)) * x.element_size()


@contextmanager
def fused_kernels(device: torch.device) -> Iterator[None]:
    """Let meta tensors go through attention and RMS norm as tensors on `device` do.

    Left to itself, torch takes the meta device for one without fused kernels. Nothing that has
    values is touched.
    """
    on_cuda = device.type == "cuda"
    library = Library("aten", "IMPL")

    def attention(q: Tensor, k: Tensor, v: Tensor, *_mask: Any, **_options: Any) -> Tensor:
        return _FusedAttention.apply(q, k, v, on_cuda)  # type: ignore[no-any-return]

    def rms_norm(x: Tensor, _shape: Any, weight: Tensor | None = None, *_eps: Any) -> Tensor:
        return _FusedRmsNorm.apply(x, weight)  # type: ignore[no-any-return]

    library.impl("scaled_dot_product_attention", attention, "AutogradMeta")
    # Since CUDA's is fused, there is an operation for the way back.
    if on_cuda and hasattr(torch.ops.aten, "_fused_rms_norm_backward"):
        library.impl("rms_norm", rms_norm, "AutogradMeta")
    try:
        yield
    finally:
        del library  # which takes back what it registered


class _FusedAttention(Function):
    """Keeps q, k, v, the output and one float32 number per query and head; no [L, S] matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, on_cuda: bool) -> Tensor:  # type: ignore[override]
        out = _by_token(q, v.shape[-1])
        logsumexp = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.on_cuda = on_cuda
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, _out, _logsumexp = ctx.saved_tensors
        # CUDA's kernels add up the gradient of q in float32.
        _sum = q.new_empty(q.shape, dtype=torch.float32) if ctx.on_cuda else None
        return _by_token(q), _by_token(k), _by_token(v), None


def _by_token(x: Tensor, width: int | None = None) -> Tensor:
    """[B, H, L, D] as kernels make it: the heads of a token side by side."""
    batch, heads, tokens, own = x.shape
    return x.new_empty(batch, tokens, heads, own if width is None else width).transpose(1, 2)


class _FusedRmsNorm(Function):
    """Keeps x and one float32 number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        x, weight, _scale = ctx.saved_tensors
        if weight is None or not ctx.needs_input_grad[1]:
            return torch.empty_like(x), None
        return torch.empty_like(x), torch.empty_like(weight)

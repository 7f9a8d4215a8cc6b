"""What a computation takes: floating-point operations, and bytes that its operations move.

Operations are those of matrix products, attention and convolutions, two for each multiplication
with its addition; everything else is small beside them. Bytes are those of every tensor that an
operation reads or writes, once for each operation: what a network moves whose operations are not
fused, and more than it moves where caches or compiled kernels save the way.

A call of a module is counted after it happened, from the shapes of its arguments, on tensors
without values. So counting takes no memory and does not disturb the clock, and what is counted is
the dense network as diffusers has it, whatever kernels, sparse patterns or compiled code ran.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_aten = torch.ops.aten
_READ = _aten._local_scalar_dense.default
_WITHOUT_TRAFFIC = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::sym_", "prim::")
"""Beginnings of names of operations that touch no values; views are known by their schemas."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating-point operations, and bytes moved."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class Operations(TorchDispatchMode):
    """Counts what is computed while it is entered, in `cost`."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        formula = _formula(func)
        if formula is None and func is not torch.ops.prim.device.default:
            # In inference mode operations such as `linear` arrive whole.
            with self:
                parts = func.decompose(*args, **named)
            if parts is not NotImplemented:
                return parts
        try:
            out = func(*args, **named)
        except DataDependentOutputException:
            if func is not _READ:
                raise
            return torch.ones((), dtype=args[0].dtype).item()  # no shape of ours depends on it
        flops = 0 if formula is None else int(formula(*args, **named, out_val=out))
        self.cost += Cost(flops, _traffic(func, (args, named, out)))
        return out


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """[B, H, L, D] of queries, [B, H, S, D] of keys and values."""
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """[M, K] times [K, N]."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


# What torch's own table of formulas leaves out.
_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "aten::_scaled_dot_product_attention_math_for_mps": _attention,
    "aten::_int_mm": _product,
}


def _formula(func: Any) -> Callable[..., int] | None:
    found = flop_registry.get(func._overloadpacket)
    return _FORMULAS.get(func._schema.name) if found is None else found


def _traffic(func: Any, tensors: Any) -> int:
    """Bytes of an operation's arguments and results, each counted once."""
    schema = func._schema
    if schema.name.startswith(_WITHOUT_TRAFFIC):
        return 0
    if any(x.alias_info is not None and not x.alias_info.is_write for x in schema.returns):
        return 0
    each = {id(x): x for x in tree_leaves(tensors) if isinstance(x, Tensor)}
    return sum(_bytes(x) for x in each.values())


def _bytes(x: Tensor) -> int:
    """Of the memory that a tensor lies in; an expanded one is larger than that."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


@dataclass(frozen=True, slots=True)
class _Like:
    """All of a tensor but its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module, to be repeated without values."""

    module: nn.Module
    leaves: tuple[Any, ...]
    structure: Any

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        leaves, structure = tree_flatten((args, dict(kwargs)))
        return cls(module, tuple(_without_values(x) for x in leaves), structure)

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for calls that cost the same."""
        return id(self.module), repr(self.leaves), repr(self.structure)

    def cost(self) -> Cost:
        """Raises RuntimeError for a module that needs values to compute with."""
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Operations() as counted:
            leaves = [x.make() if isinstance(x, _Like) else x for x in self.leaves]
            args, kwargs = tree_unflatten(leaves, self.structure)
            self.module(*args, **kwargs)
        return counted.cost


class _Enough(Exception):
    """Ends a call whose arguments were all that was wanted."""


def call_of(module: nn.Module, work: Callable[[], object]) -> Call:
    """The first call of `module` that `work` makes; `work` ends there.

    Raises:
        ValueError: it makes none.
    """
    found: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Call.of(module, args, kwargs))
        raise _Enough

    handle = module.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
    try:
        work()
    except _Enough:
        pass
    finally:
        handle.remove()
    if not found:
        raise ValueError(f"{type(module).__name__} was not called")
    return found[0]


def _without_values(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return _Like(tuple(x.shape), x.stride(), x.dtype, x.device)


class Counter:
    """Costs of calls, each kind of which is counted once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Cost | None] = {}
        self.faults: list[str] = []
        """Why calls could not be counted, a sentence each."""

    def cost(self, call: Call) -> Cost | None:
        """None where it cannot be told."""
        if call.key not in self._known:
            self._known[call.key] = self._count(call)
        return self._known[call.key]

    def _count(self, call: Call) -> Cost | None:
        try:
            return call.cost()
        except Exception as error:  # whatever a foreign module's code raises without values
            name = type(call.module).__name__
            why = " ".join(str(error).split())[:160]
            self.faults.append(f"the operations of {name} are not known ({why})")
            return None


def total(costs: list[Cost | None]) -> Cost | None:
    """The sum; None where one of them, or all, are not known."""
    known = [cost for cost in costs if cost is not None]
    return sum(known, Cost()) if known and len(known) == len(costs) else None

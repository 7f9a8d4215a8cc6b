"""A network's whole weights, adapters included, as tensors that are made one at a time.

A 13B network is 26 GB: nothing here holds more than the largest layer.

Shapes: W [out, in]; a LoRA adds B @ A, [out, r] @ [r, in], times its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .files import Later
from .models.keys.spelling import MARK, canonical
from .models.keys.table import KeyTable, join_name, split_name
from .models.quantised import AdaptedLinear, PackedLinear

FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max


def merged_weights(network: nn.Module, dtype: torch.dtype) -> dict[str, Later]:
    """diffusers name -> weight in `dtype`, with every adapter merged in float32."""
    layers = {name: x for name, x in network.named_modules() if _is_wrapped(x)}
    outer = {n: x for n, x in layers.items() if not any(n.startswith(f"{o}.") for o in layers)}
    found: dict[str, Later] = {}
    for name, x in network.state_dict().items():
        if not any(name.startswith(f"{layer}.") for layer in outer):
            found[name] = _cast(x, dtype)
    for name, layer in outer.items():
        inner = _inner(layer)
        shape = (inner.out_features, inner.in_features)
        found[f"{name}.weight"] = Later(shape, dtype, _dense_in(layer, dtype))
        if inner.bias is not None:
            found[f"{name}.bias"] = _cast(inner.bias, dtype)
    return found


def native_weights(weights: Mapping[str, Later], table: KeyTable) -> dict[str, Later]:
    """The same weights under native names; parts of a fused layer become one tensor."""
    used = {name: weights[name] for name in canonical(weights)}
    empty = {n: torch.empty(x.shape, dtype=x.dtype, device="meta") for n, x in used.items()}
    layers = set(table.native_layers())
    found = {}
    for name, like in table.to_native(empty).items():
        layer, suffix = split_name(name, layers)
        parts = [join_name(part.layer, suffix) for part in table.parts(layer)]
        make = _joined(name, {part: used[part] for part in parts}, table)
        found[name] = Later(tuple(like.shape), like.dtype, make)
    return found


@dataclass(eq=False)
class Fp8Scaled:
    """Some weights of a file in ComfyUI's scaled fp8, and what the rounding costs.

    A layer's weight is fp8 numbers times one float32 scale, which lies beside it as `scale_weight`.
    The mark has two elements, which tells ComfyUI to multiply in the compute dtype: without scales
    of the inputs, fp8 products would round those too.
    """

    lost: float = 0.0
    """Squared Frobenius norm of the error, of the weights written so far."""
    total: float = 0.0
    _scales: dict[str, Tensor] = field(default_factory=dict)

    def quantise(self, weights: Mapping[str, Later], names: Iterable[str]) -> dict[str, Later]:
        """`weights` with those of `names` ("<layer>.weight") in fp8; the others as they are."""
        found = dict(weights)
        for name in names:
            full = weights[name]
            scale = f"{name.removesuffix('.weight')}.scale_weight"
            found[scale] = Later((), torch.float32, self._scale(name, full))
            found[name] = Later(full.shape, FP8, self._rounded(name, full))
        found[MARK] = Later((2,), FP8, lambda: torch.zeros(2, dtype=FP8))
        return found

    @property
    def error(self) -> float:
        """Relative Frobenius error of the rounded weights together."""
        return (self.lost / self.total) ** 0.5 if self.total else 0.0

    def _scale(self, name: str, full: Later) -> Callable[[], Tensor]:
        def make() -> Tensor:
            if name not in self._scales:
                largest = full.make().abs().amax().float().cpu()
                self._scales[name] = (largest / _FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
            return self._scales[name]

        return make

    def _rounded(self, name: str, full: Later) -> Callable[[], Tensor]:
        def make() -> Tensor:
            x = full.make().float()
            scale = self._scale(name, full)().to(x.device)
            # Rounding may carry the largest number past the largest that fp8 has.
            rounded = (x / scale).clamp_(-_FP8_MAX, _FP8_MAX).to(FP8)
            self.total += float(torch.linalg.vector_norm(x)) ** 2
            self.lost += float(torch.linalg.vector_norm(x.sub_(rounded.float().mul_(scale)))) ** 2
            return rounded

        return make


def block_matrices(
    network: nn.Module, blocks: Iterable[nn.Module], weights: Mapping[str, Later]
) -> set[str]:
    """Names of the matrices of the network's blocks: most of its weights, and the robust ones."""
    ids = {id(block) for block in blocks}
    inside = tuple(f"{name}." for name, x in network.named_modules() if id(x) in ids)
    return {
        name
        for name, x in weights.items()
        if name.startswith(inside) and name.endswith(".weight") and len(x.shape) == 2
    }


def dense(layer: nn.Module) -> Tensor:
    """A linear layer's weight [out, in] in float32, with whatever adapters lie on it."""
    x: Any = layer
    if hasattr(x, "base_layer"):  # peft's
        w = dense(x.base_layer)
        for name in x.active_adapters:
            a, b = x.lora_A[name].weight, x.lora_B[name].weight
            w.addmm_(b.to(w), a.to(w), alpha=x.scaling[name])
        return w
    if isinstance(x, AdaptedLinear):
        w = dense(x.inner)
        for a, b, scale in zip(x.down, x.up, x.scales, strict=True):
            w.addmm_(b.to(w), a.to(w), alpha=scale)
        return w
    if isinstance(x, PackedLinear):
        return x.dense(torch.float32)
    return x.weight.detach().to(torch.float32, copy=True)


def _is_wrapped(layer: nn.Module) -> bool:
    return hasattr(layer, "base_layer") or isinstance(layer, AdaptedLinear | PackedLinear)


def _inner(layer: Any) -> nn.Linear:
    """The linear layer under the adapters."""
    while not isinstance(layer, nn.Linear) or isinstance(layer, AdaptedLinear):
        layer = layer.inner if isinstance(layer, AdaptedLinear) else layer.base_layer
    return layer


def _cast(x: Tensor, dtype: torch.dtype) -> Later:
    target = dtype if x.is_floating_point() else x.dtype
    return Later(tuple(x.shape), target, lambda: x.detach().to(target))


def _dense_in(layer: nn.Module, dtype: torch.dtype) -> Callable[[], Tensor]:
    def make() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return dense(layer).to(dtype)

    return make


def _joined(name: str, parts: Mapping[str, Later], table: KeyTable) -> Callable[[], Tensor]:
    return lambda: table.to_native({part: x.make() for part, x in parts.items()})[name]

"""Linear layers whose frozen weights stay packed (fp8, GGUF), and ones with frozen LoRAs on them.

A packed weight lies as bytes in a uint8 parameter, so that no `.to(dtype)` and no look at "the
dtype of the first parameter" can take it for numbers. It is unpacked for the one product it is
needed in, in the forward and again in the backward pass, and is never kept by autograd.

Shapes: O output features, I input features, R rank of a LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class PackedLinear(nn.Linear):
    """A frozen linear layer that computes in its input's dtype; peft can wrap it."""

    storage = ""
    """What people call the number format."""

    def __init__(self, in_features: int, packed: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features = in_features, packed.shape[0]
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] as numbers."""
        raise NotImplementedError

    def elements(self, index: Tensor) -> Tensor:
        """Entries of the flattened weight, float32, without unpacking the rest."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return _Product.apply(input, self)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, storage={self.storage}"


class _Product(torch.autograd.Function):
    """x W^T + b with W unpacked on the way there and on the way back."""

    @staticmethod
    def forward(x: Tensor, layer: PackedLinear) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dense(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ ctx.layer.dense(grad.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _layer: None) -> Tensor:  # type: ignore[override]
        return F.linear(tangent, ctx.layer.dense(tangent.dtype))


class Fp8Linear(PackedLinear):
    """weight = fp8 numbers * scale, the scale being one number, one per row [O, 1], or absent."""

    scale: Tensor | None

    def __init__(
        self, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        """`weight` [O, I] in one of `FP8_DTYPES`."""
        super().__init__(weight.shape[1], weight.view(torch.uint8), bias)
        self.format = weight.dtype
        self.storage = str(weight.dtype).removeprefix("torch.")
        self.register_buffer("scale", None if scale is None else scale.float())

    def dense(self, dtype: torch.dtype) -> Tensor:
        return fp8_dense(self.weight.view(self.format), self.scale, dtype)

    def elements(self, index: Tensor) -> Tensor:
        values = self.weight.reshape(-1)[index].view(self.format).float()
        if self.scale is None:
            return values
        rows = self.scale.expand(self.out_features, 1)[:, 0]
        return values * rows[index // self.in_features]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Follow to another device, but keep the scale float32 whatever the dtype asked for."""
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None:
            self.scale = scale.to(self.weight.device)
        return self


class GgufLinear(PackedLinear):
    """A weight in one of GGUF's block formats, unpacked by diffusers' functions."""

    def __init__(self, packed: Tensor, quant_type: int, bias: Tensor | None = None) -> None:
        """`packed` [O, bytes of a row] uint8; `quant_type` is gguf's number of the format."""
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(quant_type)]
        super().__init__(packed.shape[1] // size * block, packed, bias)
        self.quant_type = quant_type
        self.storage = f"GGUF {gguf.GGMLQuantizationType(quant_type).name}"

    def dense(self, dtype: torch.dtype) -> Tensor:
        return gguf_dense(self.weight, self.quant_type, dtype)

    def elements(self, index: Tensor) -> Tensor:
        rows = gguf_dense(self.weight[index // self.in_features], self.quant_type, torch.float32)
        return rows.gather(1, (index % self.in_features)[:, None])[:, 0]


class AdaptedLinear(nn.Linear):
    """A frozen linear layer with frozen LoRAs beside it: y = W x + b + sum of scale * B A x."""

    def __init__(self, linear: nn.Linear, deltas: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        """`deltas` holds (A [R, I], B [O, R], scale) of every LoRA."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.inner = linear
        # No name here may read like peft's, which mark what is trained.
        self.down = nn.ParameterList(nn.Parameter(a, requires_grad=False) for a, _, _ in deltas)
        self.up = nn.ParameterList(nn.Parameter(b, requires_grad=False) for _, b, _ in deltas)
        self.scales = tuple(scale for _, _, scale in deltas)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The layer's own weight as it is stored: its device and dtype are what is asked for."""
        return self.inner.weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.inner.bias

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        y = self.inner(input)
        for a, b, scale in zip(self.down, self.up, self.scales, strict=True):
            y = y + scale * F.linear(F.linear(input, a.to(input.dtype)), b.to(input.dtype))
        return y


def fp8_dense(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Stored numbers times their scale, rounded once, to `dtype`."""
    if scale is None:
        return weight.to(dtype)
    return weight.to(torch.float32, copy=True).mul_(scale).to(dtype)


def gguf_dense(packed: Tensor, quant_type: int, dtype: torch.dtype) -> Tensor:
    """Bytes [..., bytes of a row] of a GGUF format -> numbers [..., I]."""
    import gguf
    from diffusers.quantizers.gguf.utils import dequantize_functions

    kind = gguf.GGMLQuantizationType(quant_type)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Called with a dtype, because diffusers' layer unpacks in float16 and rounds there.
    numbers = dequantize_functions[kind](packed.reshape(-1, size), block, size, torch.float32)
    return numbers.reshape(*packed.shape[:-1], packed.shape[-1] // size * block).to(dtype)


def packed_weights(module: nn.Module) -> dict[str, PackedLinear]:
    """Name of every packed weight, as before adapters were put on -> its layer."""
    return {
        f"{name}.weight".replace(".base_layer.", "."): layer
        for name, layer in module.named_modules()
        if isinstance(layer, PackedLinear)
    }


def trainable_in_full(module: nn.Module) -> str | None:
    """Why not every weight of a network can be trained, in one sentence; None when all can."""
    for layer in module.modules():
        if isinstance(layer, PackedLinear):
            return (
                f"the teacher's weights are stored as {layer.storage}, which cannot be trained in "
                "full; train a LoRA, or load the teacher's bf16 file"
            )
        if isinstance(layer, AdaptedLinear):
            return (
                "the teacher carries a LoRA beside its weights, which cannot be trained in full; "
                "train a LoRA, or merge the teacher's LoRA into its weights"
            )
    return None

"""Linear layers whose frozen weights stay packed (fp8, NF4, GGUF), and ones with frozen LoRAs on.

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

from ..errors import AccVideoError

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_NF4_BLOCK = 64
"""Numbers that share a scale, as QLoRA has it."""


class PackedLinear(nn.Linear):
    """A frozen linear layer that computes in its input's dtype; peft can wrap it."""

    storage = ""
    """What people call the number format."""
    scale: Tensor | None
    """Float32; what the stored numbers are multiplied with, where that lies beside them."""

    def __init__(
        self, in_features: int, packed: Tensor, bias: Tensor | None, scale: Tensor | None = None
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features = in_features, packed.shape[0]
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("scale", None if scale is None else scale.float())

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] as numbers."""
        raise NotImplementedError

    def elements(self, index: Tensor) -> Tensor:
        """Entries of the flattened weight, float32, without unpacking the rest."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        if not torch.is_grad_enabled():
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return F.linear(input, self.dense(input.dtype), bias)
        return _Product.apply(input, self.weight, self)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Follow to another device, but keep the scale float32 whatever the dtype asked for."""
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None:
            self.scale = scale.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, storage={self.storage}"


class _Product(torch.autograd.Function):
    """x W^T + b with W unpacked on the way there and on the way back.

    The packed weight is saved although the layer has it, because what is asked for when the
    backward pass gets here tells a checkpointed block to come back first, weights and all.
    """

    @staticmethod
    def forward(x: Tensor, packed: Tensor, layer: PackedLinear) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dense(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, packed, ctx.layer = inputs
        ctx.save_for_backward(packed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        _ = ctx.saved_tensors
        return grad @ ctx.layer.dense(grad.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _packed: None, _layer: None) -> Tensor:  # type: ignore[override]
        return F.linear(tangent, ctx.layer.dense(tangent.dtype))


class Fp8Linear(PackedLinear):
    """weight = fp8 numbers * scale, the scale being one number, one per row [O, 1], or absent."""

    def __init__(
        self, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        """`weight` [O, I] in one of `FP8_DTYPES`."""
        super().__init__(weight.shape[1], weight.view(torch.uint8), bias, scale)
        self.format = weight.dtype
        self.storage = str(weight.dtype).removeprefix("torch.")

    def dense(self, dtype: torch.dtype) -> Tensor:
        return fp8_dense(self.weight.view(self.format), self.scale, dtype)

    def elements(self, index: Tensor) -> Tensor:
        values = self.weight.reshape(-1)[index].view(self.format).float()
        if self.scale is None:
            return values
        rows = self.scale.expand(self.out_features, 1)[:, 0]
        return values * rows[index // self.in_features]


class Nf4Linear(PackedLinear):
    """A weight in NF4 (QLoRA): 4-bit codes of 16 levels, and a scale for every 64 of them.

    bitsandbytes packs and unpacks. The numbers lie two in a byte, row after row.
    """

    storage = "NF4"
    scale: Tensor

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        """`packed` [O, I / 2] uint8; `scale` [O * I / 64], rounded up."""
        super().__init__(packed.shape[1] * 2, packed, bias, scale)

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None = None) -> Nf4Linear:
        """Round `weight` [O, I], I even."""
        packed, state = nf4().quantize_4bit(
            weight.contiguous(), blocksize=_NF4_BLOCK, quant_type="nf4", compress_statistics=False
        )
        return cls(packed.reshape(weight.shape[0], -1), state.absmax, bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        functional = nf4()
        narrow = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
        shape = torch.Size((self.out_features, self.in_features))
        state = functional.QuantState(
            self.scale, shape=shape, dtype=narrow, blocksize=_NF4_BLOCK, quant_type="nf4"
        )
        return functional.dequantize_4bit(self.weight.reshape(-1, 1), state).to(dtype)

    def elements(self, index: Tensor) -> Tensor:
        byte = self.weight.reshape(-1)[index // 2]
        code = torch.where(index % 2 == 0, byte >> 4, byte & 15)
        levels = nf4().get_4bit_type("nf4", device=code.device)
        return levels[code.long()] * self.scale[index // _NF4_BLOCK]


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


def nf4() -> Any:
    """bitsandbytes' functions. Raises AccVideoError where it is not installed."""
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise AccVideoError(
            f"NF4 weights need bitsandbytes ({error}); pip install bitsandbytes, or use fp8"
        ) from error
    return functional


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

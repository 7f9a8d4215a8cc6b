"""Products in fp8: the large linear layers of the blocks multiply 8-bit numbers, in half the time.

Both sides are e4m3: the weight with a scale per output row, as packing makes it and as fp8 files
have it, the input with a scale per token that is taken from it when it comes. Sums are kept in
float32 and the result is bfloat16. A LoRA beside a layer stays as exact as the network is.

It changes the answer: every product has two numbers of 4 significant bits. On random networks one
layer is .037 off, relative to its result's norm.

torch multiplies fp8 itself. torchao would bring the same product as a tensor of its own kind, which
neither block swapping nor the layers of packed files can hold, and one more package to install.

Shapes: N tokens of all samples, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AccVideoError
from .compiling import replaced_forward
from .experts import networks_of
from .packing import pack_fp8
from .quantised import Fp8Linear

if TYPE_CHECKING:
    from .video_model import VideoModel

FP8 = torch.float8_e4m3fn
CAPABILITY = (8, 9)
"""Of the first NVIDIA cards that multiply fp8: Ada (RTX 40, L40) and Hopper (H100)."""
_MULTIPLE = 16
"""Of what the features of a layer must be a multiple of."""
_WRAPPERS = (".base_layer", ".inner")
"""What the names of layers end in that have a LoRA beside them."""

Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [N, I] e4m3, its scales [N, 1], W [O, I] e4m3, its scales [O, 1]) -> [N, O] bfloat16."""


@contextmanager
def fp8_products(model: VideoModel) -> Iterator[None]:
    """Inside, the layers that a family's LoRAs go on multiply in fp8, unless gradients are asked.

    A weight that is not packed in fp8 gets a packed copy for that time, half its size; one that is
    serves as it lies. A student's adapters are rounded to what the network computes in, and are
    their old selves afterwards.

    Raises:
        AccVideoError: the device cannot multiply fp8.
    """
    multiply = product_for(model.device)
    with ExitStack() as stack:
        for network in networks_of(model.module).values():
            for layer in _layers(model, network):
                fast = partial(_forward, _packed(layer), multiply, layer.forward)
                stack.enter_context(replaced_forward(layer, fast))
            stack.enter_context(adapters_in(network, model.dtype))
        yield


@contextmanager
def adapters_in(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, a student's adapters, which are trained in float32, are in `dtype`."""
    kept = [(p, p.data) for name, p in network.named_parameters() if ".lora_" in name]
    try:
        with torch.inference_mode(False):
            for p, data in kept:
                p.data = data.to(dtype)
        yield
    finally:
        for p, data in kept:
            p.data = data


def product_for(device: torch.device) -> Product:
    """How a device multiplies fp8, found out with a small product.

    Raises:
        AccVideoError: it cannot.
    """
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise AccVideoError(
                f"{name} has compute capability {capability[0]}.{capability[1]} and does not "
                "multiply fp8, which takes 8.9 or more (RTX 40, L40, H100 and later); leave fp8 off"
            )
    x = torch.ones(_MULTIPLE, 2 * _MULTIPLE, device=device)
    reason: Exception | None = None
    for product in (scaled_rows, scaled_afterwards):
        try:
            rounded, scale = rounded_rows(x)
            product(rounded, scale, rounded, scale)
        except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
            reason = error
        else:
            return product
    raise AccVideoError(
        f"torch {torch.__version__} cannot multiply fp8 on {device} "
        f"({str(reason).splitlines()[0]}); update torch, or leave fp8 off"
    )


def scaled_rows(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """A `Product` with the scales in the kernel."""
    return _scaled_mm(x, x_scale, w, w_scale.t(), "RowWise")


def scaled_afterwards(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """A `Product` for cards whose kernels know one scale for all (Ada, consumer Blackwell)."""
    one = torch.ones((), device=x.device)
    y = _scaled_mm(x, one, w, one, "TensorWise")
    return (y.float() * x_scale * w_scale.t()).to(torch.bfloat16)


def _scaled_mm(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, recipe: str) -> Tensor:
    public: Any = getattr(F, "scaled_mm", None)
    if public is not None:
        kind = getattr(getattr(F, "ScalingType"), recipe)  # noqa: B009
        return public(
            *(x, w.t(), x_scale, kind, w_scale, kind),
            output_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return torch._scaled_mm(
        *(x, w.t()),
        scale_a=x_scale,
        scale_b=w_scale,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, I] in e4m3 and its scales [N, 1] float32.

    The scales are powers of two, by which x divides exactly, so that it is rounded once.
    """
    wide = x.float() if x.dtype == torch.float16 else x  # whose exponents do not reach far enough
    largest = wide.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-30)
    scale = torch.exp2(torch.ceil(torch.log2(largest / torch.finfo(FP8).max)))
    return (wide / scale.to(wide.dtype)).to(FP8), scale


def _layers(model: VideoModel, network: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers of the blocks that see every token, if fp8 can multiply them."""
    blocks = {id(layer) for block in model.family.blocks(network) for layer in block.modules()}
    ends = tuple(f".{target}" for target in model.family.lora_targets)
    for name, layer in network.named_modules():
        plain = type(layer) is nn.Linear
        if not (plain or (isinstance(layer, Fp8Linear) and layer.format == FP8)):
            continue
        assert isinstance(layer, nn.Linear)
        for wrapper in _WRAPPERS:
            name = name.removesuffix(wrapper)
        fits = layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0
        if id(layer) in blocks and name.endswith(ends) and fits:
            yield layer


def _packed(layer: nn.Linear) -> Fp8Linear:
    if isinstance(layer, Fp8Linear):
        return layer
    with torch.inference_mode(False), torch.no_grad():
        packed = pack_fp8(layer.weight)
    packed.bias = layer.bias  # by reference
    return packed


def _forward(
    packed: Fp8Linear, multiply: Product, plain: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """[..., I] -> [..., O]; `plain` where autograd has to see the product."""
    if torch.is_grad_enabled():
        return plain(x)
    rounded, x_scale = rounded_rows(x.reshape(-1, x.shape[-1]))
    scale = rounded.new_ones((), dtype=torch.float32) if packed.scale is None else packed.scale
    w_scale = scale.expand(packed.out_features, 1).contiguous()
    y = multiply(rounded, x_scale, packed.weight.view(FP8), w_scale).to(x.dtype)
    y = y if packed.bias is None else y + packed.bias.to(x.dtype)
    return y.reshape(*x.shape[:-1], packed.out_features)

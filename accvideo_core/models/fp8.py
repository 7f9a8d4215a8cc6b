"""Products in fp8: the large linear layers of the blocks multiply 8-bit numbers, in half the time.

Both sides are e4m3: the weight with a scale per output row, as packing makes it and as fp8 files
have it, the input with a scale per token that is taken from it when it comes. Sums are kept in
float32 and the result is bfloat16. A LoRA beside a layer stays as exact as the network is.

It changes the answer, since every factor keeps 4 significant bits. Relative to the norm, one layer
is .036 off. Velocities of random networks are .04 off for HunyuanVideo, .03 for Wan and .015 for
CogVideoX, where bf16 is .007; those of the embedded teacher .04 to .075 (bf16 .01), and its clip of
5 steps .11 (bf16 .016).

torch multiplies fp8 itself. torchao would bring the same product as a tensor of its own kind, which
neither block swapping nor the layers of packed files can hold, and one more package to install.

Shapes: N tokens of all samples, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AccVideoError
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
    their old selves afterwards. Blocks may be swapped inside, not around it.

    Raises:
        AccVideoError: the device cannot multiply fp8.
    """
    multiply = product_for(model.device)
    _ = model.fingerprint  # of the weights as they are
    with ExitStack() as stack:
        for network in networks_of(model.module).values():
            stack.enter_context(adapters_in(network, model.dtype))
            for owner, name, layer in _layers(model, network):
                stack.callback(setattr, owner, name, layer)
                setattr(owner, name, _Fp8Product(layer, multiply))
        yield


class _Fp8Product(Fp8Linear):
    """A layer that multiplies in fp8, in the place of one that does not.

    It is a module, and no function in the layer's stead, because torch.compile has one code for all
    modules of a kind, and one for each function.
    """

    def __init__(self, layer: nn.Linear, multiply: Product) -> None:
        packed = layer if isinstance(layer, Fp8Linear) else _packed(layer)
        super().__init__(packed.weight.view(FP8), packed.scale)
        # The very tensors, which block swapping may move.
        self.weight, self.bias = packed.weight, layer.bias
        self.scale = packed.scale
        self.multiply = multiply
        self.__dict__["plain"] = layer  # and no part of this one

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]; plain where autograd has to see the product."""
        if torch.is_grad_enabled():
            return self.__dict__["plain"](input)
        x, x_scale = rounded_rows(input.reshape(-1, self.in_features))
        scale = torch.ones((), device=x.device) if self.scale is None else self.scale
        w_scale = scale.expand(self.out_features, 1).contiguous()
        y = self.multiply(x, x_scale, self.weight.view(FP8), w_scale).to(input.dtype)
        y = y if self.bias is None else y + self.bias.to(input.dtype)
        return y.reshape(*input.shape[:-1], self.out_features)


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


def _layers(model: VideoModel, network: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(owner, name, layer) of what sees every token in the blocks, if fp8 can multiply it."""
    blocks = {id(layer) for block in model.family.body_of(network) for layer in block.modules()}
    ends = tuple(f".{target}" for target in model.family.lora_targets)
    found = []
    for path, layer in network.named_modules():
        plain = type(layer) is nn.Linear
        if not (plain or (isinstance(layer, Fp8Linear) and layer.format == FP8)):
            continue
        assert isinstance(layer, nn.Linear)
        owner, _, name = path.rpartition(".")
        for wrapper in _WRAPPERS:
            path = path.removesuffix(wrapper)
        fits = layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0
        if id(layer) in blocks and path.endswith(ends) and fits:
            found.append((network.get_submodule(owner), name, layer))
    return found


def _packed(layer: nn.Linear) -> Fp8Linear:
    with torch.inference_mode(False), torch.no_grad():
        return pack_fp8(layer.weight)

"""Attention kernels by name: what each can compute, what it needs, and how it is called.

All but SageAttention, which rounds queries and keys to 8 bits, are exact: they differ in the order
of their sums. A kernel is called as run(q, k, v, mask) and returns [B, N, H, D].

Shapes: q [B, N, H, D], k and v [B, M, H, D]: B batch, N queries, M keys, H heads, D head size; mask
bool, True where attended to, broadcastable to [B, H, N, M], or None (for FlexAttention a BlockMask
or None).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import AccVideoError
from ..wording import listed
from .compiling import has_cpp_compiler

Run = Callable[[Tensor, Tensor, Tensor, Any], Tensor]

HALF = (torch.bfloat16, torch.float16)
SINGLE = (torch.float32, *HALF)
ALL = (torch.float64, *SINGLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a kernel computes on one kind of device."""

    dtypes: tuple[torch.dtype, ...] = ALL
    largest_head: int = 2**31
    multiple: int = 1
    """Of which the head size is one."""
    masks: bool = False
    """Whether it takes a mask of single tokens."""
    capability: tuple[int, int] = (0, 0)
    """Of the oldest CUDA device."""
    below: tuple[int, int] = (1000, 0)
    """Capability from which on CUDA devices are too new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What attention is computed of, as far as kernels care."""

    device: torch.device
    dtype: torch.dtype
    head_size: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"heads of {self.head_size} in {dtype} on this {self.device.type} device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One way to compute attention."""

    name: str
    load: Callable[[torch.device], Run]
    """Imports what it needs there; gives the same function every time."""
    limits: Mapping[str, Limits]
    """By type of device; "any" stands for those that are not named."""
    exact: bool = True
    tried: bool = True
    """Whether a small call, which costs next to nothing, shows that it runs."""
    needs: str = ""
    """What to install for it."""

    def on(self, device: torch.device) -> Limits | None:
        """What it computes on `device`; None if nothing."""
        return self.limits.get(device.type, self.limits.get("any"))

    def takes(self, numbers: Numbers) -> bool:
        """Whether it is made for them; what it needs may still be missing."""
        limits = self.on(numbers.device)
        if limits is None or numbers.dtype not in limits.dtypes:
            return False
        if numbers.head_size % limits.multiple or numbers.head_size > limits.largest_head:
            return False
        if numbers.device.type != "cuda":
            return True
        capability = torch.cuda.get_device_capability(numbers.device)
        return limits.capability <= capability < limits.below

    def takes_masks(self, device: torch.device) -> bool:
        limits = self.on(device)
        return limits is not None and limits.masks


def ready(kernel: Kernel, numbers: Numbers) -> Run:
    """The kernel, which can be called on such numbers.

    Raises:
        AccVideoError: it cannot, with what to install or which kernels can.
    """
    if not kernel.takes(numbers):
        raise AccVideoError(
            f"attention kernel {kernel.name!r} does not compute {numbers}; choose {_able(numbers)}"
        )
    try:
        run = kernel.load(numbers.device)
    except (ImportError, OSError, AttributeError) as error:
        # A package that was built for another torch fails in any of these ways.
        raise AccVideoError(
            f"attention kernel {kernel.name!r} needs {kernel.needs} ({error})"
        ) from error
    if kernel.tried:
        try:
            _try(run, numbers)
        except Exception as error:  # whatever a foreign kernel raises
            raise AccVideoError(
                f"attention kernel {kernel.name!r} cannot compute {numbers} "
                f"({str(error).strip().partition(chr(10))[0]}); "
                f"choose {_able(numbers, but=kernel)}"
            ) from error
    return run


def check_mask(kernel: Kernel, device: torch.device) -> None:
    """Refuse a kernel that takes no mask of single tokens.

    Raises:
        AccVideoError: with those that do.
    """
    if not kernel.takes_masks(device):
        able = [other.name for other in KERNELS.values() if other.takes_masks(device)]
        raise AccVideoError(
            f"attention kernel {kernel.name!r} takes no mask; choose {listed(able)}"
        )


def _able(numbers: Numbers, but: Kernel | None = None) -> str:
    """The kernels that are made for `numbers`."""
    return listed([k.name for k in KERNELS.values() if k is not but and k.takes(numbers)])


@cache
def _try(run: Run, numbers: Numbers) -> None:
    """A small call of the kernel, once."""
    device, generator = numbers.device, torch.Generator(numbers.device).manual_seed(0)
    q, k, v = torch.randn(3, 1, 128, 1, numbers.head_size, generator=generator, device=device)
    with torch.no_grad():
        run(q.to(numbers.dtype), k.to(numbers.dtype), v.to(numbers.dtype), None)


# torch ---------------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@cache
def _sdpa_by(backend: str) -> Run:
    """torch's attention by one of its backends, which it is told for the time of the call."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    only = getattr(SDPBackend, backend)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with sdpa_kernel(only):
            return _sdpa(q, k, v, mask)

    return run


def _flex(device: torch.device) -> Run:
    """Raises OSError or ImportError where nothing can be compiled."""
    if device.type == "cuda":
        importlib.import_module("triton")
        return _compiled_flex()
    if not has_cpp_compiler():
        raise OSError("there is no C++ compiler")
    return _flex_on_cpu()


@cache
def _compiled_flex() -> Run:
    """As it is, not compiled, it would hold the scores of all pairs of tokens."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return compiled(q, k, v, block_mask=mask).transpose(1, 2)

    return run


@cache
def _flex_on_cpu() -> Run:
    """The same, around two faults of what torch 2.13 makes for a CPU.

    With 8 keys more than a multiple of 16 its code reads what nobody wrote; and it cannot be part
    of other compiled code, which is left for it and taken up again.
    """
    flex = _compiled_flex()

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        if k.shape[1] % 16 == 8:
            return _sdpa(q, k, v, None if mask is None else _by_token(mask))
        return flex(q, k, v, mask)

    outside: Any = torch.compiler.disable(run)
    return outside


def _by_token(mask: Any) -> Tensor:
    """A BlockMask of all heads and samples -> bool [queries, keys]."""
    pairs = mask.to_dense()[0, 0].bool()
    for dim, (size, tokens) in enumerate(zip(mask.BLOCK_SIZE, mask.seq_lengths, strict=True)):
        pairs = pairs.repeat_interleave(size, dim).narrow(dim, 0, tokens)
    return pairs


# Packages ------------------------------------------------------------------------------------


def _imported(package: str, function: str, _device: torch.device, **options: Any) -> Run:
    return _outside(getattr(importlib.import_module(package), function), **options)


@cache
def _outside(function: Callable[..., Any], **options: Any) -> Run:
    """A package's function of q, k, v; compiled code is left for it, and taken up again."""

    def run(q: Tensor, k: Tensor, v: Tensor, _mask: None) -> Tensor:
        found = function(q.contiguous(), k.contiguous(), v.contiguous(), **options)
        return found[0] if isinstance(found, tuple) else found

    outside: Any = torch.compiler.disable(run)
    return outside


_NEWER = Limits(dtypes=HALF, largest_head=256, multiple=8, capability=(8, 0))

_LIST = (
    Kernel(
        name="sdpa",
        load=lambda _device: _sdpa,
        limits={"any": Limits(masks=True)},
        tried=False,
    ),
    Kernel(
        name="cudnn",
        load=lambda _device: _sdpa_by("CUDNN_ATTENTION"),
        limits={
            "cuda": Limits(dtypes=HALF, largest_head=128, multiple=8, masks=True, capability=(8, 0))
        },
        needs="torch 2.5 or newer; install it with: pip install -U torch",
    ),
    Kernel(
        name="flash",
        load=lambda _device: _sdpa_by("FLASH_ATTENTION"),
        limits={"cuda": _NEWER, "cpu": Limits(masks=True)},
    ),
    Kernel(
        name="efficient",
        load=lambda _device: _sdpa_by("EFFICIENT_ATTENTION"),
        limits={"cuda": Limits(dtypes=SINGLE, multiple=8, masks=True, capability=(5, 0))},
    ),
    Kernel(
        name="math",
        load=lambda _device: _sdpa_by("MATH"),
        limits={"any": Limits(masks=True)},
        tried=False,
    ),
    Kernel(
        name="xformers",
        load=partial(_imported, "xformers.ops", "memory_efficient_attention"),
        limits={"cuda": Limits(dtypes=SINGLE, multiple=8, capability=(6, 0))},
        needs="the package xformers; install it with: pip install xformers",
    ),
    Kernel(
        name="flash2",
        load=partial(_imported, "flash_attn", "flash_attn_func"),
        limits={"cuda": _NEWER},
        needs="the package flash-attn; install it with: "
        "pip install flash-attn --no-build-isolation",
    ),
    Kernel(
        name="flash3",
        load=partial(_imported, "flash_attn_interface", "flash_attn_func"),
        limits={
            "cuda": Limits(
                dtypes=HALF, largest_head=256, multiple=8, capability=(9, 0), below=(10, 0)
            )
        },
        needs="FlashAttention-3, which is built from the folder hopper of the flash-attention "
        "sources; install it from there with: pip install . --no-build-isolation",
    ),
    Kernel(
        name="sage",
        load=partial(_imported, "sageattention", "sageattn", tensor_layout="NHD"),
        limits={"cuda": Limits(dtypes=HALF, largest_head=128, capability=(8, 0))},
        exact=False,
        needs="the package sageattention; install it with: pip install sageattention",
    ),
    Kernel(
        name="flex",
        load=_flex,
        limits={"cuda": Limits(dtypes=SINGLE, capability=(8, 0)), "cpu": Limits(dtypes=SINGLE)},
        tried=False,  # compiling it is not next to nothing
        needs="torch 2.5 or newer and something to compile it with: on a GPU Triton, pip install "
        "triton (on Windows triton-windows), on a CPU a C++ compiler",
    ),
)

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _LIST}
"""By name."""

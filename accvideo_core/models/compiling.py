"""torch.compile, block by block.

One block's code serves all blocks of its kind, so that compiling takes as long for 60 blocks as for
one. Embeddings and the last layer, a few thousandths of the work, stay as they are.

Fused operations round in another order: velocities of random networks of every kind differ by at
most 5e-7 of their largest number in float32 (inductor on a CPU).
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AccVideoError
from .experts import blocks_of
from .quantised import Fp8Linear, PackedLinear
from .video_model import VideoModel

VARIANTS = 64
"""Versions of a block that are compiled: student and teacher, with and without gradients, sizes."""

Backend = str | Callable[..., Any]
"""Of torch.compile."""


def check_compiler(device: torch.device, setting: str, backend: Backend = "inductor") -> None:
    """Refuse to compile where the compiler is missing; `setting` is what would ask for it.

    Raises:
        AccVideoError: with what to install.
    """
    if backend != "inductor":
        return
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        raise AccVideoError(
            f"{setting} needs Triton, which is not installed; install it (on Windows, "
            f"triton-windows), or leave {setting} out"
        )
    if device.type == "cpu" and not has_cpp_compiler():
        raise AccVideoError(
            f"{setting} needs a C++ compiler, and there is none; install one, such as g++, or "
            f"leave {setting} out"
        )


def has_cpp_compiler() -> bool:
    """Whether torch finds what its code for CPUs is compiled with."""
    return any(map(shutil.which, ("g++", "clang++", "c++", "cl")))


@contextmanager
def compiled_blocks(
    model: VideoModel, backend: Backend = "inductor", training: bool = True
) -> Iterator[None]:
    """Inside, the blocks run compiled; what is compiled for one block serves all of its kind.

    Only a block's `forward` is compiled, so that hooks on it, such as those that take features or
    bring swapped weights, run outside. The first sizes that are met are compiled for themselves,
    which is fastest; from the second on, code for any size (of the batch, the text, the video).

    Args:
        training: whether autograd will see the blocks. If not, fp8 layers are compiled as well,
            and a first block is not compiled for itself because its inputs lie otherwise.
    """
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(cache_size_limit=VARIANTS))
        for block in chain(*blocks_of(model)):
            for layer in block.modules():
                if isinstance(layer, PackedLinear) and (training or not _compiles(layer)):
                    # Compiled, autograd would keep the unpacked weight for the backward pass.
                    plain = torch.compiler.disable(layer.forward)
                    stack.enter_context(replaced_forward(layer, plain))
            fast = torch.compile(block.forward, backend=backend)
            fast = fast if training else _in_one_layout(fast)
            stack.enter_context(replaced_forward(block, fast))
        yield


def _in_one_layout(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, whose tensors always lie row after row."""

    def row_after_row(x: Any) -> Any:
        # An axis of length 1 may have any stride, which only new views tell rightly.
        return x.contiguous().view(-1).view(x.shape) if isinstance(x, Tensor) else x

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs = {name: row_after_row(x) for name, x in kwargs.items()}
        return forward(*map(row_after_row, args), **kwargs)

    return call


def _compiles(layer: PackedLinear) -> bool:
    """Whether no other library unpacks the weight."""
    return isinstance(layer, Fp8Linear)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module` computes with `forward`."""
    had = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if module.__dict__.get("forward") is not forward:
            pass  # sharded meanwhile, which goes on around what this put there
        elif had is None:
            del module.forward
        else:
            module.forward = had

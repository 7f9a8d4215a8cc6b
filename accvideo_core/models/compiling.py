"""torch.compile, block by block.

One block's code serves all blocks of its kind, so that compiling takes as long for 60 blocks as for
one. Embeddings and the last layer, a few thousandths of the work, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .experts import networks_of
from .quantised import PackedLinear
from .video_model import VideoModel

VARIANTS = 64
"""Versions of a block that are compiled: student and teacher, with and without gradients, sizes."""

Backend = str | Callable[..., Any]
"""Of torch.compile."""


@contextmanager
def compiled_blocks(model: VideoModel, backend: Backend = "inductor") -> Iterator[None]:
    """Inside, the blocks run compiled; what is compiled for one block serves all of its kind.

    Only a block's `forward` is compiled, so that hooks on it, such as those that take features or
    bring swapped weights, run outside.
    """
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(cache_size_limit=VARIANTS))
        for block in _blocks(model):
            for layer in block.modules():
                if isinstance(layer, PackedLinear):
                    # Compiled, autograd would keep the unpacked weight for the backward pass.
                    plain = torch.compiler.disable(layer.forward)
                    stack.enter_context(replaced_forward(layer, plain))
            fast = torch.compile(block.forward, backend=backend)
            stack.enter_context(replaced_forward(block, fast))
        yield


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


def _blocks(model: VideoModel) -> list[nn.Module]:
    """The blocks of all networks of a model, in order."""
    return [
        block
        for network in networks_of(model.module).values()
        for block in model.family.blocks(network)
    ]

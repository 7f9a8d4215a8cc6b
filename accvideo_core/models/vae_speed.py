"""A VAE's decoder made faster by how its numbers lie, or compiled.

With channels last the numbers of one place lie side by side, which convolutions on newer GPUs in
half precision prefer. Compiled, norms and activations around the convolutions are joined to one
pass over memory each; the compiler then decides itself how numbers lie.

Neither changes frames by more than rounding. Both are options and not the rule, because which of
them gains differs from card to card: on CPUs neither does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import AccVideoError
from ..wording import listed
from .compiling import VARIANTS, Backend, check_compiler, replaced_forward
from .vae import VideoVAE

WAYS = ("plain", "channels_last", "compiled")
"""How a decoder computes: as diffusers has it, or faster."""
COMPILED = frozenset(
    {
        *("HunyuanVideoMidBlock3D", "HunyuanVideoUpBlock3D"),
        *("CogVideoXMidBlock3D", "CogVideoXUpBlock3D"),
        # Blocks of Wan's count through a list of what they keep, which code for one call is not
        # code for the next; what lies between its convolutions is compiled.
        *("WanRMS_norm", "WanAttentionBlock"),
    }
)
"""Classes of diffusers' modules that are compiled, those within them together with them."""
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Axes of a weight -> how it is laid out."""


@contextmanager
def fast_decoder(vae: VideoVAE, how: str, backend: Backend = "inductor") -> Iterator[None]:
    """Inside, `vae` decodes as one of `WAYS` says; afterwards it is as it was.

    Raises:
        AccVideoError: there is no such way, or this VAE or machine has not what it takes.
    """
    if how not in WAYS:
        raise AccVideoError(f"VAE speed {how!r} is unknown; choose {listed(WAYS)}")
    if how == "plain":
        yield
        return
    decoder = getattr(vae.module, "decoder", None)
    if decoder is None:
        raise AccVideoError(
            f"a {type(vae.module).__name__} has no decoder that can be {how}; leave it plain"
        )
    _ = vae.footprint  # counted on a copy of the decoder as it is
    with ExitStack() as stack:
        if how == "channels_last":
            stack.callback(_laid_out, decoder, dict.fromkeys(_LAST, torch.contiguous_format))
            _laid_out(decoder, _LAST)
        else:
            check_compiler(vae.module.device, "compiled", backend)
            stack.enter_context(torch._dynamo.config.patch(cache_size_limit=VARIANTS))
            for block in _outermost(decoder):
                fast = torch.compile(block.forward, backend=backend)
                stack.enter_context(replaced_forward(block, fast))
        yield


def _laid_out(module: Any, formats: dict[int, torch.memory_format]) -> None:
    # Weights that move in ComfyUI's inference mode could never be used outside of it again.
    with torch.inference_mode(False), torch.no_grad():
        for p in module.parameters():
            if p.dim() in formats:
                p.data = p.data.contiguous(memory_format=formats[p.dim()])


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """The modules within that are compiled as a whole."""
    for child in module.children():
        if type(child).__name__ in COMPILED:
            yield child
        else:
            yield from _outermost(child)

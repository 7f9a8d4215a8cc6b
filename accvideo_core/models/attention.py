"""Which kernel computes a model's attention, for as long as a `with` lasts.

    with attention(model, "flash3"):
        x = sample(model, ...)

A kernel is chosen by name, or measured ("auto"), for the blocks of one model, and nothing else is
touched: two models in one process may use different ones. All is decided before a network runs,
because its blocks may be compiled.

Padding never reaches a kernel. A Condition says how many text tokens of a sample are valid; if all
are, as for one prompt, there is no mask. Else the samples are attended to in groups of one length,
each without its padding, which is exact.

It is made for sampling. Gradients flow, save through kernels that have none, but blocks that are
computed again in a backward pass (gradient checkpointing) would not find what was decided.

Shapes: B batch, N video tokens, L text tokens, M of both, H heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..conditioning import Condition
from ..errors import AccVideoError
from ..wording import listed
from .context_parallel import all_tokens, own_tokens, processes_of
from .experts import networks_of
from .fastest import Shape, fastest
from .kernels import KERNELS, Kernel, Numbers, Run, check_mask, ready
from .padding import padding_bias
from .processors import PROCESSORS, Processor
from .sparse import PATTERNS, Grid, Radial, block_mask, token_mask
from .video_model import VideoModel


@contextmanager
def attention(
    model: VideoModel, kernel: str = "auto", sparse: str | Radial = "dense"
) -> Iterator[None]:
    """Inside, `model` computes attention with `kernel`; afterwards it is as it was.

    Args:
        model: the one that is asked. Others over the same networks compute the same, but with
            masks for padding, and with torch's pick in place of "auto".
        kernel: a name in `KERNELS`, or "auto": the fastest exact one, measured where a shape is
            first met and remembered; on CPUs and for tiny sequences torch's pick, unmeasured.
        sparse: a name in `PATTERNS`, or a pattern. All but "dense" are approximations: the video's
            tokens attend to fewer, by FlexAttention or, to compare, by the mask of a dense kernel.

    Raises:
        AccVideoError: kernel or pattern are unknown, not installed, or not made for such a model.
    """
    for name, known in ((kernel, ["auto", *KERNELS]), (sparse, list(PATTERNS))):
        if isinstance(name, str) and name not in known:
            raise AccVideoError(f"there is no attention {name!r}; choose {listed(known)}")
    pattern = PATTERNS[sparse] if isinstance(sparse, str) else sparse
    family = model.family
    if pattern is not None and not family.joint:
        raise AccVideoError(
            f"{family.title} attends within frames and along time in turn, of which nothing can "
            "be left out; use dense attention"
        )
    attends: dict[nn.Module, Attend] = {}
    before: list[tuple[Any, Any]] = []
    try:
        for network in networks_of(model.module).values():
            found = _attention_modules(model, network)
            attend = attends[network] = _attend(model, found, kernel, pattern)
            for module, processor in found.items():
                before.append((module, module.processor))
                module.processor = processor(attend)
        model.family = replace(family, forward=_prepared(model, attends))
        yield
    finally:
        model.family = family
        for module, processor in before:
            module.processor = processor


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbours in a batch that are attended to in one call."""

    start: int
    stop: int
    text: int
    """Text tokens of each that are valid."""
    mask: Any
    """Of a sparse pattern; None for all."""


@dataclass(eq=False, kw_only=True)
class Attend:
    """Attention of one network: its kernel, and what is known of the tokens of a forward pass."""

    measured: bool
    """Whether the kernel is chosen for the tokens."""
    kernel: Kernel
    run: Run
    """The kernel, for all tokens of a sample."""
    other: Run
    """For those that attend to the tokens of a text or an image."""
    biased: Run
    """For those that attend to the tokens of a text, some of which stand for many."""
    text_tokens: int | None
    """Of a text apart, padding that is attended to included; None where the kernel takes no bias.
    """
    numbers: Numbers
    heads: int
    joins_text: bool
    pattern: Radial | None
    processes: Any
    """A group that divides the sequence; None where it is whole."""
    known: bool = False
    """Whether the tokens are: the network was asked through the model."""
    mask: Any = None
    """Of a sparse pattern, for a batch without padding."""
    parts: tuple[Part, ...] = ()
    """Of a batch with padding."""
    padded: bool = False
    """Whether there are any. Compiled code asks for nothing else about them."""
    bias: Tensor | None = None
    """Of the text's tokens, those that stand for its padding; None where all are attended to."""

    def to_all(self, q: Tensor, k: Tensor, v: Tensor, text: int, mask: Tensor | None) -> Tensor:
        """[B, M, H, D]: every token of a sample to every other; the last `text` are its text's.

        At padding zeros come out. `mask` is what diffusers makes for its own processors.
        """
        if self.processes is None:
            return self._to_all(q, k, v, text, mask)
        q, k, v = (all_tokens(x, text, self.processes) for x in (q, k, v))
        text *= dist.get_world_size(self.processes)
        return own_tokens(self._to_all(q, k, v, text, mask), text, self.processes)

    def to_others(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, N, H, D] to the tokens of a text or an image, k and v [B, L, H, D], all valid."""
        return self.other(q, k, v, None)

    def of_text(self, text: Tensor) -> Tensor:
        """Of a padded text's tokens [B, L, C] those whose keys and values are needed."""
        return text if self.bias is None else text[:, : self.bias.shape[-1]]

    def to_text(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, N, H, D] to k and v [B, L, H, D] of what `of_text` gave."""
        if self.bias is None:
            return self.other(q, k, v, None)
        return self.biased(q, k, v, self.bias)

    def _to_all(self, q: Tensor, k: Tensor, v: Tensor, text: int, mask: Tensor | None) -> Tensor:
        if not self.known:
            self._check_unknown(mask)
            return self.run(q, k, v, mask)
        if not self.padded:
            return self.run(q, k, v, self.mask)
        return _in_parts(self, q, k, v, text)  # type: ignore[call-arg]

    def _check_unknown(self, mask: Tensor | None) -> None:
        if self.pattern is not None or (self.processes is not None and mask is not None):
            raise AccVideoError(
                "this network's attention was chosen for another VideoModel over it; ask that "
                "one, or enter attention() with the one that is asked"
            )
        if mask is not None:
            check_mask(self.kernel, mask.device)

    @contextmanager
    def over(self, grid: Grid, cond: Condition) -> Iterator[None]:
        """Inside, the network computes one forward pass over the tokens of `grid` and `cond`."""
        n = 1 if self.processes is None else dist.get_world_size(self.processes)
        # Text that is divided is padded up to a multiple of n.
        text = -(-cond.text.shape[1] // n) * n if self.joins_text else 0
        if self.measured:
            self._choose(Shape.near(self.numbers, self.heads // n, math.prod(grid) + text))
        lengths = _text_lengths(cond) if self.joins_text else [0] * len(cond)
        self.bias = self._padding(cond)
        if any(length != text for length in lengths):
            self.parts = tuple(self._parts(grid, lengths))
            self.padded = True
        else:
            self.mask = self._mask(grid, text)
        self.known = True
        try:
            yield
        finally:
            self.known, self.mask, self.parts, self.padded = False, None, (), False
            self.bias = None

    def _choose(self, shape: Shape) -> None:
        kernel = fastest(shape)
        if kernel is not self.kernel:
            self.kernel = kernel
            self.run = self.other = ready(kernel, self.numbers)

    def _padding(self, cond: Condition) -> Tensor | None:
        if self.text_tokens is None:
            return None
        longest = max(_text_lengths(cond))
        return padding_bias(longest, self.text_tokens, self.numbers.dtype, self.numbers.device)

    def _parts(self, grid: Grid, lengths: Sequence[int]) -> Iterator[Part]:
        """Neighbours of one length together."""
        start = 0
        for text, rows in groupby(lengths):
            stop = start + len(list(rows))
            yield Part(start, stop, text, self._mask(grid, text))
            start = stop

    def _mask(self, grid: Grid, text: int) -> Any:
        if self.pattern is None:
            return None
        make = block_mask if self.kernel.name == "flex" else token_mask
        return make(self.pattern, grid, text, self.numbers.device)


@torch.compiler.disable
def _in_parts(attend: Attend, q: Tensor, k: Tensor, v: Tensor, text: int) -> Tensor:
    """Outside of compiled code, which would be compiled for the lengths of every batch."""
    video = q.shape[1] - text
    out = torch.zeros_like(q)
    for part in attend.parts:
        rows, tokens = slice(part.start, part.stop), slice(video + part.text)
        some = [x[rows, tokens] for x in (q, k, v)]
        out[rows, tokens] = attend.run(some[0], some[1], some[2], part.mask)
    return out


def decided(blocks: Sequence[nn.Module]) -> Hashable:
    """What attention of a network's blocks was told for the pass at hand: None outside of one.

    Whoever records a pass to repeat it may repeat it where this is the same.
    """
    found = (getattr(module, "processor", None) for block in blocks for module in block.modules())
    attend = next((p.attend for p in found if isinstance(p, Processor)), None)
    if attend is None or not attend.known:
        return None
    text = None if attend.bias is None else attend.bias.shape[-1]
    return attend.kernel.name, text, tuple((p.start, p.stop, p.text) for p in attend.parts)


def _attention_modules(model: VideoModel, network: nn.Module) -> dict[Any, type[Processor]]:
    """The attention modules of the network's blocks, and what is to compute them."""
    found: dict[Any, type[Processor]] = {}
    for block in model.family.body_of(network):
        for module in block.modules():
            current = getattr(module, "processor", None)
            if isinstance(current, Processor):
                found[module] = type(current)
            elif current is not None:
                name = type(current).__name__
                if name not in PROCESSORS:
                    raise AccVideoError(
                        f"attention of this {type(network).__name__} is computed by {name}, for "
                        "which no kernel can be chosen; unfuse its projections, or put diffusers' "
                        "own processors back"
                    )
                found[module] = PROCESSORS[name]
    return found


def _attend(
    model: VideoModel,
    found: Mapping[Any, type[Processor]],
    kernel: str,
    pattern: Radial | None,
) -> Attend:
    """Of a network with these attention modules."""
    module = next(iter(found))
    numbers = Numbers(
        device=model.device, dtype=model.dtype, head_size=module.inner_dim // module.heads
    )
    first, other = KERNELS["sdpa" if kernel == "auto" else kernel], None
    if pattern is not None and kernel in ("auto", "flex"):
        first, other = KERNELS["flex"], KERNELS["sdpa"]
    elif pattern is not None:
        check_mask(first, numbers.device)
    run = ready(first, numbers)
    # Of the kernels that "auto" may find some take no mask, which a bias is.
    biased = KERNELS["sdpa"] if kernel == "auto" else other or first
    pads = model.family.pads_text and biased.takes_masks(numbers.device)
    return Attend(
        measured=kernel == "auto" and pattern is None,
        kernel=first,
        run=run,
        other=run if other is None else ready(other, numbers),
        numbers=numbers,
        heads=module.heads,
        joins_text=any(processor.joins_text for processor in found.values()),
        biased=ready(biased, numbers),
        text_tokens=model.family.text_tokens if pads else None,
        pattern=pattern,
        processes=processes_of(module.processor),
    )


def _prepared(
    model: VideoModel, attends: Mapping[nn.Module, Attend]
) -> Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]:
    """The family's forward, which tells a network's `Attend` of the tokens before."""
    forward, spec = model.family.forward, model.latent_spec

    def asked(network: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        attend = attends.get(network)
        if attend is None:
            return forward(network, x_t, t, cond)
        if torch.is_grad_enabled() and getattr(network, "is_gradient_checkpointing", False):
            raise AccVideoError(
                "attention kernels are chosen for sampling, and gradient checkpointing would "
                "compute blocks again without them; switch one of the two off"
            )
        frames, height, width = x_t.shape[2:]
        frames = frames // spec.patch_t if model.family.joint else 1
        grid = (frames, height // spec.patch, width // spec.patch)
        with attend.over(grid, cond):
            return forward(network, x_t, t, cond)

    return asked


_read: Any = WeakIdKeyDictionary()
"""Masks -> their version, and the lengths that were read from it."""


def _text_lengths(cond: Condition) -> list[int]:
    """The valid text tokens of every sample.

    Without a mask they are known. A mask on a GPU is waited for, once.
    """
    mask = cond.mask
    if mask is None:
        return [cond.text.shape[1]] * len(cond)
    if mask.is_inference():  # has no version
        return mask.sum(dim=1).tolist()
    version, lengths = _read.get(mask, (None, []))
    if version != mask._version:
        lengths = mask.sum(dim=1).tolist()
        _read[mask] = (mask._version, lengths)
    return lengths

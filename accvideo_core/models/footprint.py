"""Footprint: the bytes that a network takes on its device while it samples, known before it does.

The network is copied without values to torch's meta device and asked there as a sampler asks it,
while a ledger counts.

Shapes: B batch, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..conditioning import Condition
from ..errors import AccVideoError
from ..guidance import Guided
from .experts import blocks_of
from .fp8 import fp8_products
from .ledger import Ledger, fused_kernels
from .packing import pack_weights
from .swapping import SLOTS, spread
from .video_model import VideoModel

_MEMINFO = Path("/proc/meminfo")
_TIMES = (1.0, 0.5)
"""A first step computes what the others keep."""


class Unplannable(AccVideoError):
    """A network that cannot be counted without values; it may well work."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that sampling takes on a device."""

    all_weights: int
    working: int
    """The most that comes and goes on top of the weights."""
    blocks: tuple[tuple[int, ...], ...]
    """Weights of the blocks, of each network."""
    on_cpu: bool
    swap_blocks: int = 0

    @property
    def waiting(self) -> int:
        """Weights in main memory, where that is not the device's own."""
        parked, places = swapped_bytes(self.blocks, self.swap_blocks)
        return 0 if self.on_cpu else parked - places

    @property
    def weights(self) -> int:
        """Those on the device, with the places that swapped ones take there."""
        _, places = swapped_bytes(self.blocks, self.swap_blocks)
        return self.all_weights + (places if self.on_cpu else -self.waiting)

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return self.weights + self.working


def footprint(
    asked: VideoModel | Guided,
    cond: Condition,
    shape: tuple[int, ...],
    device: torch.device | None = None,
    weights: str | None = None,
    fp8: bool = False,
) -> Footprint:
    """What sampling takes without swapping; set `swap_blocks` of the result for more.

    Args:
        asked: its weights may lie anywhere, and on the meta device they need not be.
        cond: of one sample or more, of which the longest text counts.
        shape: [B, C, T, H, W] of the latents that go through the network at once.
        device: where it will be; None is where the network is. This machine may lack it.
        weights: packed so (`packing.PACKERS`); None leaves them as they are.
        fp8: whether `fp8.fp8_products` is on.

    Raises:
        AccVideoError: the weights are packed already; `Unplannable` where it cannot be told.
    """
    model = asked.model if isinstance(asked, Guided) else asked
    there = model.device if device is None else device
    ledger = Ledger(there)
    with torch.inference_mode(False), torch.no_grad(), fused_kernels(there), ledger:
        # Its fingerprint is not for reading: there are no values to make one of.
        alike = replace(model, module=without_values(model.module), _fingerprint="counted")
        try:
            alike = alike if weights is None else pack_weights(alike, weights)
            with fp8_products(alike) if fp8 else nullcontext():
                held = ledger.peak = ledger.live
                blocks = block_bytes(alike)
                _sample(_with_model(asked, alike), _rows(cond, shape[0]), shape)
                return Footprint(held, ledger.peak - held, blocks, there.type == "cpu")
        except RuntimeError as error:  # NotImplementedError is one
            raise Unplannable(
                "the memory of this network cannot be planned, because it asks for values that are "
                f"not there ({' '.join(str(error).split())[:200]}); watch the device's own figures"
            ) from error


def _sample(asked: VideoModel | Guided, cond: Condition, shape: tuple[int, ...]) -> None:
    x_1 = x = torch.empty(shape, device="meta")
    with asked.asking(cond) as velocity:
        for t in _TIMES:
            v = velocity(x, t)
            last, x = (x, v), x - 0.5 * v  # of which a preview is made
    del x_1, last


def _with_model(asked: VideoModel | Guided, model: VideoModel) -> VideoModel | Guided:
    return replace(asked, model=model) if isinstance(asked, Guided) else model


def _rows(cond: Condition, count: int) -> Condition:
    """`count` samples with the longest text of `cond`. Its values stay where they are: it has to be
    known which tokens are valid.
    """
    trimmed = {name: x for name, x in cond.trim().tensors().items() if name != "mask"}
    return Condition(**{name: x[:1].expand(count, *x.shape[1:]) for name, x in trimmed.items()})


def block_bytes(model: VideoModel) -> tuple[tuple[int, ...], ...]:
    """Weights of the blocks, of each network."""
    return tuple(tuple(tensor_bytes(tensors_of(b)) for b in blocks) for blocks in blocks_of(model))


def swapped_bytes(blocks: Sequence[Sequence[int]], swap_blocks: int) -> tuple[int, int]:
    """(weights of the swapped blocks, all in main memory; places on the device that they take)."""
    sizes = [sizes[i] for sizes in blocks for i in spread(len(sizes), swap_blocks)]
    return sum(sizes), max(sizes, default=0) * min(SLOTS, len(sizes))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def without_values(module: nn.Module) -> nn.Module:
    """A copy on the meta device; tensors that modules share stay shared."""

    def empty(x: Tensor) -> Tensor:
        like = on_meta(x)
        return nn.Parameter(like, x.requires_grad) if isinstance(x, nn.Parameter) else like

    return copy.deepcopy(module, {id(x): empty(x) for x in tensors_of(module)})


def on_meta(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on `device`; None where nothing tells."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        # What torch keeps for later is free too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and _MEMINFO.is_file():
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            name, _, size = line.partition(":")
            if name == "MemAvailable":
                return int(size.split()[0]) * 1024
    return None


def gigabytes(size: float) -> str:
    """10^9 bytes for people: 31.4 GB, or 12.3 MB of what is small."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

"""Block swapping: frozen weights of some blocks wait in main memory until their block computes.

The swapped blocks are spread evenly over the network and not its last ones, because a transfer can
then hide behind all the blocks that are computed between two swapped ones, and not behind one.
`SLOTS` of them are on the device at a time, in buffers that are made once: the one that computes,
and the one that is needed next and is being copied meanwhile. Main memory keeps its copy of all, so
that giving a slot to another block costs nothing; weights only ever travel to the device.

It needs gradient checkpointing of every block. Autograd keeps a frozen parameter by reference, and
a parameter that has been sent away by the time of the backward pass holds no numbers any more. A
checkpointed block keeps nothing of its forward pass and is called again right before its own
backward pass, which is what brings its weights back; and as blocks go backward one after the other,
they stay until its backward pass is through.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .experts import blocks_of
from .video_model import VideoModel

SLOTS = 2
"""Swapped blocks that are on the device at a time."""
_ALIGNMENT = 256
"""Bytes; what CUDA's own allocator gives and its kernels like."""
_log = logging.getLogger(__name__)


class Transfer:
    """How bytes get from main memory to the device; this one for a device that computes there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def host(self, size: int) -> Tensor:
        """`size` bytes of main memory."""
        return torch.empty(size, dtype=torch.uint8)

    def slot(self, size: int) -> Tensor:
        """`size` bytes on the device."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def start(self, host: Tensor, slot: Tensor) -> Any:
        """Copy once all work that was asked for so far is done; returns what `finish` takes."""
        slot.copy_(host)

    def finish(self, ticket: Any) -> None:
        """Have all work that is asked for from now on wait for that copy."""

    def close(self) -> None:
        """Wait for everything, and give back what `host` took."""


class CudaTransfer(Transfer):
    """Copies beside the computation, from main memory that the driver has pinned."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)
        self._runtime: Any = torch.cuda.cudart()
        self._pinned: list[Tensor] = []

    def host(self, size: int) -> Tensor:
        memory = super().host(size)
        # torch's own pinned memory is rounded up to a power of two, which may double it.
        if int(self._runtime.cudaHostRegister(memory.data_ptr(), size, 0)) == 0:
            self._pinned.append(memory)
            return memory
        _log.warning("%.1f GB of main memory cannot be pinned; swapping is slower", size / 1e9)
        with suppress(RuntimeError):  # the driver would blame the next kernel for its refusal
            torch.zeros(1, device=self.device)
        return memory

    def start(self, host: Tensor, slot: Tensor) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            slot.copy_(host, non_blocking=True)
        return self._stream.record_event()

    def finish(self, ticket: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        for memory in self._pinned:
            self._runtime.cudaHostUnregister(memory.data_ptr())
        self._pinned.clear()


def transfer_to(device: torch.device) -> Transfer:
    """The transfer of a device."""
    return CudaTransfer(device) if device.type == "cuda" else Transfer(device)


def spread(blocks: int, count: int) -> list[int]:
    """Which `count` of `blocks` blocks are swapped: one in the middle of every equal part."""
    return [(2 * i + 1) * blocks // (2 * count) for i in range(count)]


def spread_blocks(model: VideoModel, count: int) -> list[nn.Module]:
    """The `count` blocks of each network that are swapped, in order."""
    places = spread(model.num_parts, count)
    return [blocks[index] for blocks in blocks_of(model) for index in places]


@contextmanager
def swapped_blocks(structures: Sequence[Sequence[nn.Module]], transfer: Transfer) -> Iterator[None]:
    """Inside, the frozen weights of blocks wait in main memory; afterwards all is as it was.

    Args:
        structures: the blocks to swap, in the order in which they compute, of every module
            structure that computes with the same tensors (a LoRA student's and its teacher's).
            What is trained stays on the device.
    """
    swap = _Swap(transfer)
    hooks = []
    try:
        for same in zip(*structures, strict=True):
            swap.park([x for block in same for x in (*block.parameters(), *block.buffers())])
        swap.open()
        for blocks in structures:
            for index, block in enumerate(blocks):
                hook = swap.hook(index)
                hooks.append(block.register_forward_pre_hook(hook, prepend=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        swap.close()


class _Parked:
    """A block's frozen tensors and their copy in main memory, one after the other in one piece."""

    def __init__(self, tensors: Sequence[Tensor], transfer: Transfer) -> None:
        self.tensors = tensors
        self.shapes = [(x.shape, x.dtype, x.device) for x in tensors]
        self.offsets, self.size = [], 0
        for x in tensors:
            self.offsets.append(self.size)
            self.size += -(-x.numel() * x.element_size() // _ALIGNMENT) * _ALIGNMENT
        self.host = transfer.host(self.size)
        for x, copy in zip(tensors, self.views(self.host), strict=True):
            copy.copy_(x.data)
        self.leave()

    def views(self, memory: Tensor) -> Iterator[Tensor]:
        """The tensors as they lie in `memory`, bytes of at least `size`."""
        for offset, (shape, dtype, _) in zip(self.offsets, self.shapes, strict=True):
            size = shape.numel() * dtype.itemsize
            yield memory[offset : offset + size].view(dtype).view(shape)

    def leave(self) -> None:
        """Let go of the device's copy; computing with the tensors now is an error."""
        for x, (_, dtype, device) in zip(self.tensors, self.shapes, strict=True):
            x.data = torch.empty(0, dtype=dtype, device=device)

    def enter(self, slot: Tensor) -> None:
        """Compute with what lies in `slot`."""
        for x, here in zip(self.tensors, self.views(slot), strict=True):
            x.data = here

    def restore(self) -> None:
        """Tensors of their own, as before."""
        views = self.views(self.host)
        for x, copy, (_, _, device) in zip(self.tensors, views, self.shapes, strict=True):
            x.data = copy.to(device, copy=True)


class _Swap:
    """Which blocks are on the device, and which of them was used longest ago."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.blocks: list[_Parked] = []
        self.free: list[Tensor] = []
        self.held: dict[int, tuple[Tensor, Any]] = {}
        """Index of a block -> its slot and its transfer's ticket, the last used one last."""
        self.last = 0

    def park(self, tensors: Sequence[Tensor]) -> None:
        """Take the frozen ones of a block's tensors off the device."""
        frozen = {id(x): x for x in tensors if not x.requires_grad}
        self.blocks.append(_Parked(list(frozen.values()), self.transfer))

    def open(self) -> None:
        size = max(block.size for block in self.blocks)
        self.free = [self.transfer.slot(size) for _ in self.blocks[:SLOTS]]

    def hook(self, index: int) -> Any:
        """A forward pre-hook of block `index`."""
        return lambda _module, _args: self.need(index)

    def need(self, index: int) -> None:
        """Have a block on the device now, and the next one on its way there."""
        if not self.blocks:
            return  # a copy of the structure has outlived the swap
        self.fetch(index)
        slot, ticket = self.held[index]
        self.transfer.finish(ticket)
        self.blocks[index].enter(slot)
        self.fetch(self.next(index))
        self.last = index

    def fetch(self, index: int) -> None:
        """Start a block's transfer, into the slot that was used longest ago."""
        if index in self.held:
            self.held[index] = self.held.pop(index)
            return
        if self.free:
            slot = self.free.pop()
        else:
            oldest = next(iter(self.held))
            slot, _ = self.held.pop(oldest)
            self.blocks[oldest].leave()
        block = self.blocks[index]
        self.held[index] = slot, self.transfer.start(block.host, slot[: block.size])

    def next(self, index: int) -> int:
        """The block that is likely to be needed after block `index`.

        Without gradients it is the next one of this or of another forward pass. With gradients, a
        forward pass rises and is followed by the recomputation of its last block, from where the
        backward pass falls.
        """
        end = len(self.blocks) - 1
        if not torch.is_grad_enabled():
            return 0 if index == end else index + 1
        falls = index == end or (index <= self.last and index > 0)
        return max(0, index - 1) if falls else index + 1

    def close(self) -> None:
        """Put everything back on the device for good."""
        self.transfer.close()
        self.held.clear()
        self.free.clear()
        for block in self.blocks:
            block.restore()
        self.blocks.clear()

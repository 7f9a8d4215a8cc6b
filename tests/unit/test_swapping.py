"""Blocks that wait in main memory: which, in what order they come back, and what is left behind."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from updates import FarAway

from accvideo_core.models.packing import pack_fp8
from accvideo_core.models.swapping import (
    SLOTS,
    CudaTransfer,
    Transfer,
    spread,
    swapped_blocks,
    transfer_to,
)

WIDTH = 8


def layers(count: int = 6) -> list[nn.Linear]:
    made = []
    for seed in range(count):
        layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        layer.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator))
        made.append(layer)
    return made


class Watched(FarAway):
    """Notes which block is fetched, by the place of its copy in main memory."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[int] = []
        self.fetched: list[int] = []
        self.closed = False

    def host(self, size: int) -> Tensor:
        memory = super().host(size)
        self.copies.append(memory.data_ptr())
        return memory

    def start(self, host: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        self.fetched.append(self.copies.index(host.data_ptr()))
        return super().start(host, slot)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("blocks", "count", "chosen"),
    [(60, 0, []), (4, 1, [2]), (4, 2, [1, 3]), (4, 4, [0, 1, 2, 3]), (40, 4, [5, 15, 25, 35])],
)
def test_swapped_blocks_are_spread_evenly(blocks: int, count: int, chosen: list[int]) -> None:
    assert spread(blocks, count) == chosen


def test_every_number_of_blocks_can_be_swapped() -> None:
    for blocks in range(1, 62):
        for count in range(1, blocks + 1):
            chosen = spread(blocks, count)
            assert len(set(chosen)) == count and 0 <= min(chosen) and max(chosen) < blocks


def test_the_next_block_is_on_its_way_while_one_computes() -> None:
    blocks, transfer, x = layers(), Watched(), torch.ones(1, WIDTH)
    rising, falling = [0, 1, 2, 3, 4, 5], [4, 3, 2, 1, 0]
    with swapped_blocks([blocks], transfer):
        for index in rising:
            blocks[index](x)
            # One block ahead, and nothing beyond the end while gradients may fall from there.
            assert transfer.fetched[-1] == min(index + 1, 5)
        assert transfer.fetched == rising
        blocks[5](x)  # recomputed
        for index in falling:
            blocks[index](x)
            assert transfer.fetched[-1] == max(index - 1, 0)
        # Blocks 5 and 4 were still there.
        assert transfer.fetched == rising + [3, 2, 1, 0]
        blocks[0](x)
        assert transfer.fetched == rising + [3, 2, 1, 0]  # and so are 0 and 1
        blocks[1](x)
        assert transfer.fetched[-1] == 2
    assert transfer.closed


def test_without_gradients_a_pass_is_followed_by_another_one() -> None:
    blocks, transfer, x = layers(4), Watched(), torch.ones(1, WIDTH)
    with torch.no_grad(), swapped_blocks([blocks], transfer):
        for _ in range(2):
            for block in blocks:
                block(x)
    assert transfer.fetched == [0, 1, 2, 3, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("order", [[0, 5, 2, 2, 4, 1, 3], [5, 4, 3, 2, 1, 0], [3]])
def test_blocks_compute_the_same_in_any_order(order: list[int]) -> None:
    blocks, x = layers(), torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(9))
    expected = [blocks[i](x) for i in order]
    with swapped_blocks([blocks], FarAway()):
        for index, y in zip(order, expected, strict=True):
            assert torch.equal(blocks[index](x), y)


def test_what_waits_takes_no_memory_of_the_device_and_cannot_be_computed_with() -> None:
    blocks, transfer = layers(), FarAway()
    values = [block.weight.clone() for block in blocks]
    parameters = [id(p) for block in blocks for p in block.parameters()]
    one = sum(p.numel() * 4 for p in blocks[0].parameters())
    with swapped_blocks([blocks], transfer):
        assert sum(p.numel() for block in blocks for p in block.parameters()) == 0
        assert len(transfer.slots) == SLOTS
        assert all(slot.numel() < one + 2 * 256 for slot in transfer.slots)  # two tensors, aligned
        blocks[3](torch.ones(1, WIDTH))
        assert torch.equal(blocks[3].weight, values[3])
        # The next one has not been asked for yet, though it may be on its way.
        with pytest.raises(RuntimeError):
            torch.nn.functional.linear(torch.ones(1, WIDTH), blocks[4].weight)
    assert [id(p) for block in blocks for p in block.parameters()] == parameters
    for block, value in zip(blocks, values, strict=True):
        assert torch.equal(block.weight, value) and not block._forward_pre_hooks
    slots = {slot.untyped_storage().data_ptr() for slot in transfer.slots}
    assert not slots & {b.weight.untyped_storage().data_ptr() for b in blocks}


def test_two_structures_of_the_same_tensors_bring_them_for_each_other() -> None:
    ours, x = layers(), torch.ones(1, WIDTH)
    theirs = layers()
    for a, b in zip(ours, theirs, strict=True):
        b.weight, b.bias = a.weight, a.bias
    expected = [block(x) for block in ours]
    with swapped_blocks([ours, theirs], FarAway()):
        for index, y in enumerate(expected):
            assert torch.equal(ours[index](x), y)
            assert torch.equal(theirs[5 - index](x), expected[5 - index])


def test_packed_weights_travel_with_their_scales_and_trained_ones_stay() -> None:
    weights = [layer.weight.data for layer in layers()]
    blocks = [nn.Sequential(pack_fp8(w), nn.Linear(WIDTH, 2).bfloat16()) for w in weights]
    for block in blocks:
        block[1].weight.requires_grad_(False)
    x = torch.ones(1, WIDTH)
    expected = [block[0](x) for block in blocks]
    biases = [block[1].bias.data_ptr() for block in blocks]
    with swapped_blocks([blocks], FarAway()):
        assert all(block[0].scale.numel() == block[1].weight.numel() == 0 for block in blocks)
        assert [block[1].bias.data_ptr() for block in blocks] == biases
        for block, y in zip(blocks, expected, strict=True):
            block._forward_pre_hooks[next(iter(block._forward_pre_hooks))](block, ())
            assert torch.equal(block[0](x), y)
            assert block[1].weight.dtype == torch.bfloat16 and block[1].weight.shape == (2, WIDTH)
    assert all(block[0].scale.dtype == torch.float32 for block in blocks)


def test_a_copy_made_meanwhile_computes_afterwards() -> None:
    from accvideo_core.models.lora import shared_copy

    blocks, x = nn.ModuleList(layers()), torch.ones(1, WIDTH)
    expected = blocks[2](x)
    with swapped_blocks([list(blocks)], FarAway()):
        copied = shared_copy(blocks)
    assert torch.equal(copied[2](x), expected)


def test_a_failure_to_park_leaves_everything_as_it_was() -> None:
    class Full(FarAway):
        def host(self, size: int) -> Tensor:
            if self.started == 3:
                raise MemoryError
            self.started += 1
            return super().host(size)

    blocks = layers()
    values = [block.weight.clone() for block in blocks]
    with pytest.raises(MemoryError), swapped_blocks([blocks], Full()):
        pass
    assert all(torch.equal(b.weight, v) for b, v in zip(blocks, values, strict=True))


def test_the_cpu_computes_where_its_weights_wait() -> None:
    transfer = transfer_to(torch.device("cpu"))
    assert type(transfer) is Transfer
    host, slot = transfer.host(4), transfer.slot(4)
    host.fill_(7)
    transfer.finish(transfer.start(host, slot))
    assert torch.equal(slot, host)


class FakeCuda:
    """CUDA's calls on a machine without it, noted in order; pinning works as often as said."""

    def __init__(self, pins: int) -> None:
        self.pins, self.calls = pins, []

    def note(self, call: str, result: object = None) -> Any:
        def noted(*args: object, **_options: object) -> object:
            self.calls.append(" ".join([call, *(x for x in args if isinstance(x, str))]))
            return result

        return noted

    def register(self, _address: int, size: int, flags: int) -> int:
        assert size > 0 and flags == 0
        self.pins -= 1
        return 0 if self.pins >= 0 else 2

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        side = SimpleNamespace(
            wait_stream=self.note("side waits for"), record_event=self.note("record", "copied")
        )
        main = SimpleNamespace(wait_event=self.note("main waits for"))
        runtime = SimpleNamespace(
            cudaHostRegister=self.register, cudaHostUnregister=self.note("unpin")
        )
        monkeypatch.setattr(torch.cuda, "Stream", lambda _device: side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: main)
        monkeypatch.setattr(torch.cuda, "stream", self.note("on side", nullcontext()))
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
        monkeypatch.setattr(torch.cuda, "synchronize", self.note("synchronize"))


def test_cuda_copies_after_what_was_asked_for_and_before_what_will_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The order of the calls; that they overlap is for a GPU to show."""
    cuda = FakeCuda(pins=1)
    cuda.install(monkeypatch)
    transfer = CudaTransfer(torch.device("cpu"))
    host, slot = transfer.host(10**6), transfer.slot(4)
    assert not caplog.text
    unpinned = transfer.host(4)
    assert "cannot be pinned; swapping is slower" in caplog.text and unpinned.numel() == 4
    unpinned.fill_(3)
    transfer.finish(transfer.start(unpinned, slot))
    assert torch.equal(slot, unpinned) and host.numel() == 10**6
    transfer.close()
    order = ["side waits for", "on side", "record", "main waits for copied", "synchronize", "unpin"]
    assert cuda.calls == order

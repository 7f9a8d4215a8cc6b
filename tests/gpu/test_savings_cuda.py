"""What saves memory, on a card: the same gradients, and less memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import updates
from simple_network import simple_case
from tiny_families import Case, case
from updates import ALL, CHECKPOINTING, RECIPE

from accvideo_core.distill import memory
from accvideo_core.distill.batch import KeyBatch
from accvideo_core.distill.memory import savings
from accvideo_core.models.packing import pack_weights
from accvideo_core.models.swapping import SLOTS, transfer_to

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_device(made: Case) -> tuple[Case, KeyBatch]:
    made.model.module.to(DEVICE)
    moved = replace(made, condition=made.condition.to(DEVICE))
    batch = updates.batch_of(moved)
    tensors = {name: getattr(batch, name).to(DEVICE) for name in ("latents", "z", "u")}
    return moved, replace(batch, **tensors)


@pytest.mark.parametrize("weights", [None, "fp8", "nf4"])
def test_gradients_are_those_of_separate_copies(
    weights: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if weights == "nf4":
        pytest.importorskip("bitsandbytes", reason="NF4 weights need bitsandbytes")
    monkeypatch.setattr(memory, "OFFLOADED_BYTES", 0)
    made, batch = on_device(case("hunyuan_video"))
    model = made.model if weights is None else pack_weights(made.model, weights)
    assert model.device.type == DEVICE.type
    expected = updates.reference(model, batch)
    for _ in range(3):  # transfers that are not waited for show now and then
        found = updates.saving(model, batch, ALL, transfer_to(DEVICE))
        assert updates.difference(found, expected) < 1e-4


def test_swapped_blocks_take_the_memory_of_two() -> None:
    made, batch = on_device(simple_case(width=1024, blocks=10))
    block = sum(4 * p.numel() for p in made.model.module.get_submodule("blocks.0").parameters())

    def peak(options: dict[str, Any]) -> int:
        student = updates.student_of(made.model)
        with savings(student, replace(RECIPE, **options)) as frozen:
            update = updates.Update(student, frozen, batch)
            torch.cuda.reset_peak_memory_stats(DEVICE)
            update.backward()
            return torch.cuda.max_memory_allocated(DEVICE)

    saved = peak(CHECKPOINTING) - peak({**CHECKPOINTING, "swap_blocks": 10})
    assert saved == pytest.approx((10 - SLOTS) * block, rel=0.1)

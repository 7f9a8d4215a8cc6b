"""Who computes what among several processes, and what they refuse before the first update."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_cogvideox
from torch.distributed import HashStore

from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.sharding import check_ranks
from accvideo_core.distill.student import LoraSpec, StudentInfo
from accvideo_core.errors import AccVideoError
from accvideo_core.models import FAMILIES, VideoModel
from accvideo_core.ranks import ALONE, ManyRanks, Ranks, joined

RECIPE = Recipe(student_steps=2, batch_size=8)
SHAPE = (4, 2, 4, 4)


def info(model: VideoModel, lora: LoraSpec | None = RECIPE.lora) -> StudentInfo:
    return StudentInfo(
        model.family.name, "", (1.0, 0.5, 0.0), None, lora, model.latent_spec, 5, 16, 16
    )


@pytest.mark.parametrize("sequence", [1, 2, 4])
def test_the_parts_of_all_processes_are_the_batch(sequence: int) -> None:
    ranks = [ManyRanks(rank, 8, sequence) for rank in range(8)]
    rows = [list(range(16))[one.rows(16)] for one in ranks]
    assert sum(rows[::sequence], []) == list(range(16))
    for group in range(0, 8, sequence):
        assert all(part == rows[group] for part in rows[group : group + sequence])
    assert [one.first for one in ranks] == [True] + [False] * 7


def test_a_part_is_never_larger_than_in_one_process() -> None:
    for batch, accumulate in ((32, 1), (32, 4), (24, 6), (24, 3), (12, 12)):
        assert ALONE.parts(batch, accumulate) == accumulate
        for size in (2, 3, 4):
            ranks = Ranks(0, size)
            if batch % size:
                continue
            mine = batch // size
            parts = ranks.parts(batch, accumulate)
            assert mine % parts == 0 and mine // parts <= batch // accumulate
            fewer = [n for n in range(1, parts) if mine % n == 0]
            assert all(mine // n > batch // accumulate for n in fewer)


def refusal(ranks: Ranks, model: VideoModel, shape: Any = SHAPE, **changes: Any) -> str:
    recipe = replace(RECIPE, **changes)
    with pytest.raises(AccVideoError) as caught:
        check_ranks(ranks, recipe, info(model, recipe.lora), model, shape)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_several_processes_cannot_train_is_refused() -> None:
    model = tiny.video_model()
    two = ManyRanks(0, 2)
    check_ranks(two, RECIPE, info(model), model, SHAPE)
    check_ranks(ALONE, replace(RECIPE, batch_size=7), info(model), model, SHAPE)
    text = refusal(two, model, batch_size=7)
    assert "batch_size is 7" in text and "multiple of 2" in text
    check_ranks(ManyRanks(0, 2, 2), replace(RECIPE, batch_size=7), info(model), model, SHAPE)
    text = refusal(two, model, swap_blocks=1, gradient_checkpointing=True)
    assert "swap_blocks is 1" in text and "set it to 0" in text
    text = refusal(two, model, lora=None, optimizer="adafactor")
    assert "'adafactor'" in text and "adamw" in text


def test_tokens_that_cannot_be_divided_are_refused() -> None:
    model = tiny.video_model()  # 2 heads, 2 x 2 x 2 tokens
    recipe = replace(RECIPE, batch_size=4)
    check_ranks(ManyRanks(0, 2, 2), recipe, info(model), model, SHAPE)
    text = refusal(ManyRanks(0, 4, 4), model)
    assert "2 attention heads" in text and "--sequence-parallel 1 or 2" in text
    text = refusal(ManyRanks(0, 2, 2), model, (4, 3, 2, 2))
    assert "3 tokens" in text and text.endswith("--sequence-parallel 1")
    text = refusal(ManyRanks(0, 2, 2), tiny_cogvideox.video_model("cogvideox_5b"))
    assert "CogVideoX 5B" in text and "leave --sequence-parallel out" in text


def test_families_with_a_plan_are_those_of_diffusers_and_hunyuan_video() -> None:
    without = {name for name, family in FAMILIES.items() if family.sequence is None}
    assert without == {*tiny_cogvideox.KINDS, "svd"}


def launched(monkeypatch: pytest.MonkeyPatch, size: int, local_rank: int = 0) -> None:
    """As torchrun starts process 0 of `size`, without the others."""
    store = HashStore()
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    monkeypatch.setattr("torch.distributed.get_node_local_rank", lambda: local_rank)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    meeting = "torch.distributed.rendezvous"
    monkeypatch.setattr(meeting, lambda _address: iter([(store, 0, size)]))


def test_joining_needs_processes_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined() as ranks:
        assert ranks is ALONE
    with pytest.raises(AccVideoError, match="does not divide the 1 processes"), joined(2):
        pass
    launched(monkeypatch, 6)
    with pytest.raises(AccVideoError, match="sequence-parallel is 4"), joined(4):
        pass
    launched(monkeypatch, 6)
    with pytest.raises(AccVideoError, match="device is cuda:1"), joined(2, "cuda:1"):
        pass


def test_only_the_first_of_the_processes_that_fail_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched(monkeypatch, 6)  # the store is the same for both of its processes
    with pytest.raises(AccVideoError, match="sequence-parallel is 4"), joined(4):
        pass
    with pytest.raises(SystemExit) as later, joined(4):
        pass
    assert later.value.code == 2


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, 16, local_rank=4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(AccVideoError, match="machine's 4 GPUs; give --nproc-per-node 4"):
        with joined():
            pass

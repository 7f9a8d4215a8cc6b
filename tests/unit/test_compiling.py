"""Compiled blocks when sampling: the same answers, few compilations, nothing left behind."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny_families
import torch
from simple_network import simple_case
from torch import Tensor, nn

from accvideo_core.conditioning import Condition
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.errors import AccVideoError
from accvideo_core.flow import time_grid
from accvideo_core.models import VideoModel
from accvideo_core.models.compiling import check_compiler, compiled_blocks
from accvideo_core.models.fp8 import fp8_products
from accvideo_core.models.packing import pack_weights
from accvideo_core.models.swapping import spread_blocks, swapped_blocks
from accvideo_core.sampling import sample
from tests import updates

TIMES = time_grid(2, 3.0)


class Counting:
    """torch.compile's eager backend: traces, guards and recompiles as any, and makes no code."""

    def __init__(self) -> None:
        self.compiled = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def kinds(model: VideoModel) -> int:
    """Of blocks, by class."""
    return len({type(block) for block in model.family.blocks(model.expert(1.0))})


def sampled(model: Any, cond: Condition, x: Tensor) -> Tensor:
    return sample(model, cond, x, TIMES)


def structure(module: nn.Module) -> list[Any]:
    return [(name, type(x), sorted(vars(x))) for name, x in module.named_modules()]


@pytest.mark.parametrize("name", ["hunyuan_video", "wan22_t2v", "cogvideox_5b"])
def test_every_kind_of_block_is_compiled_once(name: str):
    case, backend = tiny_families.case(name), Counting()
    one, x = case.condition.select(0), case.x[:1]
    expected, before = sampled(case.model, one, x), structure(case.model.module)
    with compiled_blocks(case.model, backend, training=False):
        found = sampled(case.model, one, x)
    assert torch.allclose(found, expected, atol=1e-5)
    assert backend.compiled == kinds(case.model)
    assert backend.runs == (len(TIMES) - 1) * case.model.num_blocks
    assert structure(case.model.module) == before


def test_other_batches_texts_and_videos_are_compiled_once_more():
    case, backend = tiny_families.case("cogvideox_5b"), Counting()
    asked = []
    for batch, length, frames in ((2, 50, 1), (3, 40, 2), (4, 30, 3)):
        rows = [i % 2 for i in range(batch)]
        some = case.condition.select(rows)
        x = case.x[rows].repeat(1, 1, frames, 1, 1)
        asked.append((replace(some, text=some.text[:, :length]), x))
    expected = [sampled(case.model, c, x) for c, x in asked]
    for _ in range(2):  # what is compiled is kept for another time
        with compiled_blocks(case.model, backend, training=False):
            found = [sampled(case.model, c, x) for c, x in asked]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
        # Once for the first sizes and once for all others, of every kind of block.
        assert backend.compiled == 2 * kinds(case.model)


def student_of(model: VideoModel) -> Student:
    info = StudentInfo(
        family=model.family.name,
        base=model.fingerprint,
        key_times=TIMES,
        guidance=None,
        lora=LoraSpec(rank=2, targets=("first", "second")),
        latent_spec=model.latent_spec,
        frames=5,
        height=16,
        width=16,
    )
    student = Student.create(model, info)
    with torch.no_grad():
        for p in student.trainable().values():
            p.add_(0.1)
    return student


def test_a_student_runs_compiled_beside_its_teacher():
    case, backend = simple_case(), Counting()
    student = student_of(case.model)
    expected = [sampled(m, case.condition, case.x) for m in (case.model, student)]
    with compiled_blocks(student.model, backend, training=False):
        found = [sampled(m, case.condition, case.x) for m in (case.model, student)]
        assert backend.runs == (len(TIMES) - 1) * 4  # of the student's blocks alone
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(*found) and backend.compiled == 1


def test_fp8_weights_are_compiled_with_their_block():
    case, backend = simple_case("fp8"), Counting()
    expected = sampled(case.model, case.condition, case.x)
    with compiled_blocks(case.model, backend, training=False):
        found = sampled(case.model, case.condition, case.x)
    assert torch.equal(found, expected)
    assert backend.compiled == 1  # in one piece: each break would be a graph more


def test_fp8_products_are_compiled_with_their_block():
    case, backend = tiny_families.case("cogvideox_5b"), Counting()
    model = pack_weights(case.model, "fp8")
    with fp8_products(model):
        expected = sampled(model, case.condition, case.x)
        with compiled_blocks(model, backend, training=False):
            found = sampled(model, case.condition, case.x)
    assert torch.equal(found, expected)
    assert backend.compiled == 1  # and not once for each of many layers


def test_swapped_blocks_run_compiled():
    case, backend, transfer = simple_case(), Counting(), updates.FarAway()
    expected = sampled(case.model, case.condition, case.x)
    with (
        compiled_blocks(case.model, backend, training=False),
        swapped_blocks([spread_blocks(case.model, 3)], transfer),
    ):
        found = sampled(case.model, case.condition, case.x)
    assert torch.equal(found, expected)
    assert backend.compiled == 1 and transfer.started > 3


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    check_compiler(torch.device("cpu"), "compile")  # which needs no Triton
    with pytest.raises(AccVideoError, match="compile needs Triton.*or leave compile out"):
        check_compiler(torch.device("cuda"), "compile")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(AccVideoError, match=r"needs a C\+\+ compiler.*or leave compile out"):
        check_compiler(torch.device("cpu"), "compile")
    check_compiler(torch.device("cpu"), "compile", "eager")

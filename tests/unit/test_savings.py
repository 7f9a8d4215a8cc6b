"""Saving memory changes no gradient, keeps one copy of the weights, and leaves no trace."""

from __future__ import annotations

import gc
import importlib.util
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import analytic
import pytest
import tiny_families
import torch
import updates
from simple_network import simple_case
from torch import Tensor, nn
from updates import ALL, CHECKPOINTING, RECIPE, FarAway

from accvideo_core.distill import memory
from accvideo_core.distill.memory import check_savings, savings
from accvideo_core.errors import AccVideoError
from accvideo_core.models import VideoModel, swapping
from accvideo_core.models.packing import pack_weights

OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "checkpointing": CHECKPOINTING,
    "swapping": {**CHECKPOINTING, "swap_blocks": 3},
    "offload": {"offload_activations": True},
    "offload and checkpointing": {**CHECKPOINTING, "offload_activations": True},
    "all but compile": ALL,
}


@pytest.fixture(autouse=True)
def offload_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in these networks is large."""
    monkeypatch.setattr(memory, "OFFLOADED_BYTES", 0)


@dataclass
class Kept:
    """What autograd keeps of a pass, on its device and away from it."""

    here: list[Tensor]
    away: list[Any]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    found = Kept([], [])
    pack = memory._Offload.pack

    def watched(self: memory._Offload, x: Tensor) -> Any:
        result = pack(self, x)
        (found.here if isinstance(result, Tensor) else found.away).append(result)
        return result

    monkeypatch.setattr(memory._Offload, "pack", watched)
    yield found


def case_of(family: str, weights: str | None = None) -> tiny_families.Case:
    if weights == "nf4":
        pytest.importorskip("bitsandbytes", reason="NF4 weights need bitsandbytes")
    case = tiny_families.case(family)
    return case if weights is None else replace(case, model=pack_weights(case.model, weights))


@cache
def expected(family: str, weights: str | None = None) -> updates.Gradients:
    case = case_of(family, weights)
    return updates.reference(case.model, updates.batch_of(case))


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        *((None, name) for name in OPTIONS),
        *((weights, name) for weights in ("fp8", "nf4") for name in ("nothing", "all but compile")),
    ],
)
def test_gradients_of_every_role_are_those_of_separate_copies(
    weights: str | None, options: str, kept: Kept
) -> None:
    case, transfer = case_of("hunyuan_video", weights), FarAway()
    found = updates.saving(case.model, updates.batch_of(case), OPTIONS[options], transfer)
    assert updates.difference(found, expected("hunyuan_video", weights)) < 1e-5
    assert bool(kept.away) == ("offload_activations" in OPTIONS[options])
    # 3 of 4 blocks take turns in 2 slots, so every pass forth and back moves some.
    assert (transfer.started > 10) == ("swap_blocks" in OPTIONS[options])


@pytest.mark.parametrize("family", ["wan22_t2v", "wan_i2v", "cogvideox_5b"])
def test_gradients_are_the_same_for_every_kind_of_network(family: str) -> None:
    """Two experts, image tokens, and blocks of other signatures."""
    case, transfer = case_of(family), FarAway()
    found = updates.saving(case.model, updates.batch_of(case), ALL, transfer)
    assert updates.difference(found, expected(family)) < 1e-5 and transfer.started > 10


class Counting:
    """A backend of torch.compile that counts how often what it compiled has run."""

    def __init__(self, name: str) -> None:
        self.name, self.runs = name, 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Any:
        compiled = torch._dynamo.lookup_backend(self.name)(graph, inputs)

        def run(*args: Any) -> Any:
            self.runs += 1
            return compiled(*args)

        return run


AOT, EAGER = Counting("aot_eager"), Counting("eager")
"""Backends that compile no machine code: with autograd's graphs, and without, which is faster."""


@pytest.mark.parametrize(
    ("weights", "options", "backend"),
    [(None, {}, AOT), (None, ALL, AOT), ("fp8", ALL, EAGER)],
    ids=["alone", "with everything", "with everything on fp8"],
)
def test_gradients_are_the_same_compiled(
    weights: str | None, options: dict[str, Any], backend: Counting
) -> None:
    case = simple_case(weights)
    batch, transfer, before = updates.batch_of(case), FarAway(), backend.runs
    reference = updates.reference(case.model, batch)
    assert backend.runs == before
    options = {**options, "compile": True}
    found = updates.saving(case.model, batch, options, transfer, backend=backend)
    assert updates.difference(found, reference) < 1e-5
    # Three passes of the student and two of the teacher at every key time, of four blocks each.
    assert backend.runs >= before + 2 * (3 + 2) * 4
    assert ("swap_blocks" in options) == (transfer.started > 10)


@pytest.mark.parametrize("weights", [None, "fp8", "nf4"])
def test_a_block_may_end_in_a_layer_that_needs_nothing_but_its_weight(weights: str | None) -> None:
    """Its backward pass comes before anything that makes a checkpointed block come back."""
    if weights == "nf4":
        pytest.importorskip("bitsandbytes", reason="NF4 weights need bitsandbytes")
    case = simple_case(weights)
    batch, transfer = updates.batch_of(case), FarAway()
    found = updates.saving(case.model, batch, ALL, transfer)
    assert updates.difference(found, updates.reference(case.model, batch)) < 1e-5
    assert transfer.started > 10


@pytest.mark.parametrize(
    "options",
    [{}, CHECKPOINTING, {"offload_activations": True}, {**CHECKPOINTING, "compile": True}],
    ids=str,
)
def test_full_fine_tuning_has_the_same_gradients(options: dict[str, Any]) -> None:
    case = simple_case()
    batch, transfer = updates.batch_of(case), FarAway()
    reference = updates.reference(case.model, batch, None)
    assert any("tail" in name for name in reference)
    found = updates.saving(case.model, batch, options, transfer, lora=None, backend=AOT)
    assert updates.difference(found, reference) < 1e-5


def storages(*roots: object) -> dict[int, int]:
    """Address -> bytes of every piece of memory that tensors reachable from `roots` lie in."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        x = waiting.pop()
        if id(x) in seen or isinstance(x, type | types.ModuleType | types.FrameType):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            waiting.append(x.grad)
        elif isinstance(x, types.FunctionType):
            waiting += [cell.cell_contents for cell in x.__closure__ or ()]
        else:
            waiting += gc.get_referents(x)
    return found


@pytest.mark.parametrize(
    ("weights", "options"),
    [(None, "nothing"), *((weights, "all but compile") for weights in (None, "fp8", "nf4"))],
)
def test_a_run_holds_the_base_weights_once(
    weights: str | None, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swapping, "_ALIGNMENT", 16)  # more would be much for such small tensors
    case = case_of("hunyuan_video")
    case.model.module.to(torch.bfloat16)
    plain = sum(storages(case.model.module).values())
    teacher = case.model if weights is None else pack_weights(case.model, weights)
    base = sum(storages(teacher.module).values())
    share = {None: 1.0, "fp8": 0.75, "nf4": 0.6}  # embeddings are much of so small a network
    assert base <= share[weights] * plain

    student, transfer = updates.student_of(teacher), FarAway()
    with savings(student, replace(RECIPE, **OPTIONS[options]), transfer) as frozen:
        update = updates.Update(student, frozen, updates.batch_of(case))
        update.backward()
        for role in update.roles.values():
            role.step(1.0)
        held = sum(storages(teacher, student, frozen, update.game, update.roles).values())
    trained = [p for role in update.roles.values() for p in role.parameters.values()]
    bytes_each = 4 + 8  # AdamW's moments
    more = sum(bytes_each * p.numel() + 4 for p in trained)
    statistics = sum(x.numel() * 4 for x in update.game.heads.buffers())
    slots = sum(slot.numel() for slot in transfer.slots)
    assert base < held <= 1.05 * base + more + statistics + slots


def snapshot(module: nn.Module) -> list[Any]:
    """What a module's structure consists of, and whose tensors it has."""
    return [
        (
            name,
            type(x),
            {key: value for key, value in vars(x).items() if not key.startswith("_")},
            len(x._forward_pre_hooks) + len(x._forward_hooks),
            {n: id(p) for n, p in (*x._parameters.items(), *x._buffers.items())},
        )
        for name, x in module.named_modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_teacher_and_student_are_as_before_when_it_is_over(fails: bool) -> None:
    case = simple_case("fp8")
    teacher, batch = case.model, updates.batch_of(case)
    student = updates.student_of(teacher)
    before = snapshot(teacher.module), snapshot(student.model.module)
    values = {n: x.clone() for n, x in student.model.module.state_dict().items()}
    velocity = teacher.velocity(case.x, 0.5, case.condition)
    recipe = replace(RECIPE, **ALL, compile=True)
    try:
        with savings(student, recipe, FarAway(), EAGER) as frozen:
            assert snapshot(student.model.module) != before[1]
            updates.Update(student, frozen, batch).backward()
            # Whoever has the teacher may ask it meanwhile.
            assert torch.equal(teacher.velocity(case.x, 0.5, case.condition), velocity)
            assert frozen.module is not teacher.module
            assert frozen.fingerprint == teacher.fingerprint
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert (snapshot(teacher.module), snapshot(student.model.module)) == before
    for name, x in student.model.module.state_dict().items():
        assert torch.equal(x, values[name]), name
    assert torch.equal(teacher.velocity(case.x, 0.5, case.condition), velocity)


def test_what_is_offloaded_are_large_activations_once_and_never_weights(kept: Kept) -> None:
    case = simple_case()
    student = updates.student_of(case.model)
    weights = {x.data_ptr() for x in student.model.module.parameters()}
    least = 4 * case.x[:, 0].numel() * 16  # one activation of width 16
    with memory.offloaded_activations(student.model, least):
        student.velocity(case.x, 0.5, case.condition)
    small = [x for x in kept.here if x.untyped_storage().data_ptr() not in weights]
    assert kept.away and small and len(kept.here) > len(small)
    assert all(x.untyped_storage().nbytes() < least for x in small)
    assert all(4 * x.away.copy.numel() >= least for x in kept.away)
    # A linear layer keeps its input, and what made it its output.
    assert len({id(x.away) for x in kept.away}) < len(kept.away)


def test_with_checkpointing_only_inputs_of_blocks_are_offloaded(kept: Kept) -> None:
    case = simple_case()
    student = updates.student_of(case.model)
    with (
        memory.checkpointed(student.model),
        memory.offloaded_activations(student.model, 4 * case.x[:, 0].numel() * 16),
    ):
        student.velocity(case.x, 0.5, case.condition)
    shape = (*case.x.movedim(1, -1).shape[:-1], 16)
    # Four blocks' inputs, and what the layer behind them needs.
    assert [x.shape for x in kept.away] in ([shape] * 4, [shape] * 5)


def test_an_offloaded_tensor_comes_back_as_it_was() -> None:
    offload = memory._Offload(nn.Identity(), least=1)
    x = torch.randn(4, 6).t()[1:4]
    expanded = torch.randn(1, 3).expand(50, 3)
    assert offload.pack(expanded) is expanded
    kept = offload.pack(x)
    assert offload.pack(x).away is kept.away and offload.pack(x[:2]).away is not kept.away
    before = x.clone()
    x.add_(1)
    assert offload.pack(x).away is not kept.away
    back = offload.unpack(kept)
    assert torch.equal(back, before) and back.stride() == x.stride()
    y = torch.randn(2, 3, 4)
    assert offload.pack(y).away is offload.pack(y.view(6, 4)).away
    assert torch.equal(offload.unpack(offload.pack(y)), y)


def test_what_an_option_needs_is_said_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = simple_case().model
    with pytest.raises(AccVideoError, match="swap_blocks is 5, but the network has 4 blocks"):
        check_savings(replace(RECIPE, **{**ALL, "swap_blocks": 5}), model)
    gaussian = analytic.gaussian_model()
    with pytest.raises(AccVideoError, match="GaussianFlow cannot recompute activations; set"):
        check_savings(replace(RECIPE, gradient_checkpointing=True), gaussian)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(AccVideoError, match="adamw_8bit needs bitsandbytes .* pip install"):
        check_savings(replace(RECIPE, optimizer="adamw_8bit"), model)
    monkeypatch.setattr(VideoModel, "device", torch.device("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    check_savings(RECIPE, model)
    with pytest.raises(AccVideoError, match="compile needs Triton, which is not installed"):
        check_savings(replace(RECIPE, compile=True), model)

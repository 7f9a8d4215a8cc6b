"""CUDA graphs, as far as a CPU can show: what is captured, replayed, copied, and given back.

In the graph's stead stands a tape: it writes down the operations of one pass on the very tensors
that they read, and does them again without asking the network's code, as a CUDA graph does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_families
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from accvideo_core.conditioning import Condition
from accvideo_core.errors import AccVideoError
from accvideo_core.flow import time_grid
from accvideo_core.guidance import Cfg, Guided
from accvideo_core.models import steady
from accvideo_core.models.attention import attention
from accvideo_core.models.cuda_graphs import graphed
from accvideo_core.models.swapping import spread_blocks, swapped_blocks
from accvideo_core.sampling import sample
from tests.updates import FarAway

TIMES = time_grid(3, 2.0)


class Tape(TorchDispatchMode):
    """The operations that were done inside."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.done.append((func, args, kwargs, result))
        return result

    def play(self, wanted: Any) -> Any:
        """`wanted`, which came of the operations, from what the tensors that they read hold now."""
        made: dict[int, Tensor] = {}

        def anew(x: Any) -> Any:
            return made.get(id(x), x)

        for func, args, kwargs, result in self.done:
            again = func(*tree_map(anew, args), **tree_map(anew, kwargs))
            for x, y in zip(tree_leaves(result), tree_leaves(again), strict=True):
                made[id(x)] = y
        return tree_map(anew, wanted)


class Recorder:
    """Captures and replays tapes, and counts both."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures = self.replays = 0
        self._capturing = False
        monkeypatch.setattr(steady, "_capturing", lambda: self._capturing)

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.captures += 1
        work()  # warm up
        self._capturing = True
        with Tape() as tape:
            made = work()
        self._capturing = False
        result = tree_map(torch.clone, made)

        def replay() -> None:
            self.replays += 1
            tree_map(lambda own, x: own.copy_(x), result, tape.play(made))

        return result, replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def other(cond: Condition) -> Condition:
    """Another prompt of the same length."""
    tensors = {n: x if x.dtype == torch.bool else x.flip(-1) for n, x in cond.tensors().items()}
    return Condition(**tensors)


@pytest.mark.parametrize("name", ["hunyuan_video", "wan_i2v", "cogvideox_2b", "cogvideox_5b"])
def test_every_step_and_every_prompt_of_a_size_is_a_replay(name: str, recorder: Recorder):
    case = tiny_families.case(name)
    conds = (case.condition, other(case.condition), case.condition)
    expected = [sample(case.model, cond, case.x, TIMES) for cond in conds]
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    with graphed(case.model, recorder) as model:
        found = [sample(model, cond, case.x, TIMES) for cond in conds]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert (recorder.captures, recorder.replays) == (1, 9)
    assert "forward" not in vars(case.model.module)
    sample(case.model, case.condition, case.x, TIMES)
    assert recorder.replays == 9


def test_each_expert_and_each_size_is_captured_once(recorder: Recorder):
    case = tiny_families.case("wan22_t2v")
    with graphed(case.model, recorder):
        for _ in range(2):
            sample(case.model, case.condition, case.x, (1.0, 0.9, 0.4, 0.0))
            assert recorder.captures == 2
        sample(case.model, case.condition, case.x[:, :, :1], (1.0, 0.9))
        assert recorder.captures == 3
        sample(case.model, case.condition.select(0), case.x[:1], (1.0, 0.9))
        assert recorder.captures == 4


def test_both_halves_of_guidance_are_one_graph(recorder: Recorder):
    case = tiny_families.case("cogvideox_5b")
    negative = replace(case.condition.select(0), text=-case.condition.select(0).text)
    asked = Guided(case.model, negative, Cfg(3.0))
    expected = sample(asked, case.condition, case.x, TIMES)
    with graphed(case.model, recorder):
        found = sample(asked, case.condition, case.x, TIMES)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (recorder.captures, recorder.replays) == (1, 6)


def test_lengths_that_a_kernel_is_told_are_captured_each(recorder: Recorder):
    """Of texts in one batch, which attention reads on the host."""
    case = tiny_families.case("hunyuan_video")
    conds = []
    for lengths in ((5, 3), (2, 5), (5, 3)):
        mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
        conds.append(replace(case.condition, mask=mask))
    expected = [sample(case.model, cond, case.x, TIMES) for cond in conds]
    with attention(case.model, "sdpa"), graphed(case.model, recorder):
        found = [sample(case.model, cond, case.x, TIMES) for cond in conds]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert (recorder.captures, recorder.replays) == (2, 9)


def test_answers_are_not_overwritten_by_later_ones(recorder: Recorder):
    case = tiny_families.case("wan_t2v")
    ready = case.model.prepared(case.condition)
    with graphed(case.model, recorder), torch.no_grad():
        first = case.model.answer(case.x, 0.9, ready)
        kept = first.clone()
        case.model.answer(case.x, 0.1, ready)
    assert torch.equal(first, kept)


def test_gradients_and_features_are_computed_as_ever(recorder: Recorder):
    case = tiny_families.case("hunyuan_video")
    x = case.x.clone().requires_grad_(True)
    expected = case.model.features(case.x, 0.5, case.condition, [1, 3])
    with graphed(case.model, recorder):
        case.model.velocity(x, 0.5, case.condition).sum().backward()
        with torch.no_grad():
            found = case.model.features(case.x, 0.5, case.condition, [1, 3])
    assert x.grad is not None and recorder.captures == 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_cannot_be_captured_is_refused(recorder: Recorder):
    case = tiny_families.case("wan_t2v")
    with pytest.raises(AccVideoError, match="need an NVIDIA GPU, and the model is on cpu"):
        with graphed(case.model):
            pass
    structures = [spread_blocks(case.model, 2)]
    with swapped_blocks(structures, FarAway()), pytest.raises(AccVideoError, match="swap_blocks"):
        with graphed(case.model, recorder):
            pass
    # Swapped later, blocks compute as ever.
    expected = sample(case.model, case.condition, case.x, TIMES)
    with graphed(case.model, recorder), swapped_blocks(structures, FarAway()):
        assert torch.equal(sample(case.model, case.condition, case.x, TIMES), expected)
    assert recorder.captures == 0

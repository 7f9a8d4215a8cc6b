"""What does not change between steps is computed once, and the result is the same to the bit."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import tiny_families
import torch
from torch import Tensor, nn

from accvideo_core.conditioning import Condition
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.flow import time_grid
from accvideo_core.guidance import Cfg, Guided
from accvideo_core.models import FAMILIES
from accvideo_core.models import steady as steady_module
from accvideo_core.models.experts import networks_of
from accvideo_core.models.steady import RESULTS, steady
from accvideo_core.models.video_model import VideoModel
from accvideo_core.sampling import sample

TIMES = time_grid(4, 3.0)


@contextmanager
def counted(model: VideoModel) -> Iterator[Counter[str]]:
    """How often each callable that a family calls steady really computes."""
    calls: Counter[str] = Counter()
    changed: list[tuple[Any, str, Any]] = []
    for network in networks_of(model.module).values():
        for path in (*model.family.tables, *model.family.texts):
            place, _, name = path.rpartition(".")
            owner: Any = network.get_submodule(place)
            found = getattr(owner, name)
            if found is None:
                continue
            owner, name = (found, "forward") if isinstance(found, nn.Module) else (owner, name)
            plain = getattr(owner, name)

            def counting(*args: Any, plain: Callable = plain, path: str = path, **kwargs: Any):
                calls[path] += 1
                return plain(*args, **kwargs)

            setattr(owner, name, counting)
            changed.append((owner, name, plain))
    try:
        yield calls
    finally:
        for owner, name, _ in changed:
            delattr(owner, name)


def by_steps(model: VideoModel, cond: Condition, x: Tensor) -> Tensor:
    """Euler's method with a question that knows of no other one."""
    for t, t_next in zip(TIMES, TIMES[1:], strict=False):
        x = x + (t_next - t) * model.velocity(x, t, cond)
    return x


def trace(model: VideoModel) -> list[Any]:
    """Whatever a context manager could leave behind on a model's modules."""
    return [
        (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in model.module.modules()
    ]


@pytest.mark.parametrize("name", [n for n in tiny_families.NAMES if FAMILIES[n].tables])
def test_sampling_computes_once_and_gives_the_same_bits(name: str):
    case = tiny_families.case(name)
    model, before = case.model, trace(case.model)
    with torch.no_grad():
        expected = by_steps(model, case.condition, case.x)
    with counted(model) as calls:
        found = sample(model, case.condition, case.x, TIMES)
    assert torch.equal(found, expected)
    # Both of two experts are asked, and each has its own.
    assert calls and set(calls.values()) == {len(networks_of(model.module))}
    assert trace(model) == before and not steady_module._active


def test_rotary_tables_of_cogvideox_are_made_once(monkeypatch: pytest.MonkeyPatch):
    import diffusers.models.embeddings as embeddings

    made: list[int] = []
    plain = embeddings.get_3d_rotary_pos_embed
    monkeypatch.setattr(
        embeddings, "get_3d_rotary_pos_embed", lambda **how: made.append(1) or plain(**how)
    )
    case = tiny_families.case("cogvideox_5b")
    sample(case.model, case.condition, case.x, TIMES)
    assert len(made) == 1
    case.velocities(case.model)
    assert len(made) == 3  # outside of a sampling nothing is kept


@pytest.mark.parametrize("name", ["wan_t2v", "cogvideox_5b"])
def test_a_prompt_and_its_negative_are_projected_once_each(name: str):
    case = tiny_families.case(name)
    negative = replace(case.condition.select(0), text=-case.condition.select(0).text)
    asked = Guided(case.model, negative, Cfg(3.0), batched="in turn")
    with counted(case.model) as calls:
        sample(asked, case.condition, case.x, TIMES)
    assert all(calls[path] == 2 for path in case.model.family.texts if path in calls)
    assert all(calls[path] == 1 for path in case.model.family.tables if path in calls)


def test_other_text_and_other_sizes_are_computed_anew():
    case = tiny_families.case("wan_t2v")
    model, wider = case.model, torch.cat([case.x, case.x], dim=4)
    ready = model.prepared(case.condition)
    other = replace(ready, text=ready.text.clone())
    with torch.no_grad():
        other.text[:, 0] += 1
        expected = [model.velocity(x, 0.5, c) for x, c in ((case.x, ready), (wider, other))]
        with steady(model):
            found = [model.answer(x, 0.5, c) for x, c in ((case.x, ready), (wider, other))]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            # The same tensor with other values in it.
            ready.text.copy_(other.text)
            assert torch.equal(model.answer(wider, 0.5, ready), expected[1])


def test_a_lora_on_a_text_projection_does_not_answer_for_its_teacher():
    case = tiny_families.case("wan_t2v")
    targets = ("condition_embedder.text_embedder.linear_1",)
    info = StudentInfo(
        family="wan_t2v",
        base=case.model.fingerprint,
        key_times=TIMES,
        guidance=None,
        lora=LoraSpec(rank=2, targets=targets),
        latent_spec=case.model.latent_spec,
        frames=5,
        height=32,
        width=32,
    )
    student = Student.create(case.model, info)
    with torch.no_grad():
        for p in student.trainable().values():
            p.add_(0.5)
        expected = [by_steps(m, case.condition, case.x) for m in (case.model, student.model)]
    assert not torch.allclose(expected[0], expected[1])
    with steady(case.model), steady(student.model), torch.no_grad():
        ready = case.model.prepared(case.condition)
        for model, end in zip((case.model, student.model) * 2, expected * 2, strict=True):
            x = case.x
            for t, t_next in zip(TIMES, TIMES[1:], strict=False):
                x = x + (t_next - t) * model.answer(x, t, ready)
            assert torch.equal(x, end)


def test_with_gradients_nothing_is_kept():
    case = tiny_families.case("wan_t2v")
    case.model.module.requires_grad_(True)
    ready = case.model.prepared(case.condition)
    with counted(case.model) as calls, steady(case.model):
        for _ in range(2):
            case.model.answer(case.x, 0.5, ready).sum().backward()
    assert set(calls.values()) == {2}


def test_inside_a_graph_that_is_captured_nothing_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steady_module, "_capturing", lambda: True)
    case = tiny_families.case("wan_t2v")
    with counted(case.model) as calls:
        sample(case.model, case.condition, case.x, TIMES)
    assert set(calls.values()) == {len(TIMES) - 1}


def test_only_the_last_few_are_held_and_none_afterwards():
    case = tiny_families.case("wan_t2v")
    texts: list[weakref.ref[Tensor]] = []
    with steady(case.model), torch.no_grad():
        for _ in range(RESULTS + 2):
            ready = case.model.prepared(case.condition)
            texts.append(weakref.ref(ready.text))
            case.model.answer(case.x, 0.5, ready)
            del ready
        gc.collect()
        assert [text() is not None for text in texts] == [False] * 2 + [True] * RESULTS
    gc.collect()
    assert not any(text() is not None for text in texts)


def test_tensors_of_inference_mode_are_sampled_as_others():
    case = tiny_families.case("cogvideox_5b")
    expected = sample(case.model, case.condition, case.x, TIMES)
    with torch.inference_mode():
        cond = Condition(**{n: x.clone() for n, x in case.condition.tensors().items()})
        with counted(case.model) as calls:
            found = sample(case.model, cond, case.x.clone(), TIMES)
    assert torch.equal(found, expected)
    assert set(calls.values()) == {1}

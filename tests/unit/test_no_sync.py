"""Between the first and the last step the host never waits for the device.

The network lies on torch's meta device, whose tensors have no values: reading one, which on a GPU
is what waits, is an error. A mode around the loop refuses copies to the device as well.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import tiny_families
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from accvideo_core import solvers
from accvideo_core.conditioning import Condition
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.flow import time_grid
from accvideo_core.guidance import Cfg, Guided
from accvideo_core.models.video_model import VideoModel
from accvideo_core.monitor import Progress
from accvideo_core.sampling import HasVelocity, sample
from accvideo_core.solvers import SOLVERS

META = torch.device("meta")
TIMES = time_grid(3, 2.0)
"""On both sides of every boundary between experts."""
ALL = list(range(1, len(TIMES)))
WAITS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
)


class NoWaiting(TorchDispatchMode):
    """Refuses what a host waits for: values of a device, and copies between it and the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        found = func(*args, **kwargs)
        if func in WAITS and any(x.device == META for x in tensors):
            raise AssertionError(f"the host waits for {func}")
        results = [found] if isinstance(found, Tensor) else []
        # A number that Python wraps for an operation is a tensor of no axes on the CPU.
        moved = {x.device for x in (*tensors, *results) if x.dim() > 0}
        if len(moved) > 1:
            raise AssertionError(f"{func} copies between {moved}")
        return found


class NoNumbers(TorchFunctionMode):
    """Refuses to make tensors on the device of numbers that the host has, which are copied."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and found.device == META:
            raise AssertionError(f"{func} copies numbers to the device")
        return found


def on_meta(name: str) -> tuple[VideoModel, Condition, Tensor]:
    """A family's tiny network without values; condition and noise with values, on the CPU."""
    case = tiny_families.case(name)
    return replace(case.model, module=case.model.module.to(META)), case.condition, case.x


def student_of(model: VideoModel) -> Student:
    info = StudentInfo(
        family=model.family.name,
        base="0" * 16,
        key_times=TIMES,
        guidance=None,
        lora=LoraSpec(rank=2),
        latent_spec=model.latent_spec,
        frames=5,
        height=16,
        width=16,
    )
    return Student.create(replace(model, _fingerprint="0" * 16), info)


def steps(
    asked: HasVelocity, cond: Condition, noise: Tensor, solver: str = "euler"
) -> list[int]:
    """Samples all steps, up to the first look at the result; gives those that were gone.

    The first step makes what lasts, and may copy; the ones after it may not.
    """
    seen: list[int] = []
    with ExitStack() as loop:

        def monitor(progress: Progress) -> None:
            seen.append(progress.step)
            if progress.step == 1:
                loop.enter_context(NoWaiting())
                loop.enter_context(NoNumbers())
            if progress.step == progress.total:
                loop.close()

        # What is left is the check for NaN, of numbers that are not there.
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            sample(asked, cond, noise, TIMES, monitor, solver=solver)
    return seen


@pytest.mark.parametrize(
    "name",
    [
        *("hunyuan_video", "hunyuan_video_i2v_replace", "wan_i2v", "wan22_t2v", "wan22_ti2v"),
        *("cogvideox_2b", "cogvideox_1_5"),
    ],
)
def test_no_family_waits(name: str):
    assert steps(*on_meta(name)) == ALL


@pytest.mark.parametrize(
    ("name", "batched"),
    [("hunyuan_video", "auto"), ("wan22_t2v", "batched"), ("cogvideox_5b", "in turn")],
)
def test_no_guided_teacher_waits(name: str, batched: str):
    model, cond, noise = on_meta(name)
    negative = cond.select(0)
    asked = Guided(model, replace(negative, text=-negative.text), Cfg(3.0), batched)
    assert steps(asked, cond, noise) == ALL


def test_no_student_waits():
    model, cond, noise = on_meta("wan_t2v")
    assert steps(student_of(model), cond, noise) == ALL


def test_texts_of_different_lengths_do_not_wait():
    model, cond, noise = on_meta("hunyuan_video")
    assert cond.mask is not None
    mask = cond.mask.clone()
    mask[1, 3:] = False
    assert steps(model, replace(cond, mask=mask), noise) == ALL


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_waits(solver: str, monkeypatch: pytest.MonkeyPatch):
    # Fresh noise is named after the first state, before the first step, and drawn on the host; its
    # copy, on a GPU, is one that nobody waits for (tests/gpu).
    monkeypatch.setattr(solvers, "_marks", lambda x: ["mark"] * len(x))
    monkeypatch.setattr(solvers, "_beside", lambda host, x: torch.empty_like(x))
    assert steps(*on_meta("wan_t2v"), solver=solver) == ALL


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.ones(2).to(x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
    ],
)
def test_what_waits_is_found(wait: Callable[[Tensor], Any]):
    x = torch.zeros(2, device=META)
    with NoWaiting(), NoNumbers(), pytest.raises((AssertionError, RuntimeError)):
        wait(x)

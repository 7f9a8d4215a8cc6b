"""How a model is sampled: its own times, a preset's, or the user's sigmas."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import comfy.samplers
import torch
from comfy_api.latest import io

from ..accvideo_core.distill.student import student_grid
from ..accvideo_core.errors import AccVideoError
from ..accvideo_core.flow import Times
from ..accvideo_core.presets import Preset, misfit, presets_for
from ..accvideo_core.presets import preset as preset_named
from ..accvideo_core.solvers import COMFY_SAMPLERS
from .sockets import StudentHandle, from_sigmas, network, to_sigmas
from .vp_sampler import VarianceSampler

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher

OWN = "(the model's own)"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """Everything about sampling that a few-step model wants its own way."""

    times: Times
    sigmas: torch.Tensor
    guidance: float | None
    """Embedded guidance; None is what the prompts carry."""
    cfg: float = 1.0
    solver: str = "euler"
    comfy_sampler: str = "euler"
    variance_preserving: bool = False
    few_step: bool = True
    """Whether the model has its guidance in its weights."""

    def sampler(self) -> comfy.samplers.Sampler:
        """ComfyUI's sampler that goes with the sigmas."""
        if self.variance_preserving:
            return VarianceSampler()
        return comfy.samplers.sampler_object(self.comfy_sampler)


def preset_input(tooltip: str) -> io.Input:
    """The public few-step models whose sampling is known."""
    return io.Combo.Input(
        "preset", options=[OWN, *presets_for()], default=OWN, optional=True, tooltip=tooltip
    )


def sampling_plan(
    model: Teacher | StudentHandle | None,
    preset: str,
    steps: int,
    shift: float,
    size: tuple[int, int] | None = None,
    sigmas: torch.Tensor | None = None,
) -> SamplingPlan:
    """What the widgets ask for; `sigmas` go before a preset, a preset before the model's own.

    Steps 0 and shift 0 are the model's own, for videos of `size` (height, width). Times that do not
    fit a student are said so in the log.
    """
    plan = _plan(model, preset, steps, shift, size)
    if sigmas is not None:
        family = network(model).family if model else None
        plan = replace(plan, times=from_sigmas(sigmas, family), sigmas=sigmas)
    if isinstance(model, StudentHandle):
        warning = misfit(plan.times, model.student.key_times)
        if warning:
            log.warning("%s", warning)
    return plan


def _plan(
    model: Teacher | StudentHandle | None,
    preset: str,
    steps: int,
    shift: float,
    size: tuple[int, int] | None,
) -> SamplingPlan:
    if preset != OWN:
        return _of_preset(preset_named(preset), model)
    if model is None:
        raise AccVideoError("neither a model nor a preset was given; connect one or choose one")
    family = network(model).family
    if isinstance(model, StudentHandle) and steps == 0:
        times = model.student.key_times
    elif isinstance(model, StudentHandle) and model.student.info.any_steps:
        times = student_grid(family, steps, shift or None, size)
    else:
        times = family.time_grid(steps or None, shift or None, size)
    if isinstance(model, StudentHandle):
        info = model.student.info
        plan = SamplingPlan(
            times, to_sigmas(times, family), info.guidance, solver=info.solver,
            comfy_sampler=COMFY_SAMPLERS[info.solver],
        )  # fmt: skip
    else:
        cfg = family.cfg.scale if family.cfg else 1.0
        plan = SamplingPlan(times, to_sigmas(times, family), None, cfg, few_step=False)
    return replace(plan, variance_preserving=family.variance_preserving)


def _of_preset(chosen: Preset, model: Teacher | StudentHandle | None) -> SamplingPlan:
    family = network(model).family if model else None
    if family is not None and family.name not in chosen.families:
        raise AccVideoError(
            f"preset {chosen.name!r} is for {' and '.join(chosen.families)}, but the model is a "
            f"{family.name}; choose another preset or {OWN!r}"
        )
    return SamplingPlan(
        chosen.times,
        to_sigmas(chosen.times, family),
        chosen.guidance,
        chosen.cfg,
        chosen.solver,
        chosen.comfy_sampler,
    )

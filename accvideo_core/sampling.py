"""The sampler: any solver along any time grid, for teachers and students alike.

Shapes: B batch, C channels, T latent frames, H, W latent size. Everything in model space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .conditioning import Condition, Prompt
from .errors import AccVideoError
from .flow import Velocity, predict_x0, validate_times
from .latents import LatentSpec, seeded_noise
from .monitor import Monitor, Progress, silent
from .solvers import solver_named


class HasVelocity(Protocol):
    """A VideoModel, a Student, or anything else that points from noise to data."""

    def velocity(self, x_t: Tensor, t: float | Tensor, cond: Condition, /) -> Tensor: ...


@runtime_checkable
class Asked(Protocol):
    """One that does once what does not change from step to step, as the core's own do."""

    @property
    def device(self) -> torch.device: ...

    def asking(self, cond: Condition, /) -> AbstractContextManager[Velocity]: ...


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """The size of what is sampled, in pixels."""

    frames: int
    height: int
    width: int

    def noise(
        self, spec: LatentSpec, prompts: Sequence[Prompt], seed: int, sample: int = 0
    ) -> Tensor:
        """[B, C, T, H, W]: the noise that (seed, prompt, sample) has everywhere."""
        if not prompts:
            raise AccVideoError("no prompts were given to sample; pass at least one")
        shape = spec.shape(self.frames, self.height, self.width)
        return torch.stack([seeded_noise(shape, seed, prompt.id, sample) for prompt in prompts])


def sample(
    model: HasVelocity,
    condition: Condition,
    noise: Tensor,
    times: Sequence[float],
    monitor: Monitor = silent,
    batch_size: int | None = None,
    solver: str = "euler",
    seed: int = 0,
) -> Tensor:
    """Solve dx = v dt from `times[0]` to `times[-1]`.

    Args:
        condition: of the B samples, or of one that all share.
        noise: [B, C, T, H, W], left as it is. At `times[0]` below 1 the state is that much of it,
            as in ComfyUI with an empty latent and in rCM.
        times: falling times; a student's own are its key times.
        monitor: called after every step, with a lazy preview of the part at work; may raise.
        batch_size: how many samples go through the network at once; None is all.
        solver: a name in `SOLVERS`; the default is Euler's method (AccVideo, Eq. 5).
        seed: of the fresh noise of a solver that draws some.

    Returns:
        Model-space latents [B, C, T, H, W], float32 (float64 for float64 noise), where `noise` is.
    """
    grid = validate_times(times)
    solve = solver_named(solver)
    condition = _check(condition, noise)
    size = batch_size or len(noise)
    if size < 1:
        raise AccVideoError(f"batch_size is {batch_size}; it must be at least 1")
    starts = range(0, len(noise), size)
    steps = len(grid) - 1
    parts = []
    # Plain tensors come out even inside inference mode, so that training may use them.
    with torch.inference_mode(False), torch.no_grad():
        # In the loop nothing is copied to or from the device, and nothing waits for it.
        device = model.device if isinstance(model, Asked) else noise.device
        x_1 = noise.to(device, torch.promote_types(noise.dtype, torch.float32)) * grid[0]
        for number, start in enumerate(starts):
            rows = slice(start, start + size)
            with _asking(model, condition.select(rows)) as velocity:
                last = _Last(velocity, noise.device)
                solution = solve(last.velocity, x_1[rows], grid, seed)
                x = next(solution)
                for step, state in enumerate(solution, start=number * steps + 1):
                    x = state
                    progress = Progress("sample", step, len(starts) * steps, preview=last.preview())
                    monitor(progress)
            parts.append(x)
        result = torch.cat(parts)
    if not torch.isfinite(result).all():
        raise AccVideoError(
            "sampling gave NaN or infinite latents; use float32 or bfloat16 weights, or an earlier "
            "checkpoint of this student"
        )
    return result.to(noise.device)


def _asking(model: HasVelocity, condition: Condition) -> AbstractContextManager[Velocity]:
    if isinstance(model, Asked):
        return model.asking(condition)
    return nullcontext(lambda x_t, t: model.velocity(x_t, t, condition))


class _Last:
    """A velocity that remembers its last answer, for the preview."""

    def __init__(self, velocity: Velocity, device: torch.device) -> None:
        self._velocity, self._device = velocity, device

    def velocity(self, x_t: Tensor, t: float) -> Tensor:
        v = self._velocity(x_t, t)
        self._last = (x_t, v, t)
        return v

    def preview(self) -> Callable[[], Tensor]:
        """Makes the clean sample that the last velocity pointed at, on the noise's device."""
        x_t, v, t = self._last
        return lambda: predict_x0(x_t, v, t).to(self._device)


def _check(condition: Condition, noise: Tensor) -> Condition:
    """The condition of every sample, after checking that noise and condition fit."""
    if noise.dim() != 5 or not len(noise):
        raise AccVideoError(f"noise has shape {tuple(noise.shape)}; expected [B, C, T, H, W]")
    if not torch.isfinite(noise).all():
        raise AccVideoError("the noise holds NaN or infinite values; make it again from its seed")
    if len(condition) == 1:
        return condition.select([0] * len(noise))
    if len(condition) != len(noise):
        raise AccVideoError(
            f"there are {len(condition)} prompts for {len(noise)} noise samples; "
            "pass one prompt, or as many as samples"
        )
    return condition

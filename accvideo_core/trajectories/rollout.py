"""Rollout: the teacher's trajectories of one batch, from noise to data (AccVideo, Sec. 4.1).

Shapes: B records of one batch, K kept times, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Condition, Prompt
from ..flow import euler_states, predict_x0
from ..guidance import Guided
from ..latents import seeded_noise
from ..models.video_model import VideoModel
from .info import DTYPES, DatasetInfo

Preview = Callable[[], Tensor]
Report = Callable[[int, Preview], None]


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """What came of a batch."""

    latents: Tensor
    """The kept states [B, K, C, T, H, W] (CPU, storage dtype)."""
    rounding: list[float]
    """Relative error of each record's states, root mean square, that the storage dtype makes."""
    broken: dict[int, str] = field(default_factory=dict)
    """Rows that are not finite: one sentence each."""


def rollout(
    model: VideoModel | Guided,
    info: DatasetInfo,
    prompts: Sequence[Prompt],
    sample: int,
    report: Report,
    wanted: Collection[int] | None = None,
) -> Rollout:
    """Solve one batch. Calls `report(step, preview)` after every Euler step.

    A row that stops being finite is named and leaves the others alone. When none of the rows
    `wanted` (by default all) is left, the rest of the way is saved.
    """
    cond = Condition.cat([p.condition for p in prompts]).to(model.device, model.dtype)
    noise = torch.stack([seeded_noise(info.shape, info.seed, p.id, sample) for p in prompts])
    latest: list[Any] = []
    need = set(range(len(prompts)) if wanted is None else wanted)
    kept: list[Tensor] = []
    errors: list[Tensor] = []
    broken: dict[int, str] = {}
    with model.asking(cond) as ask:

        def velocity(x_t: Tensor, t: float) -> Tensor:
            v = ask(x_t, t)
            latest[:] = x_t, v, t
            return v

        for i, x_t in enumerate(euler_states(velocity, noise.to(model.device), info.time_grid)):
            _note(broken, x_t, prompts, i, "lower the guidance or run the teacher in float32")
            if i in info.kept:
                dtype = DTYPES[info.dtype]
                kept.append(x_t.to(dtype).cpu())
                errors.append(rounding_error(x_t, dtype).cpu())
                remedy = f"store in bfloat16 instead of {info.dtype}"
                _note(broken, kept[-1], prompts, i, remedy)
            if i > 0:
                report(i, partial(predict_x0, *latest))
            if need <= broken.keys():
                break
    rounding = torch.stack(errors).square().mean(dim=0).sqrt().tolist()
    return Rollout(torch.stack(kept, dim=1), rounding, broken)


def not_stored(skipped: Mapping[str, str], total: int) -> str:
    """One sentence on those of `total` trajectories that are `skipped` (id: why, in a sentence)."""
    first = next(iter(skipped.values()))
    return f"{len(skipped)} of {total} trajectories are not finite and not stored: {first}"


def rounding_error(states: Tensor, dtype: torch.dtype) -> Tensor:
    """|x - round(x)| / |x| of every state [N, ...] when it is stored in `dtype`; [N] in float32.

    Numbers spread as states are give about 0.0017 in bfloat16 and 0.0002 in float16.
    """
    if dtype == states.dtype:
        return torch.zeros(len(states), device=states.device)
    flat = states.flatten(1).float()
    error = flat.to(dtype).float() - flat
    # A state of zeros is stored exactly.
    return error.norm(dim=1) / flat.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def _note(
    broken: dict[int, str], states: Tensor, prompts: Sequence[Prompt], step: int, remedy: str
) -> None:
    """Add every row of `states` [B, ...] that is not finite and was so until now."""
    if torch.isfinite(states).all():
        return
    for row, (state, prompt) in enumerate(zip(states, prompts, strict=True)):
        if row not in broken and not torch.isfinite(state).all():
            broken[row] = (
                f"the teacher's state after step {step} holds NaN or infinite values for prompt "
                f"{prompt.text or prompt.id!r}; {remedy}"
            )

"""Looks at planted students, whose figures are known, over records of a very small teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
from torch import Tensor

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.student import StudentInfo
from accvideo_core.distill.watch import Watch
from accvideo_core.distill.watch_clips import FixedClip
from accvideo_core.monitor import Progress
from accvideo_core.trajectories.record import RecordSpec, record
from accvideo_core.trajectories.store import TrajectoryDataset

RECIPE = Recipe(student_steps=1, train_steps=1000, validate_every=100, adversarial=True)
Land = Callable[[Tensor], Tensor]
"""The teacher's result [1, C, T, H, W] -> where the planted student arrives."""


def recorded(folder: Path, samples: int, prompts: int = 3, **spec: Any) -> TrajectoryDataset:
    texts = [Prompt.of(f"clip {i}", tiny.condition(1, seed=10 + i)) for i in range(prompts)]
    chosen = {"steps": 2, "kept": 2, "batch_size": 6, "dtype": "float32", **spec}
    sizes = {"frames": 5, "height": 16, "width": 16, "samples_per_prompt": samples}
    return record(tiny.video_model(), texts, RecordSpec(**sizes, **chosen), folder)


def info_of(dataset: TrajectoryDataset, **more: Any) -> StudentInfo:
    known = dataset.info
    facts = {"guidance": known.guidance, "base": known.teacher, **more}
    return StudentInfo(
        family=known.family,
        key_times=(1.0, 0.0),
        lora=None,
        latent_spec=known.latent_spec,
        frames=known.frames,
        height=known.height,
        width=known.width,
        **facts,
    )


def decode(x: Tensor) -> Tensor:
    """[1, C, T, H, W] -> [1, T, H, W, 3], the first three channels as colours."""
    return torch.sigmoid(2 * x[:, :3]).permute(0, 2, 3, 4, 1)


class Planted:
    """A student that lands in its one step where `land` says."""

    key_times = (1.0, 0.0)

    def __init__(self, clips: Sequence[FixedClip]) -> None:
        self.clips = clips
        self.land: Land = lambda result: result

    def as_teacher(self) -> Any:
        return SimpleNamespace(device=torch.device("cpu"))

    def velocity(self, x: Tensor, t: float | Tensor, cond: Condition) -> Tensor:
        result = next(clip.result for clip in self.clips if torch.equal(clip.noise, x))
        return x - self.land(result)


class Watched:
    """A Watch of a planted student, and what it has said."""

    def __init__(self, dataset: TrajectoryDataset, folder: Path, recipe: Recipe = RECIPE, **more):
        more = {"decode": decode, **more}
        self.watch = Watch(info_of(dataset), dataset, recipe, folder, **more)
        self.student: Any = Planted(self.watch.clips)
        self.seen: list[Progress] = []

    def look(self, step: int, land: Land | None = None, roles: Sequence[Any] = ()) -> str:
        self.student.land = land or (lambda result: result)
        self.seen.clear()
        assert self.watch.look(step, self.student, roles, self.seen.append) is False
        return " | ".join(self.seen[-1].notes)

    @property
    def row(self) -> dict[str, Any]:
        return self.watch.rows()[-1]


def still(x: Tensor) -> Tensor:
    return x[:, :, :1].expand_as(x)


def colourful(x: Tensor) -> Tensor:
    return x + 2 * (x - x[:, :3].mean(dim=1, keepdim=True))


def grey(x: Tensor) -> Tensor:
    return x[:, :3].mean(dim=1, keepdim=True).expand_as(x)

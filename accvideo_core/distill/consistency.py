"""Latent consistency distillation (LCM, AnimateLCM): the same clean latents from all of a path.

f(x_t, t) = x_t - t v(x_t, t) is x itself at t = 0, so it needs no c_skip and c_out. The teacher
takes one Euler step from x_t, under guidance, and f of the student at both ends must agree.

Shapes: B batch, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..conditioning import Condition, Prompt
from ..errors import AccVideoError
from ..flow import Times, expand_time, interpolate
from ..guidance import Cfg, Guided, guided
from ..models.video_model import VideoModel
from .batch import KeyBatch, KeyStates
from .objective import Phase, Term
from .optimiser import Average
from .setting import Setting
from .specs import ConsistencySpec
from .student import Student


@dataclass(frozen=True, slots=True)
class Consistency:
    """E d(f(x_t, t), f^-(x_t', t')), where t' lies `skip` steps of the grid below t.

    f^- is the student with averaged weights, or without gradient where there are none.
    """

    spec: ConsistencySpec
    asked: VideoModel | Guided
    """The frozen teacher, under its guidance."""
    grid: Times
    average: Average | None = None
    heads = None

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(self),)

    def __call__(self, student: Student, batch: KeyBatch, k: int) -> Iterator[Term]:
        start, t, t_next = self.draw(batch)
        x_t = interpolate(batch.latents[0], batch.z, t)
        target = self.target(student, self.step(x_t, start, t, t_next, batch.cond), t_next, batch)
        made = clean(student, x_t, t, batch.cond)
        yield Term("consistency", distance(made, target, self.spec.huber_c))

    def draw(self, batch: KeyBatch) -> tuple[list[int], Tensor, Tensor]:
        """Each sample's place in the grid, the time there, and the time a solver step below."""
        places = len(self.grid) - self.spec.skip
        start = (batch.uniform("place") * places).long().tolist()
        device = batch.z.device
        t = torch.tensor([self.grid[i] for i in start], device=device)
        below = torch.tensor([self.grid[i + self.spec.skip] for i in start], device=device)
        return start, t, below

    @torch.no_grad()
    def step(
        self, x_t: Tensor, start: list[int], t: Tensor, t_next: Tensor, cond: Condition
    ) -> Tensor:
        """The teacher's Euler step from t to t_next."""
        if isinstance(self.asked, VideoModel):
            v = self.asked.velocity(x_t, t, cond).float()
        else:
            v = torch.empty_like(x_t)
            for place in set(start):  # guidance asks about one time at once
                rows = [i for i, one in enumerate(start) if one == place]
                v[rows] = self.asked.velocity(x_t[rows], self.grid[place], cond.select(rows)).to(v)
        return x_t + expand_time(t_next - t, x_t) * v

    @torch.no_grad()
    def target(self, student: Student, x: Tensor, t: Tensor, batch: KeyBatch) -> Tensor:
        """f^- [B, C, T, H, W]."""
        with self.average.in_place() if self.average else nullcontext():
            return clean(student, x, t, batch.cond)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass


def clean(student: Student, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """f(x_t, t) with times t [B]."""
    return x_t - expand_time(t, x_t) * student.velocity(x_t, t, cond).float()


def distance(made: Tensor, target: Tensor, c: float) -> Tensor:
    """Pseudo-Huber distance of every element, averaged."""
    return (((made - target).square() + c**2).sqrt() - c).mean()


def build_consistency(setting: Setting) -> Consistency:
    """The objective on the family's own grid, under the recipe's guidance, the dataset's, or, of
    real videos, the family's.

    Raises:
        AccVideoError: guidance is asked for, and there is no negative prompt.
    """
    spec = setting.recipe.consistency or ConsistencySpec()
    asked: VideoModel | Guided = setting.teacher
    if setting.states is not None:  # what runs without gradient is not rehearsed
        asked = guided(asked, *_guidance(setting.teacher, setting.states, spec))
    return Consistency(spec, asked, setting.teacher.family.time_grid(spec.steps), setting.average)


def _guidance(
    teacher: VideoModel, states: KeyStates, spec: ConsistencySpec
) -> tuple[Prompt | None, Cfg | None]:
    """(negative prompt, guidance) of the teacher's steps."""
    dataset, family = states.dataset, teacher.family
    info = dataset.info
    cfg = info.cfg if info.cutting is None else family.cfg
    if spec.cfg is not None:
        cfg = Cfg(spec.cfg) if cfg is None else replace(cfg, scale=spec.cfg)
    if cfg is None or cfg.none:
        return None, None
    if info.negative is not None:
        return dataset.prompt(info.negative), cfg
    if family.guides_image:  # away from no image, which is zeros
        first = dataset.prompt(dataset.header(states.ids[0]).prompt_id).condition
        return Prompt.of("", Condition(torch.zeros_like(first.text))), cfg
    raise AccVideoError(
        f"guidance {cfg.scale:g} needs a negative prompt, which dataset {dataset.folder.name!r} "
        "does not have; set recipe.consistency.cfg to 1, or record with guidance"
    )

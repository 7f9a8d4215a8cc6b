"""Where fakes come from: the student's own latents at a key time, from fresh noise.

Algorithm 1 of AccVideo keeps queues Q_m ... Q_1: every update takes a fake at t'_{k+1}, makes one
Euler step to t'_k, and leaves it there for the update after it. That spreads one rollout over m
updates. `DirectRollout` makes all the steps in every update instead. In both, the gradient goes
through the last step alone.

Shapes: B batch, N waiting fakes, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..flow import euler_step
from ..ranks import ALONE, Ranks
from .batch import KeyBatch, KeyStates
from .recipes import Recipe
from .student import Student


@dataclass(frozen=True, slots=True)
class Fakes:
    """The student's latents at a key time, and the batch that they belong to."""

    latents: Tensor
    """l^gen_{t'_k} [B, C, T, H, W] float32."""
    batch: KeyBatch
    """Their prompts, and the real latents of the same records."""


class Rollout(Protocol):
    def __call__(
        self, student: Student, batch: KeyBatch, k: int, advance: bool = True
    ) -> Fakes:
        """Fakes at t'_k; unless they `advance`, the same may be asked for again."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


def euler(student: Student, x: Tensor, batch: KeyBatch, k: int) -> Tensor:
    """Eq. 5 with the student: from x at t'_{k+1} to t'_k."""
    t, t_next = batch.t[k + 1], batch.t[k]
    return euler_step(x, student.velocity(x, t, batch.cond), t, t_next)


@torch.no_grad()
def roll(student: Student, batch: KeyBatch, k: int) -> Tensor:
    """l^gen_{t'_k} [B, C, T, H, W] from the fresh noise `batch.z`, without gradient."""
    x = batch.z
    for j in range(batch.steps - 1, k - 1, -1):
        x = euler(student, x, batch, j)
    return x


def generate(student: Student, batch: KeyBatch, k: int) -> Tensor:
    """l^gen_{t'_k} [B, C, T, H, W] from `batch.z`, with gradient through the last step."""
    return euler(student, roll(student, batch, k + 1), batch, k)


class DirectRollout:
    """Every update rolls from fresh noise: up to m steps, and fakes are never stale."""

    def __call__(
        self, student: Student, batch: KeyBatch, k: int, advance: bool = True
    ) -> Fakes:
        return Fakes(generate(student, batch, k), batch)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One fake on its way from noise to data."""

    x: Tensor
    """[C, T, H, W] float32 in main memory."""
    record: int
    """Number of the record whose prompt it follows and whose latents are its real ones."""
    born: int
    """The update that drew its noise."""


class QueuedRollout:
    """Algorithm 1: one step per update. Fakes are then up to m - 1 updates of the student old.

    A queue is first in, first out, so the parts of a batch meet the fakes of the same parts. It
    holds `limit` fakes and loses the oldest beyond that; one that was not taken within the m
    updates after its noise was drawn belongs to another student and is dropped. Where too few wait,
    they are rolled from the batch's own noise, as `DirectRollout` does.
    """

    def __init__(
        self, states: KeyStates, limit: int, batch: int = 1, ranks: Ranks = ALONE
    ) -> None:
        """`limit`, and the samples of a `batch`, are those of all processes together; each has
        queues for its own part of every batch.
        """
        self.states, self.batch, self.ranks = states, batch, ranks
        self.queues = [deque[_Waiting](maxlen=limit // ranks.groups) for _ in states.t]
        """Q_0 ... Q_m, the fakes that wait at t'_k: none in Q_m, where the step from noise is taken
        at once, and none in Q_0, which is never read."""

    def __call__(
        self, student: Student, batch: KeyBatch, k: int, advance: bool = True
    ) -> Fakes:
        waiting = self._take(batch, k + 1)
        if waiting:
            x = torch.stack([one.x for one in waiting]).to(batch.z.device)
            own = self.states.gather([one.record for one in waiting], batch.z, batch.u)
        else:
            x, own = roll(student, batch, k + 1), batch
        fake = euler(student, x, own, k)
        if not advance:
            self.queues[k + 1].extend(waiting)
        elif k > 0:
            born = [one.born for one in waiting] or [batch.step] * len(x)
            rows = zip(fake.detach().cpu(), own.records, born, strict=True)
            self.queues[k].extend(_Waiting(*row) for row in rows)
        return Fakes(fake, own)

    def _take(self, batch: KeyBatch, k: int) -> list[_Waiting]:
        """As many fakes at t'_k as the batch has samples, or none."""
        queue, size = self.queues[k], len(batch.z)
        while queue and batch.step - queue[0].born >= batch.steps:
            queue.popleft()
        return [queue.popleft() for _ in range(size)] if len(queue) >= size else []

    def state_dict(self) -> dict[str, Tensor]:
        """`x` [N, C, T, H, W], and `level`, `record` and `born` [N] of all that wait, in order."""
        waiting = [(k, entry) for k, queue in enumerate(self.queues) for entry in queue]
        if not waiting:
            return {}
        own = {
            "x": torch.stack([entry.x for _, entry in waiting]),
            "level": torch.tensor([k for k, _ in waiting]),
            "record": torch.tensor([entry.record for _, entry in waiting]),
            "born": torch.tensor([entry.born for _, entry in waiting]),
        }
        order = self._order(own["level"].tolist())
        return {name: self.ranks.gather(x)[order] for name, x in own.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for queue in self.queues:
            queue.clear()
        if not state:
            return
        numbers = (state[name].tolist() for name in ("level", "record", "born"))
        place: Counter[int] = Counter()
        for x, level, record, born in zip(state["x"], *numbers, strict=True):
            rows = self.ranks.rows(self.batch)
            if rows.start <= place[level] % self.batch < rows.stop:
                self.queues[level].append(_Waiting(x, record, born))
            place[level] += 1

    def _order(self, levels: list[int]) -> list[int]:
        """The order in which one process would hold what all hold at these levels, one process
        after the other: batch by batch, as every batch was divided.
        """
        each, place, keys = self.batch // self.ranks.groups, Counter[int](), []
        for level in levels:
            turn, row = divmod(place[level], each)
            place[level] += 1
            keys.append((level, turn, row))
        held = [(level, turn, group, row) for group in range(self.ranks.groups)
                for level, turn, row in keys]  # fmt: skip
        return sorted(range(len(held)), key=held.__getitem__)


def build_rollout(recipe: Recipe, states: KeyStates, ranks: Ranks = ALONE) -> Rollout:
    """What the recipe asks for; queues hold at most two batches."""
    if recipe.rollout == "queued":
        return QueuedRollout(states, 2 * recipe.batch_size, recipe.batch_size, ranks)
    return DirectRollout()

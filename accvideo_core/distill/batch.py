"""KeyBatch: what one training step reads, indexed as in the paper; KeyStates: where it comes from.

Key times are counted from the data: t[0] = 0 is data and t[m] = 1 is noise, so `latents[k]` is
the paper's l_{t'_k}.

Shapes: B batch, m student steps, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..conditioning import Condition
from ..errors import AccVideoError
from ..flow import Times, find_times
from ..latents import key_generator, seeded_noise
from ..trajectories.store import TrajectoryDataset

_MEMORY_LIMIT = 2 * 2**30
"""Bytes of key states that are held in memory; larger datasets are read batch by batch."""


@dataclass(frozen=True, slots=True)
class KeyBatch:
    """Recorded key states and fresh noise of B samples."""

    latents: Tensor
    """[m + 1, B, C, T, H, W] float32, recorded states; latents[k] is at time t[k]."""
    t: Times
    """m + 1 rising times, from data to noise."""
    cond: Condition
    z: Tensor
    """[B, C, T, H, W] fresh noise; not the trajectories' own (Alg. 1, line 15)."""
    u: Tensor
    """[B] fresh uniform numbers, for objectives that draw a time."""
    records: tuple[int, ...] = ()
    """Numbers of the samples' trajectories among those of the run."""
    step: int = 0
    """The update (from 0) that it was drawn for."""
    key: str = ""
    """What further random numbers follow from, with a name and a sample's place."""
    places: tuple[int, ...] = ()
    """The samples' places in the whole batch, of which this may be a part."""

    @property
    def steps(self) -> int:
        """m, the student's steps."""
        return len(self.t) - 1

    @property
    def intervals(self) -> int:
        """What there is to train between the recorded times; data alone count as one."""
        return max(1, self.steps)

    def noise(self, name: str) -> Tensor:
        """Further fresh noise [B, C, T, H, W], the same whatever parts the batch is computed in."""
        if self.z.is_meta:
            return torch.empty_like(self.z)
        shape = self.z.shape[1:]
        rows = [seeded_noise(shape, self.key, name, place) for place in self._all_places()]
        return torch.stack(rows).to(self.z.device)

    def uniform(self, name: str) -> Tensor:
        """Further uniform numbers [B] float64, in main memory."""
        generators = [key_generator(self.key, name, place) for place in self._all_places()]
        numbers = [torch.rand((), generator=g, dtype=torch.float64) for g in generators]
        return torch.stack(numbers)

    def _all_places(self) -> Sequence[int]:
        return self.places or range(len(self.z))

    def split(self, parts: int) -> Iterator[KeyBatch]:
        """`parts` equal batches, in order."""
        size = self.z.shape[0] // parts
        for start in range(0, self.z.shape[0], size):
            rows = slice(start, start + size)
            yield replace(
                self,
                latents=self.latents[:, rows],
                cond=self.cond.select(rows),
                z=self.z[rows],
                u=self.u[rows],
                records=self.records[rows],
                places=tuple(self._all_places())[rows],
            )


class KeyStates:
    """A dataset's states at the times that a method reads; in memory when they are small."""

    def __init__(
        self, dataset: TrajectoryDataset, times: Times, count: int | None = None
    ) -> None:
        """
        Args:
            times: falling; the student's key times, or 0 alone for a method that learns from data.
            count: only the first trajectories, by id; None takes all.

        Raises:
            AccVideoError: the dataset holds too few trajectories, or a time was not recorded.
        """
        self.dataset = dataset
        self.ids = _first(dataset, count)
        self.t = tuple(reversed(times))
        self._rows = _stored_rows(dataset, self.t)
        self.shape = dataset.info.shape
        size = len(self.ids) * 4 * len(self.t) * torch.Size(self.shape).numel()
        self._keep = size <= _MEMORY_LIMIT
        self.bytes = size if self._keep else 0
        """That they take in main memory once all are read."""
        self._held: dict[str, tuple[Tensor, Condition]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def batch(
        self,
        size: int,
        seed: int,
        step: object,
        device: torch.device,
        rows: slice = slice(None),  # noqa: B008 - a slice never changes
    ) -> KeyBatch:
        """The batch of one step, a function of the arguments alone; or only some `rows` of it."""
        drawn = self._draw(size, key_generator(seed, "data", step))[rows]
        noise = key_generator(seed, "noise", step)
        z = torch.randn(size, *self.shape, generator=noise)[rows].to(device)
        u = torch.rand(size, generator=noise)[rows].to(device)
        places = tuple(range(size))[rows]
        return replace(self.gather(drawn, z, u), key=f"{seed}/{step}", places=places)

    def gather(self, records: Sequence[int], z: Tensor, u: Tensor) -> KeyBatch:
        """The batch of these records, by number, with given noise [B, C, T, H, W] and u [B]."""
        found = [self._record(self.ids[i]) for i in records]
        return KeyBatch(
            latents=torch.stack([states for states, _ in found], dim=1).to(z.device),
            t=self.t,
            cond=Condition.cat([cond for _, cond in found]).to(z.device),
            z=z,
            u=u,
            records=tuple(records),
        )

    def _draw(self, size: int, generator: torch.Generator) -> list[int]:
        """Distinct records while there are enough of them."""
        count = len(self.ids)
        if size <= count:
            return torch.randperm(count, generator=generator)[:size].tolist()
        return torch.randint(count, (size,), generator=generator).tolist()

    def _record(self, id: str) -> tuple[Tensor, Condition]:
        """(states [m + 1, C, T, H, W] float32 from data to noise, condition of one sample)."""
        if id in self._held:
            return self._held[id]
        trajectory = self.dataset.read(id)
        cond = self.dataset.prompt(trajectory.prompt_id).condition
        cond = cond.with_guidance(self.dataset.info.guidance)
        record = trajectory.latents[self._rows].float(), cond
        if self._keep:
            self._held[id] = record
        return record


def _first(dataset: TrajectoryDataset, count: int | None) -> list[str]:
    ids = dataset.ids()
    if not ids:
        raise AccVideoError(
            f"dataset {dataset.folder.name!r} holds no trajectories; record some first"
        )
    if count is not None and count > len(ids):
        raise AccVideoError(
            f"recipe.trajectories is {count}, but dataset {dataset.folder.name!r} holds "
            f"{len(ids)}; ask for fewer, or record more"
        )
    return ids[:count]


def _stored_rows(dataset: TrajectoryDataset, times: Times) -> list[int]:
    if dataset.info.times == (0.0,) and tuple(times) != (0.0,):
        raise AccVideoError(
            f"dataset {dataset.folder.name!r} holds clean clips alone, at t = 0, and this "
            "recipe learns from a teacher's states on the way there; record a dataset with "
            "accvideo record, or choose a recipe for videos"
        )
    try:
        return find_times(dataset.info.times, times)
    except AccVideoError as error:
        raise AccVideoError(
            f"dataset {dataset.folder.name!r} does not fit these student steps: {error}; choose "
            "other student steps, or record into another dataset with these states kept"
        ) from error

"""Recording: run the teacher from noise to data and store the states of its trajectory.

AccVideo, Sec. 4.1 (SynVid). A record follows from dataset seed, prompt and sample number alone; it
is computed in a fixed batch, so its bytes depend neither on interruptions nor on who records it.

    prepare   makes or continues the dataset and lists its prompts
    plan      the batches in which its records are computed
    Recorder  computes a batch and writes it while the next one is computed
    record    all of it in one process, or in several that are started on the same folder
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from .. import __version__
from ..conditioning import AnyPrompt, Prompt
from ..errors import AccVideoError
from ..files import remove_leftovers
from ..flow import Times, key_indices, validate_times
from ..guidance import Cfg, guided
from ..models.video_model import VideoModel
from ..monitor import Monitor, silent
from .info import DatasetInfo
from .rollout import Report, not_stored, rollout, rounding_error
from .store import Trajectory, TrajectoryDataset, record_id
from .writer import Closing, Writer

__all__ = [
    "Batch",
    "Outcome",
    "RecordSpec",
    "Recorder",
    "dataset_info",
    "plan",
    "prepare",
    "record",
    "rounding_error",
]


@dataclass(frozen=True, slots=True)
class RecordSpec:
    """What to record: the geometry in pixels, how many samples, which states."""

    frames: int
    height: int
    width: int
    samples_per_prompt: int = 1
    seed: int = 0
    steps: int | None = None
    """Teacher steps; None is the family's official number."""
    kept: tuple[int, ...] | int | Literal["all"] = 10
    """Indices of the states to keep, or m for every n/m-th of n steps (m + 1 states), or all."""
    batch_size: int = 1
    dtype: str = "bfloat16"
    guidance: float | None = None
    """Embedded guidance; None is what the prompts were encoded with, or else the family's."""
    cfg: Cfg | None = None
    """Classifier-free guidance; None is the family's official one, Cfg(1) is none."""
    shift: float | None = None
    """Shift of the time grid; None is the family's official one for this size."""
    times: Times | None = None
    """The whole time grid, falling from 1 (noise) to 0 (data), instead of `steps` and `shift`."""

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AccVideoError(f"{name} is {value}; it must be at least 1")
        if self.times is None:
            return
        for name in ("steps", "shift"):
            if getattr(self, name) is not None:
                raise AccVideoError(
                    f"{name} is {getattr(self, name)} beside times, which say it all; leave one out"
                )
        grid = validate_times(self.times)
        if (grid[0], grid[-1]) != (1.0, 0.0):
            raise AccVideoError(
                f"times go from {grid[0]:g} to {grid[-1]:g}; a trajectory goes from 1 (noise) to 0 "
                "(data)"
            )


@dataclass(frozen=True, slots=True)
class Batch:
    """Records computed together: one sample number of a few prompts."""

    sample: int
    prompt_ids: tuple[str, ...]

    def ids(self, seed: int) -> list[str]:
        """The records' ids, in the order of the prompts."""
        return [record_id(seed, prompt_id, self.sample) for prompt_id in self.prompt_ids]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one batch."""

    written: int = 0
    """Records that were computed and handed to the writer."""
    skipped: tuple[str, ...] = ()
    """Ids of records that are not stored because a state of theirs is not finite."""
    reasons: tuple[str, ...] = ()
    """One sentence for each of `skipped`."""


def record(
    model: VideoModel,
    prompts: Sequence[AnyPrompt],
    spec: RecordSpec,
    folder: Path,
    monitor: Monitor = silent,
    negative: Prompt | None = None,
) -> TrajectoryDataset:
    """Record `prompts` into the dataset in `folder`, and go on where an earlier run stopped.

    A batch with missing records is computed whole and the missing ones are written, so the files
    are the same whether or not the work was interrupted, and however many processes that were
    started on the folder share it. More samples per prompt, or more prompts, add batches and leave
    earlier ones alone: batches hold one sample number each, and never reach from one addition of
    prompts into the next (see `TrajectoryDataset.batches`). The monitor is called after every
    teacher step; when it raises, all finished batches are on the disk once this has returned.
    `negative` is the prompt that classifier-free guidance points away from.

    A trajectory that is not finite is left out, and named in a warning at the end. Raises
    AccVideoError for impossible settings, for a folder that holds a dataset with other ones (then
    nothing is touched), when every trajectory was left out, and for a full disk.
    """
    from .shared_work import share

    dataset = prepare(model, prompts, spec, folder, negative, monitor)
    batches = plan(dataset, prompts, spec.samples_per_prompt)
    share(Recorder(model, dataset, negative), batches, monitor)
    return dataset


def prepare(
    model: VideoModel,
    prompts: Sequence[AnyPrompt],
    spec: RecordSpec,
    folder: Path,
    negative: Prompt | None = None,
    monitor: Monitor = silent,
) -> TrajectoryDataset:
    """Make or continue the dataset in `folder` and list its prompts, without recording any.

    The monitor is called for every prompt that is encoded; when it raises, those before are on the
    disk and are not encoded again. Raises AccVideoError as `record` does.
    """
    if not prompts:
        raise AccVideoError("no prompts were given; pass at least one")
    info = dataset_info(model, prompts, spec, negative)
    guided(model, negative, info.cfg)  # raises before a folder is
    dataset = TrajectoryDataset.create(folder, info)
    if negative is not None and info.negative:
        dataset.add_negative(negative)
    dataset.add_prompts(prompts, spec.samples_per_prompt, info.guidance, monitor)
    remove_leftovers(dataset.folder)
    return dataset


def dataset_info(
    model: VideoModel,
    prompts: Sequence[AnyPrompt],
    spec: RecordSpec,
    negative: Prompt | None = None,
) -> DatasetInfo:
    """The DatasetInfo of recording `prompts` from `model` as `spec` says."""
    size = (spec.height, spec.width)
    own = spec.times and validate_times(spec.times)
    grid = own or model.family.time_grid(spec.steps, spec.shift, size)
    cfg = model.family.cfg if spec.cfg is None else spec.cfg
    cfg = None if cfg is None or cfg.none else cfg
    return DatasetInfo(
        family=model.family.name,
        teacher=model.fingerprint,
        teacher_source=model.source,
        latent_spec=model.latent_spec,
        frames=spec.frames,
        height=spec.height,
        width=spec.width,
        time_grid=grid,
        kept=_kept(spec.kept, len(grid) - 1),
        guidance=_guidance(model, prompts, spec),
        cfg=cfg,
        negative=negative.id if negative and cfg else None,
        seed=spec.seed,
        batch_size=spec.batch_size,
        dtype=spec.dtype,
        versions=versions(),
    )


def plan(
    dataset: TrajectoryDataset, prompts: Sequence[AnyPrompt] | None, samples: int
) -> list[Batch]:
    """The batches that hold records of `prompts`: sample 0 of all of them, then sample 1, ...

    None is every prompt of the dataset.
    """
    groups = dataset.batches()
    if prompts is not None:
        wanted = {prompt.id for prompt in prompts}
        groups = [ids for ids in groups if wanted.intersection(ids)]
    return [Batch(sample, ids) for sample in range(samples) for ids in groups]


class Recorder(Closing):
    """Records batches of one dataset, in one process.

    A batch is written by a background thread while the next one is computed; at most two wait, so
    memory is bounded. What goes wrong while writing comes out of the next call. Close it, or use it
    as a context, to be sure that all is on the disk.
    """

    stage = "record"
    not_stored = staticmethod(not_stored)

    def __init__(
        self, model: VideoModel, dataset: TrajectoryDataset, negative: Prompt | None = None
    ) -> None:
        info = dataset.info
        if model.fingerprint != info.teacher:
            raise AccVideoError(
                f"dataset {dataset.folder.name!r} is of teacher {info.teacher} instead of "
                f"{model.fingerprint}; load the teacher that it was begun with"
            )
        if negative is None and info.negative:
            negative = dataset.prompt(info.negative)
        self.dataset = dataset
        # In one batch or in turn gives other bytes, which the memory at hand must not decide.
        self._asked = guided(model, negative, info.cfg, batched="in turn")
        self._writer = Writer()

    def steps(self, _batch: Batch) -> int:
        """Teacher steps of a batch."""
        return len(self.dataset.info.time_grid) - 1

    @torch.no_grad()
    def do(
        self,
        batch: Batch,
        report: Report = lambda _step, _preview: None,
        stored: Callable[[Outcome], None] = lambda _outcome: None,
    ) -> Outcome:
        """Compute one batch and have those of its records written that do not exist.

        Calls `report(step, preview)` after every teacher step, and `stored(outcome)`, in the
        writer's thread, once the records are on the disk. When `report` raises, nothing of the
        batch is written. Raises AccVideoError for what went wrong while earlier ones were written.
        """
        self._writer.check()
        info, ids = self.dataset.info, batch.ids(self.dataset.info.seed)
        missing = [row for row, id in enumerate(ids) if not self.dataset.has(id)]
        if not missing:
            self._writer.put(partial(stored, Outcome()))
            return Outcome()
        prompts = [self.dataset.prompt(prompt_id) for prompt_id in batch.prompt_ids]
        found = rollout(self._asked, info, prompts, batch.sample, report, missing)
        skipped = {ids[row]: found.broken[row] for row in missing if row in found.broken}
        made = [
            Trajectory(
                ids[row],
                found.latents[row],
                info.times,
                info.seed,
                batch.prompt_ids[row],
                batch.sample,
                found.rounding[row],
            )
            for row in missing
            if row not in found.broken
        ]
        outcome = Outcome(len(made), tuple(skipped), tuple(skipped.values()))
        self._writer.put(partial(self._store, made, partial(stored, outcome)))
        return outcome

    def flush(self) -> None:
        """Wait until everything is on the disk. Raises AccVideoError for what went wrong."""
        self._writer.flush()

    def close(self) -> None:
        """`flush`, and let the writer's thread end."""
        self._writer.close()

    def _store(self, made: Sequence[Trajectory], stored: Callable[[], None]) -> None:
        for trajectory in made:
            if not self.dataset.has(trajectory.id):  # another process may have been faster
                self.dataset.write(trajectory)
        stored()


def _kept(kept: tuple[int, ...] | int | str, steps: int) -> tuple[int, ...]:
    """Indices of the kept states in a grid of `steps` steps."""
    if isinstance(kept, str):
        if kept != "all":
            raise AccVideoError(f"kept is {kept!r}; use a number, indices or 'all'")
        return tuple(range(steps + 1))
    return key_indices(steps, kept) if isinstance(kept, int) else tuple(kept)


def _guidance(model: VideoModel, prompts: Sequence[AnyPrompt], spec: RecordSpec) -> float | None:
    """One embedded guidance for the whole dataset."""
    if spec.guidance is not None:
        return float(spec.guidance)
    given = {p.guidance for p in prompts if p.guidance is not None}
    if len(given) > 1:
        raise AccVideoError(
            f"the prompts carry different guidance {sorted(given)}; set one for the whole dataset"
        )
    return given.pop() if given else model.family.guidance


def versions() -> dict[str, str]:
    """Versions of what makes a dataset; of the library that runs the networks where it is known."""
    found = {"accvideo": __version__, "torch": str(torch.__version__)}
    try:
        return {**found, "diffusers": metadata.version("diffusers")}
    except metadata.PackageNotFoundError:
        return found

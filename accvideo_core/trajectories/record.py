"""Recording: run the teacher from noise to data and store the states of its trajectory.

AccVideo, Sec. 4.1 (SynVid). A record follows from dataset seed, prompt and sample number alone; it
is computed in a fixed batch, so its bytes depend neither on interruptions nor on who records it.

Shapes: B records of one batch, K kept times, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..conditioning import Condition, Prompt
from ..errors import AccVideoError
from ..files import remove_leftovers
from ..flow import euler_states, key_indices, predict_x0
from ..guidance import Cfg, Guided, guided
from ..latents import seeded_noise
from ..models.video_model import VideoModel
from ..monitor import Monitor, Progress, silent
from .store import DTYPES, DatasetInfo, Trajectory, TrajectoryDataset, record_id

Preview = Callable[[], Tensor]
Report = Callable[[int, Preview], None]


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
    kept: tuple[int, ...] | int = 10
    """Indices of the states to keep, or m for every n/m-th of n steps (m + 1 states)."""
    batch_size: int = 1
    dtype: str = "bfloat16"
    guidance: float | None = None
    """Embedded guidance; None is what the prompts were encoded with, or else the family's."""
    cfg: Cfg | None = None
    """Classifier-free guidance; None is the family's official one, Cfg(1) is none."""
    shift: float | None = None
    """Shift of the time grid; None is the family's official one for this size."""

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AccVideoError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Batch:
    """Records computed together: one sample number of a few prompts."""

    sample: int
    prompt_ids: tuple[str, ...]

    def ids(self, seed: int) -> list[str]:
        """The records' ids, in the order of the prompts."""
        return [record_id(seed, prompt_id, self.sample) for prompt_id in self.prompt_ids]


@torch.no_grad()
def record(
    model: VideoModel,
    prompts: Sequence[Prompt],
    spec: RecordSpec,
    folder: Path,
    monitor: Monitor = silent,
    negative: Prompt | None = None,
) -> TrajectoryDataset:
    """Record `prompts` into the dataset in `folder`, and go on where an earlier run stopped.

    A batch with missing records is computed whole and the missing ones are written, so the files
    are the same whether or not the work was interrupted. More samples per prompt, or more prompts,
    add batches and leave earlier ones alone: batches hold one sample number each, and never reach
    from one addition of prompts into the next (see `TrajectoryDataset.batches`). The monitor is
    called after every teacher step; when it raises, all finished batches are on the disk.
    `negative` is the prompt that classifier-free guidance points away from.

    Raises AccVideoError for impossible settings, for a folder that holds a dataset with other ones
    (then nothing is touched), for a state that is not finite, and for a full disk.
    """
    if not prompts:
        raise AccVideoError("no prompts were given; pass at least one")
    info = dataset_info(model, prompts, spec, negative)
    asked = guided(model, negative.condition if negative else None, info.cfg)
    dataset = TrajectoryDataset.create(folder, info)
    if negative is not None and info.negative:
        dataset.add_negative(negative)
    dataset.add_prompts(
        [Prompt(p.id, p.text, p.condition.with_guidance(info.guidance)) for p in prompts]
    )
    remove_leftovers(dataset.folder)
    batches = plan(dataset, prompts, spec.samples_per_prompt)
    tally = _Tally(monitor, len(info.time_grid) - 1, batches)
    for batch in batches:
        missing = [id for id in batch.ids(info.seed) if not dataset.has(id)]
        if missing:
            _record_batch(asked, dataset, batch, missing, partial(tally.step, batch))
        tally.finish(batch, computed=bool(missing))
    return dataset


def dataset_info(
    model: VideoModel,
    prompts: Sequence[Prompt],
    spec: RecordSpec,
    negative: Prompt | None = None,
) -> DatasetInfo:
    """The DatasetInfo of recording `prompts` from `model` as `spec` says."""
    grid = model.family.time_grid(spec.steps, spec.shift, (spec.height, spec.width))
    kept = spec.kept
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
        kept=key_indices(len(grid) - 1, kept) if isinstance(kept, int) else tuple(kept),
        guidance=_guidance(model, prompts, spec),
        cfg=cfg,
        negative=negative.id if negative and cfg else None,
        seed=spec.seed,
        batch_size=spec.batch_size,
        dtype=spec.dtype,
        versions={"accvideo": __version__, "torch": str(torch.__version__), **_diffusers()},
    )


def plan(dataset: TrajectoryDataset, prompts: Sequence[Prompt], samples: int) -> list[Batch]:
    """The batches that hold records of `prompts`: sample 0 of all of them, then sample 1, ..."""
    wanted = {prompt.id for prompt in prompts}
    groups = [ids for ids in dataset.batches() if wanted.intersection(ids)]
    return [Batch(sample, ids) for sample in range(samples) for ids in groups]


def rollout(
    model: VideoModel | Guided,
    info: DatasetInfo,
    prompts: Sequence[Prompt],
    sample: int,
    report: Report,
) -> Tensor:
    """The kept states [B, K, C, T, H, W] (CPU, storage dtype) of one batch.

    `report(step, preview)` is called after every Euler step. Raises AccVideoError naming prompt and
    step for a state that is not finite.
    """
    cond = Condition.cat([p.condition for p in prompts]).to(model.device, model.dtype)
    noise = torch.stack([seeded_noise(info.shape, info.seed, p.id, sample) for p in prompts])
    latest: list[Any] = []

    def velocity(x_t: Tensor, t: float) -> Tensor:
        v = model.velocity(x_t, t, cond)
        latest[:] = x_t, v, t
        return v

    kept: list[Tensor] = []
    for i, x_t in enumerate(euler_states(velocity, noise.to(model.device), info.time_grid)):
        _check_finite(x_t, prompts, i, "lower the guidance or run the teacher in float32")
        if i in info.kept:
            kept.append(x_t.to(DTYPES[info.dtype]).cpu())
            _check_finite(kept[-1], prompts, i, f"store in bfloat16 instead of {info.dtype}")
        if i > 0:
            report(i, partial(predict_x0, *latest))
    return torch.stack(kept, dim=1)


def _record_batch(
    model: VideoModel | Guided,
    dataset: TrajectoryDataset,
    batch: Batch,
    missing: Sequence[str],
    report: Report,
) -> None:
    """Compute one batch and write the records that are missing."""
    info = dataset.info
    prompts = [dataset.prompt(prompt_id) for prompt_id in batch.prompt_ids]
    latents = rollout(model, info, prompts, batch.sample, report)
    for id, prompt, states in zip(batch.ids(info.seed), prompts, latents, strict=True):
        if id in missing:
            dataset.write(Trajectory(id, states, info.times, info.seed, prompt.id, batch.sample))


@dataclass
class _Tally:
    """Counts what is done and tells the monitor."""

    monitor: Monitor
    steps: int
    batches: Sequence[Batch]
    batches_done: int = 0
    records_done: int = 0
    computed: float = 0.0
    preview: Preview | None = None
    start: float = field(default_factory=time.perf_counter)
    records_total: int = field(init=False)

    def __post_init__(self) -> None:
        self.records_total = sum(len(batch.prompt_ids) for batch in self.batches)

    def step(self, batch: Batch, step: int, preview: Preview) -> None:
        """Count a teacher step of a batch; the last one is reported once its records are stored."""
        self.preview = preview
        if step < self.steps:
            self._report(step, self.computed + len(batch.prompt_ids) * step / self.steps)

    def finish(self, batch: Batch, computed: bool) -> None:
        """Count a batch that is on the disk, now or from an earlier run."""
        self.batches_done += 1
        self.records_done += len(batch.prompt_ids)
        self.computed += len(batch.prompt_ids) if computed else 0
        if computed or self.batches_done == len(self.batches):
            self._report(0, self.computed)

    def _report(self, step: int, computed: float) -> None:
        elapsed = time.perf_counter() - self.start
        metrics = {
            "records_done": self.records_done,
            "records_total": self.records_total,
            "seconds_per_record": elapsed / computed if computed else 0.0,
        }
        done, total = self.batches_done * self.steps + step, len(self.batches) * self.steps
        self.monitor(Progress("record", done, total, metrics, self.preview))


def _guidance(model: VideoModel, prompts: Sequence[Prompt], spec: RecordSpec) -> float | None:
    """One embedded guidance for the whole dataset."""
    if spec.guidance is not None:
        return float(spec.guidance)
    carried = [p.condition.guidance for p in prompts]
    given = {float(g[0]) for g in carried if g is not None}
    if len(given) > 1:
        raise AccVideoError(
            f"the prompts carry different guidance {sorted(given)}; set one for the whole dataset"
        )
    return given.pop() if given else model.family.guidance


def _check_finite(states: Tensor, prompts: Sequence[Prompt], step: int, remedy: str) -> None:
    """Raise for the first record of the batch [B, ...] that is not finite."""
    if torch.isfinite(states).all():
        return
    for row, prompt in zip(states, prompts, strict=True):
        if not torch.isfinite(row).all():
            raise AccVideoError(
                f"the teacher's state after step {step} holds NaN or infinite values for prompt "
                f"{prompt.text or prompt.id!r}; {remedy}"
            )


def _diffusers() -> dict[str, str]:
    """The version of the library that runs the networks, where it is installed as a package."""
    try:
        return {"diffusers": metadata.version("diffusers")}
    except metadata.PackageNotFoundError:
        return {}

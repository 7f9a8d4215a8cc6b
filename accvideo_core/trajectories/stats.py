"""Figures of a trajectory and of a dataset: what was recorded, and whether it is what one wanted.

Shapes: K kept times, C channels, T latent frames, H, W latent size; frames are [N, F, H, W, 3] in
[0, 1], and there H and W count pixels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import AccVideoError
from ..flow import Times, predict_x0
from ..latents import key_generator
from ..monitor import Monitor, Progress, silent
from .listing import read_listing
from .store import Trajectory, TrajectoryDataset

Decode = Callable[[Tensor], Tensor]
"""Model-space latents [N, C, T, H, W] -> frames [N, F, H, W, 3] in [0, 1]."""

SAME_CLIP = 0.98
"""Cosine between two clips' final latents above which they count as the same clip."""


@dataclass(frozen=True, slots=True)
class RecordCurves:
    """How a trajectory goes from noise to data; one number for each step between kept states."""

    times: Times
    """The K kept times, from noise to data: the key times of students."""
    speed: tuple[float, ...]
    """Root mean square of the average velocity v over the step."""
    change: tuple[float, ...]
    """Root mean square of x_{k+1} - x_k."""
    cosine: tuple[float, ...]
    """Between the step's velocity and the whole displacement x_1 - x_0; 1 is a straight path."""
    bend: float
    """Mean over time of |x_1 - x_0 - v|^2, relative to |x_1 - x_0|^2: the straightness measure S
    of rectified flow (arXiv 2209.03003, Sec. 2.2), 0 for a straight path."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, spread and extremes of one figure over many clips."""

    mean: float
    std: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        x = torch.tensor(values, dtype=torch.float64)
        return cls(*(float(f) for f in (x.mean(), x.std(correction=0), x.min(), x.max())))


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """What a dataset holds; figures of clips are of `clips` records, drawn by its seed."""

    records: int
    prompts: int
    records_per_prompt: dict[int, int]
    """Number of records -> number of prompts that have so many."""
    words: tuple[int, ...]
    """Length of every prompt's text in words, rising."""
    characters: tuple[int, ...]
    """And in characters."""
    same_text: tuple[tuple[str, int], ...]
    """Texts that several prompts have, and how many."""
    bytes_total: int
    bytes_per_record: float
    bytes_per_state: float
    rounding: Spread | None
    """Relative error of storing in fewer bits, over the records that say it."""
    clips: int
    same_clip: tuple[tuple[str, str, float], ...] = ()
    """Pairs of records whose final latents are alike, with their cosine."""
    bend: Spread | None = None
    figures: dict[str, Spread] = field(default_factory=dict)
    """Motion energy of the latents; and of decoded clips motion energy, saturation, contrast."""

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


def record_curves(trajectory: Trajectory) -> RecordCurves:
    """Speed, change per step and straightness of one trajectory.

    Raises AccVideoError for one of fewer than two states.
    """
    x = trajectory.latents.float().flatten(1)
    if len(x) < 2:
        raise AccVideoError("a trajectory of one state has no way to look at; keep at least two")
    whole = x[0] - x[-1]  # x_1 - x_0
    speed, change, cosine, bend = [], [], [], 0.0
    span = trajectory.times[0] - trajectory.times[-1]
    for k, (t, t_next) in enumerate(pairwise(trajectory.times)):
        step = x[k] - x[k + 1]
        v = step / (t - t_next)
        speed.append(_rms(v))
        change.append(_rms(step))
        cosine.append(float(torch.cosine_similarity(step, whole, dim=0)))
        bend += (t - t_next) * float((whole / span - v).square().mean())
    relative = bend / span / max(float((whole / span).square().mean()), 1e-30)
    return RecordCurves(trajectory.times, tuple(speed), tuple(change), tuple(cosine), relative)


def predicted_clean(trajectory: Trajectory) -> Tensor:
    """x_0 = x_t - t v that each step points at, [K - 1, C, T, H, W], with its average velocity."""
    x, times = trajectory.latents.float(), trajectory.times
    steps = enumerate(pairwise(times))
    return torch.stack(
        [predict_x0(x[k], (x[k + 1] - x[k]) / (t_next - t), t) for k, (t, t_next) in steps]
    )


def dataset_stats(
    dataset: TrajectoryDataset,
    decode: Decode | None = None,
    samples: int = 64,
    monitor: Monitor = silent,
) -> DatasetStats:
    """Measure a dataset; of `samples` records the states are read, and decoded where `decode` is.

    The monitor is called after every one of those; it may raise.
    """
    headers = dataset.headers()
    if not headers:
        raise AccVideoError(f"dataset {dataset.folder.name!r} holds no records; record some first")
    listing = read_listing(dataset.folder)
    texts = [listing.texts.get(id, "") for id in listing.ids()]
    shared = Counter(text for text in texts if text)
    counts = Counter(header.prompt_id for header in headers)
    rounding = [header.rounding for header in headers if header.rounding is not None]
    total = sum(header.size for header in headers)
    chosen = _drawn([header.id for header in headers], samples, dataset.info.seed)
    finals, bends, figures = _measure(dataset, chosen, decode, monitor)
    return DatasetStats(
        records=len(headers),
        prompts=len(texts),
        records_per_prompt=dict(sorted(Counter(counts.values()).items())),
        words=tuple(sorted(len(text.split()) for text in texts)),
        characters=tuple(sorted(len(text) for text in texts)),
        same_text=tuple((text, count) for text, count in shared.most_common() if count > 1),
        bytes_total=total,
        bytes_per_record=total / len(headers),
        bytes_per_state=total / len(headers) / len(dataset.info.kept),
        rounding=Spread.of(rounding) if rounding else None,
        clips=len(chosen),
        same_clip=_alike(chosen, finals),
        bend=Spread.of(bends),
        figures={name: Spread.of(values) for name, values in figures.items()},
    )


def chosen_record(dataset: TrajectoryDataset, which: str | int) -> str:
    """A record's id, by the id itself or its beginning, its number from 0, or first or last."""
    ids = dataset.ids()
    if not ids:
        raise AccVideoError(f"dataset {dataset.folder.name!r} holds no records; record some first")
    text = {"first": "0", "last": str(len(ids) - 1)}.get(str(which), str(which))
    found = [id for id in ids if id.startswith(text)]
    if text in ids or (len(found) == 1 and len(text) >= 6):
        return found[0]
    if text.isdecimal() and int(text) < len(ids):
        return ids[int(text)]
    raise AccVideoError(
        f"dataset {dataset.folder.name!r} has no record {which!r}; give a number from 0 to "
        f"{len(ids) - 1}, or an id such as {ids[0]}"
    )


def saturation(frames: Tensor) -> Tensor:
    """Mean saturation of HSV, [N] of frames [N, F, H, W, 3]: 0 is grey, 1 a pure colour."""
    high, low = frames.amax(-1), frames.amin(-1)
    return ((high - low) / high.clamp_min(1e-6)).flatten(1).mean(1)


def contrast(frames: Tensor) -> Tensor:
    """Standard deviation of the luma (Rec. 601) within a frame, its mean over frames, [N]."""
    luma = frames @ frames.new_tensor([0.299, 0.587, 0.114])
    return luma.flatten(2).std(dim=2, correction=0).mean(1)


def _measure(
    dataset: TrajectoryDataset, chosen: Sequence[str], decode: Decode | None, monitor: Monitor
) -> tuple[Tensor, list[float], dict[str, list[float]]]:
    """Unit vectors of the final latents [N, D], bends, and figures of the clips."""
    finals, bends = [], []
    figures: dict[str, list[float]] = {"latent motion": []}
    for number, id in enumerate(chosen, start=1):
        trajectory = dataset.read(id)
        final = trajectory.latents[-1:].float()
        finals.append(torch.nn.functional.normalize(final.flatten(), dim=0))
        bends.append(record_curves(trajectory).bend)
        moved = final.diff(dim=2) if final.shape[2] > 1 else torch.zeros(1)
        figures["latent motion"].append(_rms(moved))
        if decode is not None:
            for name, value in _of_frames(decode(final)).items():
                figures.setdefault(name, []).append(value)
        monitor(Progress("measure", number, len(chosen)))
    return torch.stack(finals), bends, figures


def _of_frames(frames: Tensor) -> dict[str, float]:
    moved = frames.diff(dim=1) if frames.shape[1] > 1 else torch.zeros(1)
    return {
        "motion": _rms(moved),
        "saturation": float(saturation(frames)[0]),
        "contrast": float(contrast(frames)[0]),
    }


def _alike(ids: list[str], finals: Tensor) -> tuple[tuple[str, str, float], ...]:
    cosines = (finals @ finals.T).triu(diagonal=1)
    pairs: list[list[int]] = (cosines > SAME_CLIP).nonzero().tolist()
    return tuple((ids[i], ids[j], float(cosines[i, j])) for i, j in pairs)


def _drawn(ids: list[str], count: int, seed: int) -> list[str]:
    """`count` of the ids, the same for the same dataset, in their order."""
    generator = key_generator("stats", seed)
    order: list[int] = torch.randperm(len(ids), generator=generator).tolist()
    return [ids[i] for i in sorted(order[: max(1, count)])]


def _rms(x: Tensor) -> float:
    return math.sqrt(float(x.square().mean()))

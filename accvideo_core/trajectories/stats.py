"""Figures of a trajectory and of a dataset: what was recorded, and whether it is what one wanted.

Shapes: K kept times, C channels, T latent frames, H, W latent size; frames are [N, F, H, W, 3] in
[0, 1], and there H and W count pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AccVideoError
from ..files import append_lines, disk_errors, read_json
from ..flow import Times, predict_x0
from ..latents import key_generator
from ..monitor import Monitor, Progress, silent
from .claims import FOLDER as CLAIMS
from .listing import read_listing
from .store import Trajectory, TrajectoryDataset

Decode = Callable[[Tensor], Tensor]
"""Model-space latents [N, C, T, H, W] -> frames [N, F, H, W, 3] in [0, 1]."""

SAME_CLIP = 0.98
"""Cosine between two clips' final latents above which they count as the same clip."""

COMPARED = 4096
"""Elements of a final latent that are compared, drawn at random: the error of a cosine of 0.98 is
then below 0.001, and thousands of clips fit into memory."""


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
    missing: int
    """Records that were asked for and are not there."""
    skipped: dict[str, str]
    """Of those, the ones that the last recording could not make, by id, and why."""
    clips: int
    same_clip: tuple[tuple[str, str, float], ...] = ()
    """Pairs of records whose final latents are alike, with their cosine."""
    bend: Spread | None = None
    figures: dict[str, Spread] = field(default_factory=dict)
    """Motion energy of the latents; and of decoded clips motion energy, saturation, contrast.
    Motion energy is the mean absolute change from one frame to the next."""

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


def record_curves(trajectory: Trajectory) -> RecordCurves:
    """Speed, change per step and straightness of one trajectory.

    Raises AccVideoError for one of fewer than two states.
    """
    x = trajectory.latents.float().flatten(1)
    _check_states(len(x))
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
    """x_0 = x_t - t v that each step points at, [K - 1, C, T, H, W], with its average velocity.

    Raises AccVideoError for a trajectory of fewer than two states.
    """
    x, times = trajectory.latents.float(), trajectory.times
    _check_states(len(x))
    steps = enumerate(pairwise(times))
    return torch.stack(
        [predict_x0(x[k], (x[k + 1] - x[k]) / (t_next - t), t) for k, (t, t_next) in steps]
    )


def _check_states(count: int) -> None:
    if count < 2:
        raise AccVideoError(
            "a record of one state, as clips of ingested videos are, has no way from noise to data "
            "to look at; choose a recorded trajectory"
        )


def dataset_stats(
    dataset: TrajectoryDataset,
    decode: Decode | None = None,
    samples: int = 64,
    monitor: Monitor = silent,
    notes: Path | None = None,
) -> DatasetStats:
    """Measure a dataset.

    Args:
        decode: makes frames of latents, or None to measure latents alone.
        samples: records whose states are read, and decoded where `decode` is; drawn by the
            dataset's seed. Everything else is told by the headers of all records.
        monitor: called after every one of those; it may raise.
        notes: file that figures of decoded clips are added to one by one, and taken from where
            they are there already, so that interrupted work goes on.

    Raises:
        AccVideoError: there are no records, or one of them is damaged.
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
    clip = _noted(dataset, decode, notes) if decode else None
    finals, bends, figures = _measure(dataset, chosen, clip, monitor)
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
        missing=sum(max(0, (listing.samples or 0) - counts[id]) for id in listing.ids()),
        skipped=_skipped(dataset, {header.id for header in headers}),
        clips=len(chosen),
        same_clip=_alike(chosen, finals),
        bend=Spread.of(bends) if bends else None,
        figures={name: Spread.of(values) for name, values in figures.items()},
    )


def chosen_record(dataset: TrajectoryDataset, which: str | int) -> str:
    """A record's id, by id or its beginning, by number from 0, or "first", "last" or "random"."""
    ids = dataset.ids()
    if not ids:
        raise AccVideoError(f"dataset {dataset.folder.name!r} holds no records; record some first")
    if which == "random":
        generator = torch.Generator()
        generator.seed()  # from the system: another one each time
        return ids[int(torch.randint(len(ids), (), generator=generator))]
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


def dataset_key(dataset: TrajectoryDataset) -> str:
    """16 hex digits that follow from what a dataset's records have in common.

    With it a record's id names one clip among those of all datasets.
    """
    text = json.dumps(dataset.info.as_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_Figures = Callable[[str, Tensor], Mapping[str, float]]
"""Record id and its final latents [1, C, T, H, W] -> figures of the decoded clip."""


def _measure(
    dataset: TrajectoryDataset, chosen: Sequence[str], clip: _Figures | None, monitor: Monitor
) -> tuple[Tensor, list[float], dict[str, list[float]]]:
    """Unit vectors of elements of the final latents [N, D], bends, and figures of the clips."""
    size = math.prod(dataset.info.shape)
    generator = key_generator("compared", dataset.info.seed)
    compared = torch.randperm(size, generator=generator)[:COMPARED]
    finals, bends = [], []
    figures: dict[str, list[float]] = {"latent motion": []}
    for number, id in enumerate(chosen, start=1):
        trajectory = dataset.read(id)
        final = trajectory.latents[-1:].float()
        finals.append(torch.nn.functional.normalize(final.flatten()[compared], dim=0))
        if len(trajectory.times) > 1:
            bends.append(record_curves(trajectory).bend)
        figures["latent motion"].append(_motion(final, 2))
        for name, value in (clip(id, final) if clip else {}).items():
            figures.setdefault(name, []).append(value)
        monitor(Progress("measure", number, len(chosen)))
    return torch.stack(finals), bends, figures


def _noted(dataset: TrajectoryDataset, decode: Decode, path: Path | None) -> _Figures:
    """`_of_frames` of decoded clips, but for those that the file at `path` knows already."""
    key = dataset_key(dataset)
    known: dict[str, dict[str, float]] = {}
    if path is not None and path.exists():
        with disk_errors("read", path):
            lines = path.read_text(encoding="utf-8").splitlines()
        known = dict(_parsed(line, key) for line in lines)

    def figures(id: str, final: Tensor) -> dict[str, float]:
        if id not in known:
            known[id] = _of_frames(decode(final))
            if path is not None:
                line = json.dumps({"dataset": key, "id": id, "figures": known[id]})
                append_lines(path, line + "\n")
        return known[id]

    return figures


def _parsed(line: str, key: str) -> tuple[str, dict[str, float]]:
    """Id and figures of a line of notes; no id for a torn line or another dataset's."""
    try:
        note = json.loads(line)
        figures = {name: float(note["figures"][name]) for name in _FRAME_FIGURES}
        return (note["id"] if note["dataset"] == key else ""), figures
    except (ValueError, KeyError, TypeError):
        return "", {}


def _of_frames(frames: Tensor) -> dict[str, float]:
    return {name: measure(frames) for name, measure in _FRAME_FIGURES.items()}


_FRAME_FIGURES: dict[str, Callable[[Tensor], float]] = {
    "motion": lambda frames: _motion(frames, 1),
    "saturation": lambda frames: float(saturation(frames)[0]),
    "contrast": lambda frames: float(contrast(frames)[0]),
}


def _motion(x: Tensor, axis: int) -> float:
    """Mean absolute change along the frames' axis; 0 for a single frame."""
    return float(x.diff(dim=axis).abs().mean()) if x.shape[axis] > 1 else 0.0


def _alike(ids: list[str], finals: Tensor) -> tuple[tuple[str, str, float], ...]:
    pairs = []
    for i, row in enumerate(finals):
        cosines = finals[i + 1 :] @ row
        for j in (cosines > SAME_CLIP).nonzero().flatten().tolist():
            pairs.append((ids[i], ids[i + 1 + j], float(cosines[j])))
    return tuple(pairs)


def _skipped(dataset: TrajectoryDataset, there: set[str]) -> dict[str, str]:
    """Records that recorders left word of being unable to make, and that are still not there."""
    found: dict[str, str] = {}
    for path in sorted((dataset.folder / CLAIMS).glob("*.skipped")):
        try:
            found.update((str(id), str(reason)) for id, reason in read_json(path).items())
        except (AccVideoError, AttributeError):
            continue  # cleared away meanwhile, or torn: `missing` counts its records all the same
    return {id: reason for id, reason in found.items() if id not in there}


def _drawn(ids: list[str], count: int, seed: int) -> list[str]:
    """`count` of the ids, the same for the same dataset, in their order."""
    generator = key_generator("stats", seed)
    order: list[int] = torch.randperm(len(ids), generator=generator).tolist()
    return [ids[i] for i in sorted(order[: max(1, count)])]


def _rms(x: Tensor) -> float:
    return math.sqrt(float(x.square().mean()))

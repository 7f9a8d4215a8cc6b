"""The clips that a run is looked at by: which they are, and what is measured on them.

No teacher runs for them: a recorded trajectory begins with the teacher's own noise and ends with
its result, classifier-free guidance included. Real videos stand in the teacher's place where a
dataset holds them, and then noise is drawn.

Shapes: C channels, T latent frames, H, W latent size; decoded frames are [1, F, H, W, 3] in [0, 1],
and there H and W count pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditioning import Condition
from ..errors import AccVideoError
from ..evaluate import metrics
from ..flow import find_times
from ..latents import LatentSpec, seeded_noise
from ..trajectories.stats import Decode, contrast, saturation
from ..trajectories.store import TrajectoryDataset, record_id
from .student import StudentInfo

SHOWN = 256
"""Pixels of the longer side that frames are averaged down to for pictures and diversity, so that
all clips fit into memory at once."""

_LEAST = 1e-3
"""A teacher's figure below this (a quarter of an 8-bit level) is nothing to measure against."""

_SEARCHED = 1000
"""Records among which pairs of one prompt are looked for; each costs reading a header."""


@dataclass(frozen=True, slots=True, eq=False)
class FixedClip:
    """One recorded trajectory's two ends, on the CPU."""

    id: str
    prompt_id: str
    text: str
    noise: Tensor
    """[1, C, T, H, W]: what both start from."""
    result: Tensor
    """[1, C, T, H, W]: where the teacher arrived, or a real video."""
    cond: Condition


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """One clip as it was seen: its figures, and what clips are compared by."""

    figures: dict[str, float]
    picture: Tensor
    """uint8 [F, h, w, 3], or without a decoder the latents themselves."""


def fixed_clips(
    dataset: TrajectoryDataset, count: int, info: StudentInfo
) -> tuple[FixedClip, ...]:
    """`count` trajectories, the same for the same dataset: the first by id, in pairs of one prompt
    where the dataset has several samples of a prompt, because pairs tell diversity.

    Raises:
        AccVideoError: the dataset has no trajectories, or does not fit the student.
    """
    if dataset.info.teacher != info.base:
        raise AccVideoError(
            f"dataset {dataset.folder.name!r} was recorded with another teacher "
            f"({dataset.info.teacher_source}, {dataset.info.teacher}) than the student's "
            f"({info.base}); choose one of its own teacher to look at"
        )
    if dataset.info.guidance != info.guidance:
        raise AccVideoError(
            f"dataset {dataset.folder.name!r} was recorded with guidance {dataset.info.guidance}, "
            f"but the student learns guidance {info.guidance}; choose one recorded like its own"
        )
    ends = info.key_times[0], info.key_times[-1]
    drawn = len(dataset.info.times) == 1  # videos that no teacher made come from no noise
    try:
        rows = find_times(dataset.info.times, ends[1:] if drawn else ends)
    except AccVideoError as error:
        raise AccVideoError(
            f"dataset {dataset.folder.name!r} cannot be looked at: {error}; choose one that holds "
            "the first and the last state"
        ) from error
    clips = []
    for id in _chosen(dataset, count):
        trajectory = dataset.read(id)
        prompt = dataset.prompt(trajectory.prompt_id)
        states = trajectory.latents[rows].float()
        # The sampler scales unit noise to its first time, as the recorder did.
        noise = seeded_noise(states.shape[1:], "look", id)[None] if drawn else states[:1] / ends[0]
        cond = prompt.condition.with_guidance(info.guidance)
        clips.append(FixedClip(id, prompt.id, prompt.text, noise, states[-1:], cond))
    return tuple(clips)


def digest(clips: Sequence[FixedClip], decoded: bool) -> str:
    """Names what is looked at; figures of looks with equal digests can be compared."""
    text = " ".join(["decoded" if decoded else "latents", *(clip.id for clip in clips)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pairs_of(clips: Sequence[FixedClip]) -> list[tuple[int, int]]:
    """Positions of clips that share a prompt and stand next to one another."""
    return [
        (i, i + 1)
        for i in range(len(clips) - 1)
        if clips[i].prompt_id == clips[i + 1].prompt_id
        and (i == 0 or clips[i - 1].prompt_id != clips[i].prompt_id)
    ]


def see(latents: Tensor, frames: int, spec: LatentSpec, decode: Decode | None) -> Seen:
    """Measure one clip [1, C, T, H, W] of `frames` frames; without a decoder as latents.

    Raises:
        AccVideoError: the decoder gives NaN.
    """
    x = spec.crop(latents, frames)
    if decode is None:
        moved = x.float().diff(dim=2).abs()
        return Seen({"motion": float(moved.mean()) if moved.numel() else 0.0}, x[0].cpu())
    video = decode(x).float().cpu()
    if not torch.isfinite(video).all():
        raise AccVideoError(
            "the VAE decodes finite latents to NaN or infinite frames; load it in bfloat16 or "
            "float32"
        )
    figures = {
        "motion": metrics.motion_energy(video),
        "saturation": saturation(video),
        "contrast": contrast(video),
    }
    return Seen({name: float(value[0]) for name, value in figures.items()}, _small(video))


def relative(
    students: Sequence[Seen], teachers: Sequence[Seen], pairs: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """The student's mean figures over the teacher's; 1 is "as the teacher".

    What the teacher's clips hardly have (motion of a still, colour of a grey clip) is left out.
    """
    mine, theirs = _means(students, pairs), _means(teachers, pairs)
    return {name: mine[name] / theirs[name] for name in mine if theirs[name] >= _LEAST}


def _means(seen: Sequence[Seen], pairs: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Mean of every figure over clips, and diversity over pairs."""
    means = {
        name: sum(one.figures[name] for one in seen) / len(seen) for name in seen[0].figures
    }
    if pairs:
        apart = [metrics.diversity(_values([seen[i], seen[j]]), 2) for i, j in pairs]
        means["diversity"] = float(torch.cat(apart).mean())
    return means


def _values(seen: Sequence[Seen]) -> Tensor:
    """Pictures or latents of clips as one float tensor."""
    stacked = torch.stack([one.picture for one in seen])
    return stacked.float() / 255 if stacked.dtype == torch.uint8 else stacked.float()


def _small(video: Tensor) -> Tensor:
    """[1, F, H, W, 3] -> uint8 [F, h, w, 3], whose longer side is at most `SHOWN`."""
    factor = -(-max(video.shape[2:4]) // SHOWN)
    if factor > 1:
        planes = F.avg_pool2d(video[0].permute(0, 3, 1, 2), factor, ceil_mode=True)
        video = planes.permute(0, 2, 3, 1)[None]
    return (video[0].clamp(0, 1) * 255).round().to(torch.uint8)


def _chosen(dataset: TrajectoryDataset, count: int) -> list[str]:
    ids = dataset.ids()
    if not ids:
        raise AccVideoError(
            f"dataset {dataset.folder.name!r} holds no trajectories to look at; record some first"
        )
    paired: list[str] = []
    most = dataset.samples_per_prompt
    for id in islice(ids, _SEARCHED if most > 1 else 0):
        if len(paired) + 2 > count:
            break
        partner = None if id in paired else _partner(dataset, id, most)
        if partner is not None and partner not in paired:
            paired += sorted((id, partner))
    rest = (id for id in ids if id not in paired)
    return [*paired, *islice(rest, count - len(paired))]


def _partner(dataset: TrajectoryDataset, id: str, most: int) -> str | None:
    """Another recorded sample of the same prompt."""
    own, seed = dataset.header(id), dataset.info.seed
    others = (record_id(seed, own.prompt_id, n) for n in range(most) if n != own.sample)
    return next((other for other in others if dataset.has(other)), None)

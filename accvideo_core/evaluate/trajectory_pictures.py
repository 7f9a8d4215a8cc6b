"""What a recorded trajectory looks like: its states, where they point, and how it moves.

Shapes: K kept times, C channels, T latent frames, H, W; frames are [N, F, H, W, 3] in [0, 1].
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files import write_bytes, write_json
from ..flow import Times
from ..monitor import Monitor, Progress, silent
from ..trajectories.stats import Decode, RecordCurves, predicted_clean, record_curves
from .pictures import contact_sheet, panels

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..trajectories.store import Trajectory, TrajectoryDataset

TRAJECTORY = "this trajectory; upright lines are its kept times, noise is at t = 1"


def record_sheet(
    trajectory: Trajectory,
    decode: Decode,
    *,
    frames: int = 4,
    size: int = 96,
    monitor: Monitor = silent,
) -> Image:
    """Decoded states from noise to data, and beside each the clean clip that its step points at.

    The last state points nowhere any more and is shown itself. The monitor is called after every
    clip that is decoded; it may raise.
    """
    states = trajectory.latents.float()
    latents = torch.cat([states, predicted_clean(trajectory)])
    shown = []
    for number, x in enumerate(latents, start=1):
        # Whole clips of a large model would not fit into memory side by side.
        shown.append(_few_frames(decode(x[None]), frames))
        monitor(Progress("decode", number, len(latents)))
    count = len(states)
    clips = {
        "state": torch.cat(shown[:count]),
        "predicted clean clip": torch.cat([*shown[count:], shown[count - 1]]),
    }
    captions = [f"t = {t:.4f}" for t in trajectory.times]
    return contact_sheet(clips, captions, frames_per_clip=frames, frame_size=size)


def record_plot(curves: RecordCurves, grid: Times | None = None) -> Image:
    """Speed, change per step and straightness against time; upright lines are the kept times.

    Each figure is one of a whole step between kept states, and drawn as wide as the step is.
    `grid` are the times of all of the teacher's steps, for a panel of where the kept ones fall.
    """
    steps = list(pairwise(reversed(curves.times)))
    headings = {
        "|v|, root mean square, by time t": curves.speed,
        "change per step, root mean square, by time t": curves.change,
        "cosine between step and straight path, by time t": curves.cosine,
    }
    lines = {
        heading: {
            TRAJECTORY: [
                (t, value)
                for step, value in zip(steps, reversed(values), strict=True)
                for t in step
            ]
        }
        for heading, values in headings.items()
    }
    if grid is not None:
        numbers = sorted((t, float(number)) for number, t in enumerate(grid))
        lines["number of the teacher's step, by time t"] = {TRAJECTORY: numbers}
    return panels(lines, [TRAJECTORY], curves.times, smooth=False)


def record_facts(trajectory: Trajectory, curves: RecordCurves, text: str = "") -> str:
    """A record in words, one fact a line."""

    def listed(values: Sequence[float], digits: int) -> str:
        return ", ".join(f"{value:.{digits}f}" for value in values)

    return "\n".join(
        [
            f"record {trajectory.id}, sample {trajectory.sample}",
            f"prompt: {text or 'not known'}",
            f"kept times: {listed(curves.times, 4)}",
            f"|v| of the steps: {listed(curves.speed, 3)}",
            f"change per step: {listed(curves.change, 3)}",
            f"cosine to the straight path: {listed(curves.cosine, 3)}",
            f"bend: {curves.bend:.4f} (0 is a straight path)",
        ]
    )


def write_record(
    dataset: TrajectoryDataset,
    trajectory: Trajectory,
    folder: Path,
    decode: Decode | None,
    monitor: Monitor = silent,
) -> list[Path]:
    """`curves.png`, `curves.json` and, where states can be decoded, `states.png` in `folder`."""
    curves, grid = record_curves(trajectory), dataset.info.time_grid
    text = dataset.prompt(trajectory.prompt_id).text
    told = {"id": trajectory.id, "prompt": text, "sample": trajectory.sample, **asdict(curves)}
    write_json(folder / "curves.json", {**told, "kept": dataset.info.kept, "time_grid": grid})
    pictures = {"curves.png": record_plot(curves, grid)}
    if decode is not None:
        pictures["states.png"] = record_sheet(trajectory, decode, monitor=monitor)
    for name, picture in pictures.items():
        write_bytes(folder / name, _png(picture))
    return [folder / name for name in ("curves.json", *pictures)]


def _few_frames(clip: Tensor, count: int) -> Tensor:
    """[1, F, H, W, 3] -> `count` of the frames, evenly from the first to the last."""
    length = clip.shape[1]
    return clip[:, torch.linspace(0, length - 1, min(count, length)).round().long()]


def _png(picture: Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()

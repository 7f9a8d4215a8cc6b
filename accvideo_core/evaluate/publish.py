"""A comparison as files: report.json, table.txt, a contact sheet, loss curves and MP4s."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..files import replacing, write_bytes, write_json
from ..video import side_by_side, write_video
from .pictures import contact_sheet, loss_curves
from .report import Report

_CLIP_SIZE = 128  # pixels that small clips are enlarged to


def publish(
    report: Report, folder: Path, *, curves: Mapping[str, Path] | None = None, fps: float = 8
) -> list[Path]:
    """Write everything about a comparison into `folder` and return the files' paths.

    Args:
        report: what `compare` returned.
        folder: made when missing; files of the same name are replaced.
        curves: label -> metrics.jsonl of the runs whose losses are to be drawn.
        fps: frames per second of the clips.
    """
    folder = Path(folder)
    paths = [folder / "report.json", folder / "table.txt"]
    write_json(paths[0], report.as_dict())
    write_bytes(paths[1], (report.table() + "\n").encode())
    shown = {name: x.shown for name, x in report.measured.items() if x.shown is not None}
    generated = {name: x for name, x in shown.items() if report.measured[name].steps is not None}
    pictures = {}
    if generated:
        prompts = report.prompts[: len(next(iter(generated.values())))]
        pictures["contact_sheet.png"] = contact_sheet(generated, prompts)
    if curves:
        pictures["loss_curves.png"] = loss_curves(curves)
    for name, picture in pictures.items():
        paths.append(folder / name)
        with replacing(paths[-1]) as temp:
            picture.save(temp, format="PNG")
    strips = {name: side_by_side(list(clips)) for name, clips in generated.items()}
    for name, frames in strips.items():
        paths.append(write_video(folder / f"{file_name(name)}.mp4", frames, fps, _scale(shown)))
    if strips:
        together = _stack(list(strips.values()))
        paths.append(write_video(folder / "together.mp4", together, fps, _scale(shown)))
    return paths


def file_name(contender: str) -> str:
    """A contender's name as a file name: "teacher@50" becomes "teacher_50"."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", contender).strip("_.") or "clip"


def _scale(shown: Mapping[str, Tensor]) -> int:
    return max(1, _CLIP_SIZE // next(iter(shown.values())).shape[2])


def _stack(strips: list[Tensor], gap: int = 2) -> Tensor:
    """Strips [T, H, W, 3] under one another."""
    turned = [strip.transpose(1, 2) for strip in strips]
    return side_by_side(turned, gap).transpose(1, 2)

"""A look as pictures: the teacher's clips beside the student's, moving and as a contact sheet.

Shapes: N clips, F frames, h, w pixels, 3 colours; all uint8.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..evaluate.pictures import contact_sheet
from ..files import write_bytes
from ..video import side_by_side, write_video

SECONDS = 5
"""How long a sample plays: about what the published models' clips last, whose frame rate a dataset
does not tell."""

_LEAST_RATE = 8.0
_LEAST_SIZE = 128
"""Small frames are enlarged by whole numbers to at least about this many pixels."""

_FRAMES = 4
"""Frames of a clip on the contact sheet."""

_GAP = 4
_BAR = 20
"""Height in pixels of the bar above a pair of clips that says which is whose."""


def write_look(
    folder: Path,
    step: int,
    teachers: Sequence[Tensor],
    students: Sequence[Tensor],
    captions: Sequence[str],
) -> Path:
    """`<step>.mp4` and `<step>.png` in `folder`, each whole or not at all; returns the sheet.

    Args:
        teachers, students: N clips [F, h, w, 3] each, in the order of `captions`.
    """
    names = ("teacher", f"student, update {step}")
    moving = _montage(teachers, students, names)
    rate = max(_LEAST_RATE, len(moving) / SECONDS)
    write_video(folder / f"{step:08d}.mp4", moving, rate)
    shown = dict(zip(names, (_stills(teachers), _stills(students)), strict=True))
    longer = max(teachers[0].shape[1:3])
    size = longer * max(1, _LEAST_SIZE // longer)
    sheet = contact_sheet(shown, captions, frames_per_clip=_FRAMES, frame_size=size)
    data = io.BytesIO()
    sheet.save(data, "PNG")
    path = folder / f"{step:08d}.png"
    write_bytes(path, data.getvalue())
    return path


def _montage(
    teachers: Sequence[Tensor], students: Sequence[Tensor], names: Sequence[str]
) -> Tensor:
    """[F, H, W, 3]: teacher and student next to one another, two such pairs in a row."""
    scale = max(1, _LEAST_SIZE // max(teachers[0].shape[1:3]))
    pairs = []
    for pair in zip(teachers, students, strict=True):
        large = [x.repeat_interleave(scale, 1).repeat_interleave(scale, 2) for x in pair]
        bar = _bar(large[0].shape[2], names).expand(len(large[0]), -1, -1, -1)
        pairs.append(torch.cat([bar, side_by_side(large, _GAP)], dim=1))
    if len(pairs) % 2 and len(pairs) > 1:
        pairs.append(torch.full_like(pairs[0], 255))
    columns = min(2, len(pairs))
    rows = [
        side_by_side(pairs[i : i + columns], 4 * _GAP).transpose(1, 2)
        for i in range(0, len(pairs), columns)
    ]
    return side_by_side(rows, _GAP).transpose(1, 2)


def _bar(width: int, names: Sequence[str]) -> Tensor:
    """[1, _BAR, W, 3]: the names above clips that are `width` pixels wide."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (len(names) * (width + _GAP) - _GAP, _BAR), "white")
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        font = ImageFont.load_default(12)
        draw.text((i * (width + _GAP) + 3, 2), name, fill=(30, 30, 30), font=font)
    return torch.from_numpy(np.array(image))[None]


def _stills(clips: Sequence[Tensor]) -> Tensor:
    """[N, _FRAMES, h, w, 3] float: frames from the first to the last, evenly."""
    length = len(clips[0])
    chosen = torch.linspace(0, length - 1, min(_FRAMES, length)).round().long()
    return torch.stack([clip[chosen] for clip in clips]).float() / 255

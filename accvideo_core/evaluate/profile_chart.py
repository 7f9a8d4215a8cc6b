"""A profile as a picture: when what ran, and how near it came to what the device can do.

Drawn with Pillow alone, at twice the size and reduced, which smooths edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..profiling.report import GROUPS, Part, Profile
from .pictures import COLOURS, INK, PALE, fitted, round_ticks, text_font

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

Box = tuple[float, float, float, float]
Colour = tuple[int, ...]

_WIDTH, _MARGIN, _LABEL, _FIGURES = 2200, 40, 300, 380
_LANE, _GAP = 64, 20
_BAR = 30


def profile_chart(profile: Profile) -> Image:
    """Above a lane of time for each group; below, for what computes, bars of its share of the peak.

    In a lane, parts of one name have one colour. A part whose pieces lie apart, such as the
    solver's within a step, is drawn in one piece where the first begins.
    """
    from PIL import Image, ImageDraw

    groups = [group for group in GROUPS if profile.of_group(group)]
    kinds = _kinds(profile)
    top = 150
    middle = top + len(groups) * (_LANE + _GAP) + 110
    height = middle + len(kinds) * (2 * _BAR + _GAP) + 90
    sheet = Image.new("RGB", (_WIDTH, height), "white")
    draw = ImageDraw.Draw(sheet)
    _heading(draw, profile)
    _lanes(draw, profile, groups, top)
    _shares(draw, profile, kinds, middle)
    return sheet.resize((_WIDTH // 2, height // 2), Image.Resampling.LANCZOS)


def _heading(draw: ImageDraw, profile: Profile) -> None:
    text = f"{profile.what}: {profile.seconds:.3g} s"
    draw.text((_MARGIN, 30), _cut(draw, text, 34), fill=INK, font=text_font(34))
    memory = f"; at most {profile.memory / 1e9:.1f} GB of tensors" if profile.memory else ""
    under = f"{profile.peaks.device}, {profile.peaks.dtype}{memory}"
    draw.text((_MARGIN, 80), _cut(draw, under, 26), fill=INK, font=text_font(26))


def _cut(draw: ImageDraw, text: str, size: int) -> str:
    return fitted(draw, text, text_font(size), _WIDTH - 2 * _MARGIN)


def _lanes(draw: ImageDraw, profile: Profile, groups: Sequence[str], top: int) -> None:
    left, right = _MARGIN + _LABEL, _WIDTH - _MARGIN - _FIGURES
    scale = (right - left) / profile.seconds
    bottom = top + len(groups) * (_LANE + _GAP)
    for tick in round_ticks(0, profile.seconds, 8):
        x = left + tick * scale
        draw.line([(x, top - 8), (x, bottom)], fill=PALE, width=2)
        draw.text((x, bottom + 6), f"{tick:g} s", fill=INK, font=text_font(24), anchor="ma")
    for row, group in enumerate(groups):
        y = top + row * (_LANE + _GAP)
        parts, took = profile.of_group(group), profile.seconds_of(group)
        names = list(dict.fromkeys(part.name for part in parts))
        draw.text((left - 20, y + _LANE / 2), group, fill=INK, font=text_font(28), anchor="rm")
        for part in parts:
            x = left + part.start * scale
            box = (x, y, max(x + part.seconds * scale, x + 2), y + _LANE)
            colour = _shade(GROUPS.index(group), names.index(part.name))
            draw.rectangle(box, fill=colour, outline="white" if box[2] - x > 6 else None)
        figures = f"{took:.3g} s, {took / profile.seconds:.1%}"
        draw.text((right + 20, y + _LANE / 2), figures, fill=INK, font=text_font(28), anchor="lm")


def _kinds(profile: Profile) -> dict[tuple[str, str], list[Part]]:
    """(group, name) -> the parts whose operations are known."""
    kinds: dict[tuple[str, str], list[Part]] = {}
    for part in profile.parts:
        if part.flops:
            kinds.setdefault((part.group, part.name), []).append(part)
    return kinds


def _shares(
    draw: ImageDraw, profile: Profile, kinds: dict[tuple[str, str], list[Part]], top: int
) -> None:
    """Two bars for each kind, of operations and of bytes; the frame's right edge is the peak."""
    left, right = _MARGIN + _LABEL, _WIDTH - _MARGIN - _FIGURES
    note = "share of the measured peak: operations (dark) and bytes (light)"
    draw.text((left, top - 50), note, fill=INK, font=text_font(26))
    y = top
    for (group, name), parts in kinds.items():
        label = fitted(draw, name, text_font(26), _LABEL - 20)
        draw.text((left - 20, y + _BAR), label, fill=INK, font=text_font(26), anchor="rm")
        shares = (profile.flops_share(parts) or 0, profile.bytes_share(parts) or 0)
        for row, share in enumerate(shares):
            box = (left, y + row * _BAR, right, y + (row + 1) * _BAR - 2)
            colour = _shade(GROUPS.index(group), row)
            _bar(draw, box, share, colour)
        y += 2 * _BAR + _GAP


def _bar(draw: ImageDraw, box: Box, share: float, colour: Colour) -> None:
    x0, y0, x1, y1 = box
    draw.rectangle(box, fill=PALE)
    draw.rectangle((x0, y0, x0 + max(2.0, min(1.0, share) * (x1 - x0)), y1), fill=colour)
    draw.text((x1 + 20, (y0 + y1) / 2), f"{share:.1%}", fill=INK, font=text_font(24), anchor="lm")


def _shade(index: int, step: int) -> Colour:
    """The colour of a group, lighter for its further kinds."""
    light = min(0.6, 0.3 * step)
    return tuple(round(c + (255 - c) * light) for c in COLOURS[index])

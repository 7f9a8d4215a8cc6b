"""Pictures of a comparison: a contact sheet of clips, and loss curves. Drawn with Pillow alone.

Shapes: N clips, T frames, H, W pixels, 3 colours in [0, 1].
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import AccVideoError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

INK = (30, 30, 30)
PALE = (225, 225, 225)
_MARK = (240, 196, 140)
COLOURS = (
    (31, 119, 180),
    (214, 39, 40),
    (44, 160, 44),
    (255, 127, 14),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (90, 90, 90),
    (188, 189, 34),
    (23, 190, 207),
)
TERMS = ("trajectory", "generator", "discriminator")
"""Terms of our objectives as metrics name them, in the order in which they are drawn."""
_MARGIN = 12
Line = list[tuple[float, float]]
_GAP = 3  # pixels between the frames of a clip


def contact_sheet(
    clips: Mapping[str, Tensor],
    prompts: Sequence[str],
    *,
    frames_per_clip: int = 4,
    frame_size: int = 64,
) -> Image:
    """A sheet of clips: one row for each prompt, one group of columns for each contender.

    Args:
        clips: contender name -> frames [N, T, H, W, 3], the same N for all.
        prompts: N captions.
        frames_per_clip: frames shown of a clip, evenly spread from the first to the last.
        frame_size: pixels of a frame's longer side; small frames are enlarged by whole numbers.
    """
    from PIL import Image, ImageDraw

    _check_clips(clips, prompts)
    strips = {name: _strips(x, frames_per_clip, frame_size) for name, x in clips.items()}
    height, width = next(iter(strips.values())).shape[1:3]
    font, label = text_font(15), 190
    top = _MARGIN + 26
    wide = 2 * _MARGIN + label + len(strips) * (width + 2 * _MARGIN) - 2 * _MARGIN
    tall = top + len(prompts) * (height + _MARGIN)
    sheet = Image.new("RGB", (wide, tall), "white")
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(prompts):
        y = top + row * (height + _MARGIN)
        text = "\n".join(textwrap.wrap(prompt, 24)[: max(1, height // 19)])
        draw.multiline_text((_MARGIN, y), text, fill=INK, font=font)
    for column, (name, images) in enumerate(strips.items()):
        x = _MARGIN + label + column * (width + 2 * _MARGIN)
        draw.text((x, _MARGIN), fitted(draw, name, font, width), fill=INK, font=font)
        for row, image in enumerate(images):
            sheet.paste(Image.fromarray(image.numpy()), (x, top + row * (height + _MARGIN)))
    return sheet


def loss_curves(
    runs: Mapping[str, Path] | Sequence[Path], *, keys: Sequence[str] | None = None
) -> Image:
    """Panels of training losses, one for each key, one line for each run.

    The pale line is what was measured, the strong one its running mean. The axis is logarithmic
    where all values are positive and span more than a factor of two.

    Args:
        runs: label -> `metrics.jsonl` (one JSON object a line, with "step"); files without a label
            are called like their folder.
        keys: which figures to draw; None draws the terms of our objectives, or, where there are
            none, whatever has "loss" in its name.

    Raises:
        AccVideoError: a file is missing or holds no figures of that name.
    """
    named = runs if isinstance(runs, Mapping) else {path.parent.name: path for path in runs}
    series = {label: _read_metrics(Path(path)) for label, path in named.items()}
    found = sorted({key for figures in series.values() for key in figures})
    terms = [key for key in TERMS if key in found] or [key for key in found if "loss" in key]
    chosen = terms if keys is None else list(keys)
    missing = [key for key in chosen if key not in found]
    if missing or not chosen:
        raise AccVideoError(
            f"the metrics hold no {', '.join(missing) or 'loss'} to draw; "
            f"they hold {', '.join(found) or 'nothing'}"
        )
    return panels(
        {
            f"{key if 'loss' in key else f'{key} loss'} by step": {
                label: figures[key] for label, figures in series.items() if key in figures
            }
            for key in chosen
        },
        list(series),
    )


def panels(
    figures: Mapping[str, Mapping[str, Line]],
    labels: Sequence[str],
    marks: Sequence[float] = (),
    smooth: bool = True,
) -> Image:
    """Panels of lines, two beside one another, and one legend for all of them.

    Args:
        figures: heading -> label -> points (x, y).
        labels: of the legend, which gives each its colour.
        marks: places on the x axis that every panel shows as upright lines.
        smooth: draw a line of 40 points and more pale, and its running mean over it.
    """
    from PIL import Image, ImageDraw

    columns = min(2, len(figures))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    places, header = _legend(labels, _PANEL[0] * columns)
    size = (_PANEL[0] * columns, header + _PANEL[1] * -(-len(figures) // columns))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for label, (x, y) in places.items():
        draw.line([(x, y), (x + 40, y)], fill=colours[label], width=8)
        draw.text((x + 52, y), label, fill=INK, font=text_font(26), anchor="lm")
    for i, (heading, lines) in enumerate(figures.items()):
        corner = (_PANEL[0] * (i % columns), header + _PANEL[1] * (i // columns))
        _Panel.around(lines, corner, marks).draw(draw, heading, lines, colours, marks, smooth)
    return sheet.resize((size[0] // 2, size[1] // 2), Image.Resampling.LANCZOS)


# Curves are drawn at twice the size and reduced, which smooths them.
_PANEL = (1120, 600)
_POINTS = 1000
"""As many places along a line as a panel can show."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """Axes of one panel: the ranges of the data, and the box of pixels inside the labels."""

    left: float
    right: float
    low: float
    high: float
    log: bool
    box: tuple[int, int, int, int]  # x0, y0, x1, y1

    @classmethod
    def around(
        cls, lines: Mapping[str, Line], corner: tuple[int, int], marks: Sequence[float] = ()
    ) -> _Panel:
        steps = [*marks, *(step for line in lines.values() for step, _ in line)]
        values = [value for line in lines.values() for _, value in line]
        low, high = min(values), max(values)
        log = low > 0 and high > 2 * low
        room = (high / low) ** 0.05 if log else (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        low, high = (low / room, high * room) if log else (low - room, high + room)
        x, y = corner
        box = (x + 132, y + 48, x + _PANEL[0] - 32, y + _PANEL[1] - 56)
        right = max(steps) if max(steps) > min(steps) else min(steps) + 1
        return cls(min(steps), right, low, high, log, box)

    def point(self, step: float, value: float) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        scale = math.log if self.log else float
        across = (step - self.left) / (self.right - self.left)
        up = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return x0 + across * (x1 - x0), y1 - up * (y1 - y0)

    def draw(
        self,
        draw: ImageDraw,
        title: str,
        lines: Mapping[str, Line],
        colours: Mapping[str, tuple[int, int, int]],
        marks: Sequence[float] = (),
        smooth: bool = True,
    ) -> None:
        small = text_font(24)
        x0, y0, x1, y1 = self.box
        for value in self._ticks():
            y = self.point(self.left, value)[1]
            draw.line([(x0, y), (x1, y)], fill=PALE, width=2)
            draw.text((x0 - 12, y), f"{value:.3g}", fill=INK, font=small, anchor="rm")
        whole = self.right - self.left >= 2  # steps have no fractions, times do
        for step in round_ticks(self.left, self.right, 5):
            if whole and step != round(step):
                continue
            x = self.point(step, self.low)[0]
            draw.text((x, y1 + 10), f"{step:g}", fill=INK, font=small, anchor="ma")
        draw.rectangle(self.box, outline=(150, 150, 150), width=2)
        draw.text((x0, y0 - 40), title, fill=INK, font=text_font(28))
        for x in (self.point(mark, self.low)[0] for mark in marks):
            draw.line([(x, y0), (x, y1)], fill=_MARK, width=3)
        for label, line in lines.items():
            self._curve(draw, _envelope(line), tuple(200 + c // 5 for c in colours[label]), 2)
        for label, line in lines.items():
            self._curve(draw, _smooth(line) if smooth else line, colours[label], 4)

    def _curve(self, draw: ImageDraw, line: Line, colour: tuple[int, ...], width: int) -> None:
        points = [self.point(step, value) for step, value in line]
        if len(points) == 1:
            x, y = points[0]
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
        draw.line(points, fill=colour, width=width)

    def _ticks(self) -> list[float]:
        if not self.log:
            return round_ticks(self.low, self.high, 5)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        ticks: list[float] = []
        for marks in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            ticks = [m * 10.0**d for d in decades for m in marks]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(ticks) >= 3:
                break
        return ticks


def _legend(labels: Sequence[str], width: int) -> tuple[dict[str, tuple[float, float]], int]:
    """Where each label of the legend stands, and the legend's height."""
    font, x, y = text_font(26), 40.0, 32.0
    places = {}
    for label in labels:
        needed = 92 + font.getlength(label)
        if x + needed > width and x > 40:
            x, y = 40.0, y + 44
        places[label] = (x, y)
        x += needed
    return places, round(y) + 28


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between `low` and `high`, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _smooth(line: Line) -> Line:
    """Running mean over a centred window of a twentieth of the line, at `_POINTS` places."""
    reach = len(line) // 40
    values = [value for _, value in line]
    means = []
    for i in range(0, len(line), -(-len(line) // _POINTS)):
        window = values[max(0, i - reach) : i + reach + 1]
        means.append((line[i][0], sum(window) / len(window)))
    return means


def _envelope(line: Line) -> Line:
    """Of a long line the lowest and the highest point of every stretch, which look the same."""
    stretch = -(-len(line) // _POINTS)
    if stretch <= 2:
        return line
    points = []
    for i in range(0, len(line), stretch):
        part = line[i : i + stretch]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        points += sorted(ends)
    return points


def _read_metrics(path: Path) -> dict[str, Line]:
    """Finite figures of a `metrics.jsonl` by key, by step; a torn line is left out."""
    if not path.is_file():
        raise AccVideoError(f"there is no metrics file {path}; name the metrics.jsonl of a run")
    figures: dict[str, dict[float, float]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            continue
        if not isinstance(row, dict) or "step" not in row:
            continue
        for key, value in row.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if key != "step" and is_number and math.isfinite(value):
                figures.setdefault(key, {})[row["step"]] = float(value)
    return {key: sorted(line.items()) for key, line in figures.items()}


def _strips(frames: Tensor, count: int, frame_size: int) -> Tensor:
    """uint8 [N, H', W', 3]: `count` frames of each clip next to one another."""
    length, height, width = frames.shape[1:4]
    chosen = torch.linspace(0, length - 1, min(count, length)).round().long()
    shown = (frames[:, chosen].float().clamp(0, 1) * 255).round().to(torch.uint8)
    longer = max(height, width)
    if longer <= frame_size:
        shown = shown.repeat_interleave(frame_size // longer, 2)
        shown = shown.repeat_interleave(frame_size // longer, 3)
    else:
        stride = -(-longer // frame_size)
        shown = shown[:, :, ::stride, ::stride]
    white = torch.full((*shown.shape[:1], shown.shape[2], _GAP, 3), 255, dtype=torch.uint8)
    parts = [part for i in range(shown.shape[1]) for part in (white, shown[:, i])][1:]
    return torch.cat(parts, dim=2).contiguous()


def _check_clips(clips: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
    if not clips or not prompts:
        raise AccVideoError("a contact sheet needs at least one contender and one prompt")
    shape = next(iter(clips.values())).shape
    for name, frames in clips.items():
        if frames.dim() != 5 or frames.shape != shape or len(frames) != len(prompts):
            raise AccVideoError(
                f"clips of {name} have shape {tuple(frames.shape)}; a sheet of {len(prompts)} "
                f"prompts needs [{len(prompts)}, T, H, W, 3], the same for every contender"
            )


def text_font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def fitted(draw: ImageDraw, text: str, font: FreeTypeFont | ImageFont, width: int) -> str:
    """`text`, cut to `width` pixels."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."

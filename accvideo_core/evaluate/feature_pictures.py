"""Figure 5 of AccVideo as picture and figures: a row for each key time, a column for each block.

Shapes: K key times; F' frames of H, W pixels; F latent frames shown; h, w token grid.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import AccVideoError
from ..files import write_bytes, write_json
from .features import FeatureMap
from .pictures import INK, text_font

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

_CELL = 128  # pixels of a map's longer side
_LABEL, _HEAD, _NOTE, _GAP = 96, 34, 24, 14
_TAPPED = (214, 39, 40)
_EXPLAINED = (
    "colours: three principal components of a block's tokens",
    "C: contrast of neighbouring tokens (0 smooth, 1 none alike); red: where the heads look",
)


def feature_sheet(maps: Sequence[FeatureMap], decoded: Tensor | None = None) -> Image:
    """Noise above, data below; blocks from left to right, the heads' own in a red frame.

    Args:
        maps: every block at every time, time by time.
        decoded: each time's state as frames [K, F', H, W, 3] in [0, 1], for a column in front.
    """
    from PIL import Image, ImageDraw

    if not maps:
        raise AccVideoError("there are no feature maps to draw; name at least one block")
    rows = _rows(maps)
    names = [f"block {one.block}" for one in rows[0]]
    names = names if decoded is None else ["state", *names]
    cell, font = _Cell.of(maps[0].colours), text_font(15)
    texts = [text_font(13).getlength(text) for text in _EXPLAINED]
    wide = max(_LABEL + len(names) * cell.across, _LABEL + round(max(texts)) + _GAP)
    tall = _HEAD + len(rows) * cell.down
    sheet = Image.new("RGB", (wide, tall + len(_EXPLAINED) * 18 + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        draw.text((_LABEL + column * cell.across, 8), name, fill=INK, font=font)
    for number, row in enumerate(rows):
        y = _HEAD + number * cell.down
        draw.text((_GAP, y), f"t = {row[0].t:.4f}", fill=INK, font=font)
        x = _LABEL
        if decoded is not None:
            cell.paste(sheet, _spread(decoded[number], cell.frames), x, y)
            x += cell.across
        for one in row:
            cell.draw(sheet, draw, one, x, y)
            x += cell.across
    for number, text in enumerate(_EXPLAINED):
        draw.text((_LABEL, tall + 18 * number), text, fill=INK, font=text_font(13))
    return sheet


def feature_facts(maps: Sequence[FeatureMap]) -> str:
    """The contrast of every map in words, with a star where the heads look."""
    rows = _rows(maps)
    lines = ["contrast of neighbouring tokens (0 smooth, 1 none alike); *: where the heads look"]
    lines.append(f"{'t':>8}" + "".join(f"{f'block {one.block}':>11}" for one in rows[0]))
    for row in rows:
        cells = (f"{one.contrast:.3f}{'*' if one.tapped else ' '}" for one in row)
        lines.append(f"{row[0].t:8.4f}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def write_features(
    maps: Sequence[FeatureMap],
    decoded: Tensor | None,
    folder: Path,
    told: Mapping[str, Any],
) -> list[Path]:
    """`features.png`, and `features.json` with every map's figures and what is `told` beside."""
    names = ("t", "block", "tapped", "contrast", "share")
    figures = [{name: getattr(one, name) for name in names} for one in maps]
    write_json(folder / "features.json", {**told, "maps": figures})
    data = io.BytesIO()
    feature_sheet(maps, decoded).save(data, "PNG")
    write_bytes(folder / "features.png", data.getvalue())
    return [folder / "features.json", folder / "features.png"]


@dataclass(frozen=True, slots=True)
class _Cell:
    """The place of one map: `frames` of `wide` x `tall` pixels, and a line of figures."""

    frames: int
    wide: int
    tall: int

    @classmethod
    def of(cls, colours: Tensor) -> _Cell:
        frames, h, w, _ = colours.shape
        return cls(frames, round(_CELL * w / max(h, w)), round(_CELL * h / max(h, w)))

    @property
    def across(self) -> int:
        return self.frames * (self.wide + 2) + _GAP

    @property
    def down(self) -> int:
        return self.tall + _NOTE + _GAP

    def draw(self, sheet: Image, draw: ImageDraw, one: FeatureMap, x: int, y: int) -> None:
        self.paste(sheet, one.colours, x, y)
        if one.tapped:
            end = (x + self.frames * (self.wide + 2) + 1, y + self.tall + 3)
            draw.rectangle((x - 4, y - 4, *end), outline=_TAPPED, width=3)
        text = f"C {one.contrast:.2f}"
        draw.text((x, y + self.tall + 6), text, fill=INK, font=text_font(13))

    def paste(self, sheet: Image, frames: Iterable[Tensor], x: int, y: int) -> None:
        """`frames`, each [h, w, 3] in [0, 1], next to one another; every pixel stays a block."""
        from PIL import Image

        for number, frame in enumerate(frames):
            pixels = (frame.float().clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
            picture = Image.fromarray(pixels.numpy())
            picture = picture.resize((self.wide, self.tall), Image.Resampling.NEAREST)
            sheet.paste(picture, (x + number * (self.wide + 2), y))


def _rows(maps: Sequence[FeatureMap]) -> list[list[FeatureMap]]:
    """The maps of each time."""
    return [[one for one in maps if one.t == t] for t in dict.fromkeys(one.t for one in maps)]


def _spread(frames: Tensor, count: int) -> Tensor:
    """`count` of the frames [F', ...], from the middles of as many equal parts of the clip."""
    return frames[[int((i + 0.5) * len(frames) / count) for i in range(count)]]

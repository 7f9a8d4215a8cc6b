"""The page about an evaluation of videos, with plots and players; needs no network.

Everything lies in one folder, which can be moved: `index.html`, `report.json`, `table.txt`,
`plots.png` and the videos that are shown. What was measured is kept there as well.
"""

from __future__ import annotations

import base64
import html
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files import replacing, write_bytes, write_json
from ..monitor import Monitor, Progress, silent
from ..video import write_video
from .clips import Clip
from .pictures import Line, panels
from .video_evaluation import FVD_TEXT, Evaluation, Side, shown
from .yardsticks import CLIP_YARDSTICKS

if TYPE_CHECKING:
    from PIL.Image import Image

_ROWS = 200
"""Pairs that the page lists; report.json has all."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; color: #1e1e1e;
  padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .2rem 1.4rem .2rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } thead th { border-bottom: 1px solid #bbb; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
td:last-child, small { color: #666; } td:last-child { white-space: normal; }
img { max-width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem 1rem; margin: 1.5rem 0; }
.pair video { width: 100%; max-height: 28rem; background: #ddd; display: block; }
.pair p { grid-column: 1 / 3; margin: 0; overflow-wrap: anywhere; }
"""

# Both players of a pair go together. Without scripts each plays for itself.
_SCRIPT = """
for (const pair of document.querySelectorAll(".pair")) {
  const [a, b] = pair.querySelectorAll("video");
  if (!b) continue;
  for (const [one, other] of [[a, b], [b, a]]) {
    one.addEventListener("play", () => { other.currentTime = one.currentTime; other.play(); });
    one.addEventListener("pause", () => { if (!one.ended) other.pause(); });
    one.addEventListener("seeked", () => { if (one.paused) other.currentTime = one.currentTime; });
  }
}
"""


def write_evaluation(
    found: Evaluation, folder: Path, players: int = 8, monitor: Monitor = silent
) -> list[Path]:
    """Write everything about an evaluation into `folder` and return the files' paths.

    Args:
        players: pairs, from the least alike one on, whose videos are copied and shown; where there
            are no pairs, videos of each side.
        monitor: called after each of those; it may raise.
    """
    picture = plots(found)
    paths = [folder / name for name in ("index.html", "report.json", "table.txt", "plots.png")]
    with replacing(paths[3]) as temp:
        picture.save(temp, format="PNG")
    write_json(paths[1], found.as_dict())
    write_bytes(paths[2], f"{found.table()}\n".encode())
    shown_videos = _players(found, folder, players, monitor)
    write_bytes(paths[0], _page(found, shown_videos, paths[3].read_bytes()).encode())
    return paths


def plots(found: Evaluation) -> Image:
    """Every figure by frame: the mean over all videos that are so long."""
    sides = {"reference": found.reference, "judged": found.judged}
    together = "judged to reference"
    drawn: dict[str, Mapping[str, Line]] = {}
    for name in found.pair_rows():
        values = [pair[name] for pair in found.pairs.values() if name in pair]
        drawn[f"{name} by frame"] = {together: _mean_line(values)}
    for name in CLIP_YARDSTICKS:
        lines = {
            label: _mean_line([one.figures[name] for one in side.figures.values()])
            for label, side in sides.items()
        }
        if all(lines.values()):
            drawn[f"{name} by frame"] = lines
    return panels(drawn, [*sides, *([together] if found.pairs else [])], smooth=False)


def least_alike(found: Evaluation) -> list[str]:
    """The names of pairs, those first that are least alike by LPIPS, or else by PSNR."""
    means = found.pair_means()
    by, sign = (means["LPIPS"], -1) if means.get("LPIPS") else (means["PSNR"], 1)
    return sorted(by, key=lambda name: (sign * by[name], name))


def _mean_line(values: Sequence[Tensor]) -> Line:
    longest = max(map(len, values), default=0)
    line = []
    for frame in range(longest):
        there = torch.stack([x[frame] for x in values if len(x) > frame])
        line.append((float(frame), float(there.double().mean())))
    return line


def _page(found: Evaluation, players: str, picture: bytes) -> str:
    title = f"{found.judged.label} against {found.reference.label}"
    image = base64.b64encode(picture).decode()
    parts = [
        f"<h1>{_shown(title)}</h1><p>{_shown(found.head())}.</p>",
        _figures(found),
        "<small>Brackets are 95 % intervals over videos. Colours go from 0 to 1.</small>",
        _listed("Notes", found.notes),
        f'<h2>By frame</h2><img alt="figures by frame" src="data:image/png;base64,{image}">',
        players,
        _pairs(found),
        _listed("Left out", found.left_out),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{_shown(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _figures(found: Evaluation) -> str:
    rows = [
        [row.name, shown(row.reference), shown(row.judged), shown(row.ratio), row.text]
        for row in found.rows()
    ]
    head = ["", "reference", "judged", "judged / reference", ""]
    table = _table(head, rows)
    alike = [[name, shown(mean), text] for name, (text, mean) in found.pair_rows().items()]
    if found.fvd is not None:
        alike.append(["FVD", f"{found.fvd:.4g}", FVD_TEXT])
    return table + (_table(["", "judged to reference", ""], alike) if alike else "")


def _pairs(found: Evaluation) -> str:
    means = {name: of_each for name, of_each in found.pair_means().items() if of_each}
    if not means:
        return ""
    names = least_alike(found)
    rows = [
        [*(f"{of_each[name]:.4g}" if name in of_each else "-" for of_each in means.values()), name]
        for name in names[:_ROWS]
    ]
    more = f"<small>and {len(names) - _ROWS} more</small>" if len(names) > _ROWS else ""
    return f"<h2>Pairs, the least alike first</h2>{_table([*means, 'video'], rows)}{more}"


def _players(found: Evaluation, folder: Path, count: int, monitor: Monitor) -> str:
    """The videos in the folder, and the HTML that plays them."""
    if not count:
        return ""
    if found.pairs:
        names = [(name, name) for name in least_alike(found)[:count]]
        heading = "Side by side, the least alike first: the reference on the left"
    else:
        sides = (list(side.clips)[:count] for side in (found.reference, found.judged))
        names = list(zip(*sides, strict=False))
        heading = "The first videos: of the reference on the left"
    parts = []
    for number, (one, other) in enumerate(names, start=1):
        files = [
            _video(side, name, folder)
            for side, name in ((found.reference, one), (found.judged, other))
        ]
        videos = "".join(
            f'<video src="{file}" controls muted loop playsinline preload="auto"></video>'
            for file in files
        )
        words = one if one == other else f"{one}; {other}"
        figures = ", ".join(
            f"{name} {float(x.mean()):.4g}" for name, x in found.pairs.get(one, {}).items()
        )
        about = f"{words}: {figures}" if figures and one == other else words
        parts.append(f'<div class="pair"><p>{_shown(about)}</p>{videos}</div>')
        monitor(Progress("show", number, len(names)))
    return f"<h2>{heading}</h2>{''.join(parts)}"


def _video(side: Side, name: str, folder: Path) -> str:
    """A copy of a video in the folder, made once, and its place there."""
    clip: Clip = side.clips[name]
    suffix = clip.path.suffix.lower() if clip.path else ".mp4"
    place = f"videos/{clip.digest()[:16]}{suffix}"
    target = folder / place
    if target.exists():
        return place
    if clip.path is not None:
        with replacing(target) as temp:
            shutil.copyfile(clip.path, temp)
    else:
        with clip.opened() as (chunks, fps):
            frames = torch.cat(list(chunks))
        write_video(target, frames, fps if fps > 0 and math.isfinite(fps) else 24)
    return place


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_shown(text)}</th>" for text in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{_shown(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _listed(title: str, texts: Sequence[str]) -> str:
    items = "".join(f"<li>{_shown(text)}</li>" for text in texts[:_ROWS])
    more = f"<small>and {len(texts) - _ROWS} more</small>" if len(texts) > _ROWS else ""
    return f"<h2>{title}</h2><ul>{items}</ul>{more}" if texts else ""


def _shown(text: str) -> str:
    """Text as HTML shows it, whatever is in it."""
    return html.escape(text, quote=True)

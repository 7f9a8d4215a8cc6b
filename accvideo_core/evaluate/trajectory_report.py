"""A page about a dataset that opens from the disk.

Shapes: C channels, T latent frames, H, W; frames are [N, F, H, W, 3] in [0, 1].
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_bytes, write_json
from ..monitor import Monitor, Progress, silent
from ..trajectories.listing import read_listing
from ..trajectories.stats import (
    COMPARED,
    SAME_CLIP,
    DatasetStats,
    Decode,
    Spread,
    dataset_key,
)
from ..video import write_video

if TYPE_CHECKING:
    from ..trajectories.store import TrajectoryDataset

PAPER_WORDS = (100, 150)
"""Where most of SynVid's prompt lengths lie (AccVideo, Fig. 9; the unit is not stated there)."""
PREVIEW_SIZE = 192

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; color: #1e1e1e; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; }
.figures th { border-bottom: 1px solid #bbb; }
figure { margin: 1rem 0; } figcaption, small { color: #666; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.clips video { width: 100%; background: #ddd; image-rendering: pixelated; display: block; }
.clips a { color: inherit; }
"""


def write_dataset_page(
    dataset: TrajectoryDataset,
    stats: DatasetStats,
    folder: Path,
    decode: Decode | None = None,
    previews: int = 12,
    fps: float = 8.0,
    monitor: Monitor = silent,
) -> Path:
    """`index.html`, `stats.json` and previews in `folder`; needs no network and no script.

    Previews are the final clips of the first `previews` records, where states can be decoded;
    those that an earlier run made are kept. The monitor is called after each; it may raise.
    """
    write_json(folder / "stats.json", stats.as_dict())
    shown = _previews(dataset, folder, decode, previews, fps, monitor) if decode else []
    parts = [
        f"<h1>{html.escape(dataset.folder.name)}</h1>",
        _table(facts(dataset, stats)),
        _histogram("Words in a prompt", stats.words, PAPER_WORDS),
        _histogram("Characters in a prompt", stats.characters),
        f"<h2>Figures of {_drawn(stats)}</h2>",
        _spreads({**({"bend": stats.bend} if stats.bend else {}), **stats.figures}),
        _duplicates(stats),
        _skipped(stats),
        *([f"<h2>The first {len(shown)} records, by id</h2>"] if shown else []),
        f'<div class="clips">{"".join(shown)}</div>',
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(dataset.folder.name)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>"
    )
    path = folder / "index.html"
    write_bytes(path, page.encode())
    return path


def facts(dataset: TrajectoryDataset, stats: DatasetStats) -> dict[str, str]:
    """What a dataset is, in words."""
    info = dataset.info
    many = ", ".join(f"{n} x {count}" for count, n in stats.records_per_prompt.items())
    rounding = f", relative rounding error {stats.rounding.mean:.1e}" if stats.rounding else ""
    missing = f"; {stats.missing} more were asked for and are not there" if stats.missing else ""
    return {
        "records": f"{stats.records} of {stats.prompts} prompts (prompts x records: {many})"
        + missing,
        "teacher": f"{info.teacher_source} ({info.family}, {info.teacher})",
        "size": f"{info.frames} frames of {info.height} x {info.width}",
        "times": ", ".join(f"{t:.4f}" for t in info.times),
        **({"clips": str(info.cutting)} if info.cutting else {}),
        "guidance": f"embedded {info.guidance}, cfg {info.cfg.scale if info.cfg else 'none'}",
        "storage": f"{stats.bytes_total / 1e6:.1f} MB, {stats.bytes_per_record / 1e6:.3f} MB a "
        f"record, {stats.bytes_per_state / 1e6:.3f} MB a state ({info.dtype}{rounding})",
    }


def _table(named: Mapping[str, str]) -> str:
    rows = (f"<tr><th>{_shown(n)}</th><td>{_shown(x)}</td></tr>" for n, x in named.items())
    return f"<table>{''.join(rows)}</table>"


def _spreads(figures: Mapping[str, Spread]) -> str:
    head = "<tr><th>figure</th><th>mean</th><th>spread</th><th>lowest</th><th>highest</th></tr>"
    rows = (
        f"<tr><td>{_shown(name)}</td>"
        + "".join(f"<td>{x:.4g}</td>" for x in (one.mean, one.std, one.low, one.high))
        + "</tr>"
        for name, one in figures.items()
    )
    note = (
        "<small>bend: how far the path is from straight, 0 is straight. Motion energy: mean "
        "absolute change from one frame to the next, of the latents and of the decoded clip. "
        "Saturation of HSV; contrast is the standard deviation of brightness within a frame. "
        "Decoded figures are of colours from 0 to 1.</small>"
    )
    return f'<table class="figures">{head}{"".join(rows)}</table>{note}'


def _duplicates(stats: DatasetStats) -> str:
    texts = [f"{count} prompts: {_shown(text[:200])}" for text, count in stats.same_text]
    clips = [f"{a} and {b}: cosine {cosine:.4f}" for a, b, cosine in stats.same_clip]
    items = "".join(f"<li>{line}</li>" for line in (texts + clips)[:50])
    more = f"<small>and {len(texts + clips) - 50} more</small>" if len(texts + clips) > 50 else ""
    found = f"<ul>{items}</ul>{more}" if items else "<p>none found</p>"
    note = (
        "<small>Texts of all prompts are compared as they are. Clips are the same when the cosine "
        f"of their final latents ({COMPARED} elements at most) is above {SAME_CLIP}; compared are "
        f"{_drawn(stats)}.</small>"
    )
    return f"<h2>Duplicates</h2>{found}{note}"


def _drawn(stats: DatasetStats) -> str:
    """Which clips were measured, in words."""
    if stats.clips == stats.records:
        return "all records"
    return f"{stats.clips} of {stats.records} records, drawn by the dataset's seed"


def _skipped(stats: DatasetStats) -> str:
    """Records that could not be made, and why."""
    lines = [f"<li>{_shown(id)}: {_shown(why)}</li>" for id, why in stats.skipped.items()]
    if not lines:
        return ""
    more = f"<small>and {len(lines) - 50} more</small>" if len(lines) > 50 else ""
    return f"<h2>{len(lines)} records could not be made</h2><ul>{''.join(lines[:50])}</ul>{more}"


def _histogram(
    title: str, values: Sequence[int], band: tuple[int, int] | None = None, bins: int = 30
) -> str:
    """Bars as inline SVG; `band` is the range that the paper shows, drawn behind them."""
    high = max([*values, band[1] if band else 1, 1]) + 1
    width = _round_width(high / bins)
    counts = [0] * -(-high // width)
    for value in values:
        counts[value // width] += 1
    wide, tall, head, foot = 720, 160, 18, 24
    unit, top = wide / len(counts), max(counts)

    def box(x0: float, x1: float, part: float, colour: str) -> str:
        return (
            f'<rect x="{x0:.1f}" y="{head + tall * (1 - part):.1f}" width="{x1 - x0:.1f}" '
            f'height="{tall * part:.1f}" fill="{colour}"/>'
        )

    def words(x: float, y: int, text: str, anchor: str = "start") -> str:
        return f'<text x="{x:.1f}" y="{y}" font-size="12" text-anchor="{anchor}">{text}</text>'

    parts = []
    if band:
        x0, x1 = (edge / width * unit for edge in band)
        label = f"most prompts of the paper: {band[0]} to {band[1]}, unit not stated"
        parts += [
            box(x0, x1, 1, "#f4e3c1"),
            words(min((x0 + x1) / 2, wide - 170), 12, label, "middle"),
        ]
    for i, n in enumerate(counts):
        if n:
            parts.append(box(i * unit + 1, (i + 1) * unit - 1, n / top, "#1f77b4"))
    for i in range(0, len(counts), -(-len(counts) // 10)):
        parts.append(words(i * unit, head + tall + 17, str(i * width)))
    parts.append(box(0, wide, 0.006, "#999"))
    return (
        f"<figure><figcaption>{_shown(title)}, {len(values)} prompts; the highest bar is {top}"
        f'</figcaption><svg viewBox="0 0 {wide} {head + tall + foot}" width="{wide}" role="img">'
        f"{''.join(parts)}</svg></figure>"
    )


def _round_width(least: float) -> int:
    """The first of 1, 2, 5, 10, 20, 50, ... that is at least `least`."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= least:
                return digit * power
        power *= 10


def _previews(
    dataset: TrajectoryDataset,
    folder: Path,
    decode: Decode,
    count: int,
    fps: float,
    monitor: Monitor,
) -> list[str]:
    """The final clips of the first records as MP4 files, and the HTML that shows them."""
    shown, key, ids = [], dataset_key(dataset)[:8], dataset.ids()[:count]
    texts = read_listing(dataset.folder).texts
    for number, id in enumerate(ids, start=1):
        name = f"previews/{id}_{key}_{fps:g}fps.mp4"
        if not (folder / name).exists():
            frames = decode(dataset.read(id).latents[-1:].float())[0]
            write_video(folder / name, frames, fps, max(1, PREVIEW_SIZE // frames.shape[1]))
        text = texts.get(dataset.header(id).prompt_id, "")
        shown.append(
            f'<div><video src="{name}" autoplay muted loop playsinline></video><small>'
            f'<a href="{name}">{id[:12]}</a> {_shown(text[:300])}</small></div>'
        )
        monitor(Progress("preview", number, len(ids)))
    return shown


def _shown(text: str) -> str:
    """Text as HTML shows it, whatever is in it."""
    return html.escape(text, quote=True)

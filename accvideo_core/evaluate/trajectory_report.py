"""Pictures of a trajectory, and a page about a dataset that opens from the disk.

Shapes: K kept times, C channels, T latent frames, H, W; frames are [N, F, H, W, 3] in [0, 1].
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import write_bytes, write_json
from ..trajectories.stats import DatasetStats, Decode, RecordCurves, Spread, predicted_clean
from ..trajectories.stats import record_curves as curves_of
from ..video import write_video
from .pictures import contact_sheet, panels

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..trajectories.store import Trajectory, TrajectoryDataset

PAPER_WORDS = (100, 150)
"""Where most of SynVid's prompt lengths lie (AccVideo, Fig. 9; the unit is not stated there)."""
PREVIEW_SIZE = 192
TRAJECTORY = "between kept states (upright lines: key times)"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; color: #1e1e1e; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #bbb; }
figure { margin: 1rem 0; } figcaption, small { color: #666; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.clips video { width: 100%; background: #ddd; image-rendering: pixelated; }
"""


def record_sheet(
    trajectory: Trajectory, decode: Decode, *, frames: int = 4, size: int = 96
) -> Image:
    """Decoded states from noise to data, and beside each the clean clip that its step points at.

    The last state points nowhere any more and is shown itself.
    """
    states = trajectory.latents.float()
    clean = torch.cat([predicted_clean(trajectory), states[-1:]])
    clips = {
        "state": torch.cat([decode(x[None]) for x in states]),
        "predicted clean clip": torch.cat([decode(x[None]) for x in clean]),
    }
    captions = [f"t = {t:.4f}" for t in trajectory.times]
    return contact_sheet(clips, captions, frames_per_clip=frames, frame_size=size)


def record_plot(curves: RecordCurves) -> Image:
    """Speed, change per step and straightness against time; upright lines are the key times."""
    middles = [(a + b) / 2 for a, b in zip(curves.times, curves.times[1:], strict=False)]
    headings = {
        "|v|, root mean square, by time": curves.speed,
        "change per step, root mean square, by time": curves.change,
        "cosine to the straight path, by time": curves.cosine,
    }
    lines = {
        heading: {TRAJECTORY: sorted(zip(middles, values, strict=True))}
        for heading, values in headings.items()
    }
    return panels(lines, [TRAJECTORY], curves.times)


def write_record(
    trajectory: Trajectory, folder: Path, decode: Decode | None, text: str = ""
) -> list[Path]:
    """`curves.png`, `curves.json` and, where states can be decoded, `states.png` in `folder`."""
    curves = curves_of(trajectory)
    facts = {"id": trajectory.id, "prompt": text, "sample": trajectory.sample, **asdict(curves)}
    write_json(folder / "curves.json", facts)
    pictures = {"curves.png": record_plot(curves)}
    if decode is not None:
        pictures["states.png"] = record_sheet(trajectory, decode)
    for name, picture in pictures.items():
        write_bytes(folder / name, _png(picture))
    return [folder / name for name in ("curves.json", *pictures)]


def write_dataset_page(
    dataset: TrajectoryDataset,
    stats: DatasetStats,
    folder: Path,
    decode: Decode | None = None,
    previews: int = 12,
    fps: float = 8.0,
) -> Path:
    """`index.html`, `stats.json` and previews in `folder`; needs no network and no script.

    Previews are the final clips of the first `previews` records, where states can be decoded.
    """
    write_json(folder / "stats.json", stats.as_dict())
    shown = _previews(dataset, folder, decode, previews, fps) if decode is not None else []
    parts = [
        f"<h1>{html.escape(dataset.folder.name)}</h1>",
        _table(facts(dataset, stats)),
        _histogram("Words in a prompt", stats.words, PAPER_WORDS),
        _histogram("Characters in a prompt", stats.characters),
        f"<h2>{stats.clips} clips, drawn by the dataset's seed</h2>",
        _spreads({**({"bend": stats.bend} if stats.bend else {}), **stats.figures}),
        _duplicates(stats),
        *(["<h2>Previews</h2>", f'<div class="clips">{"".join(shown)}</div>'] if shown else []),
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
    return {
        "records": f"{stats.records} of {stats.prompts} prompts (prompts x records: {many})",
        "teacher": f"{info.teacher_source} ({info.family}, {info.teacher})",
        "size": f"{info.frames} frames of {info.height} x {info.width}",
        "times": ", ".join(f"{t:.4f}" for t in info.times),
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
        "<small>bend: how far the path is from straight, 0 is straight. Motion: root mean square "
        "change from one frame to the next, of the latents and of the decoded clip.</small>"
    )
    return f"<table>{head}{''.join(rows)}</table>{note}"


def _duplicates(stats: DatasetStats) -> str:
    texts = [f"{count} prompts: {_shown(text[:200])}" for text, count in stats.same_text]
    clips = [f"{a} and {b}: cosine {cosine:.4f}" for a, b, cosine in stats.same_clip]
    items = "".join(f"<li>{line}</li>" for line in (texts + clips)[:50])
    more = f"<small>and {len(texts + clips) - 50} more</small>" if len(texts + clips) > 50 else ""
    found = f"<ul>{items}</ul>{more}" if items else "<p>none found</p>"
    return f"<h2>Duplicates</h2>{found}"


def _histogram(
    title: str, values: Sequence[int], band: tuple[int, int] | None = None, bins: int = 30
) -> str:
    """Bars as inline SVG; `band` is the range that the paper shows, drawn behind them."""
    low, high = 0, max([*values, band[1] if band else 1, 1])
    width = max(1, -(-(high - low + 1) // bins))
    counts = [0] * (-(-(high + 1) // width))
    for value in values:
        counts[value // width] += 1
    wide, tall, foot = 720, 160, 24
    unit, top = wide / len(counts), max(counts)
    bars = "".join(
        f'<rect x="{i * unit + 1:.1f}" y="{tall - tall * n / top:.1f}" '
        f'width="{unit - 2:.1f}" height="{tall * n / top:.1f}" fill="#1f77b4"/>'
        for i, n in enumerate(counts)
        if n
    )
    marks = "".join(
        f'<text x="{i * unit:.1f}" y="{tall + 17}" font-size="12">{i * width}</text>'
        for i in range(0, len(counts), max(1, len(counts) // 8))
    )
    note, shade = "", ""
    if band:
        x0, x1 = (edge / width * unit for edge in band)
        shade = f'<rect x="{x0:.1f}" y="0" width="{x1 - x0:.1f}" height="{tall}" fill="#f4e3c1"/>'
        note = (
            f"; the pale band is where most of the paper's prompts lie ({band[0]} to {band[1]}, "
            "unit not stated there)"
        )
    return (
        f'<figure><svg viewBox="0 0 {wide} {tall + foot}" width="{wide}" role="img">'
        f"{shade}{bars}{marks}</svg><figcaption>{_shown(title)}, {len(values)} prompts{note}"
        "</figcaption></figure>"
    )


def _previews(
    dataset: TrajectoryDataset, folder: Path, decode: Decode, count: int, fps: float
) -> list[str]:
    """The final clips of the first records as MP4 files, and the HTML that shows them."""
    shown, texts = [], {}
    for id in dataset.ids()[:count]:
        trajectory = dataset.read(id)
        frames = decode(trajectory.latents[-1:].float())[0]
        name = f"previews/{id}.mp4"
        write_video(folder / name, frames, fps, max(1, PREVIEW_SIZE // frames.shape[1]))
        if trajectory.prompt_id not in texts:
            texts[trajectory.prompt_id] = dataset.prompt(trajectory.prompt_id).text
        shown.append(
            f'<div><video src="{name}" controls autoplay muted loop playsinline></video>'
            f"<small>{_shown(texts[trajectory.prompt_id][:160])}</small></div>"
        )
    return shown


def _shown(text: str) -> str:
    """Text as HTML shows it, whatever is in it."""
    return html.escape(text, quote=True)


def _png(picture: Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()

"""Several training runs on one page that opens from the disk; it needs no network and no script."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_bytes
from .pictures import panels as draw_panels
from .runs import (
    Panels,
    RunRecord,
    compared_settings,
    differs,
    read_runs,
    training_panels,
    validation_panels,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDEST = 1600
"""Pixels that a contact sheet is reduced to."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #1e1e1e;
  padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .2rem 1.2rem .2rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } thead th { border-bottom: 1px solid #bbb; }
td { overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figcaption, small { color: #666; }
img { max-width: 100%; height: auto; }
"""


def write_runs_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page about the runs in `folders` to `path`.

    Runs may be in progress: the page shows what is on the disk, without a last line that is being
    written.

    Raises:
        AccVideoError: a folder holds no run.
    """
    runs = read_runs(folders)
    labels = [run.label for run in runs]
    title = " / ".join(labels)
    looked = validation_panels(runs)
    parts = [
        f"<h1>{_shown(title)}</h1>",
        _facts(runs),
        _settings(runs),
        *(_curves(name, panels, labels) for name, panels in training_panels(runs).items()),
        _curves("Validation on fixed clips", looked, labels, smooth=False) if looked else "",
        _notes(runs),
        _sheets(runs),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{_shown(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    write_bytes(path, page.encode())


def _facts(runs: Sequence[RunRecord]) -> str:
    found = [run.facts() for run in runs]
    names = list(dict.fromkeys(name for facts in found for name in facts))
    return _table(runs, {name: [facts.get(name, "") for facts in found] for name in names})


def _settings(runs: Sequence[RunRecord]) -> str:
    table = {
        name: [_setting(value) for value in values]
        for name, values in compared_settings(runs).items()
    }
    other = {name: texts for name, texts in table.items() if differs(texts)}
    same = {name: texts[:1] for name, texts in table.items() if name not in other}
    if len(runs) == 1:
        return f"<h2>Settings</h2>{_table(runs, same)}"
    differing = _table(runs, other) if other else "<p>none</p>"
    rest = "".join(f"<tr><th>{_shown(n)}</th><td>{_shown(x[0])}</td></tr>" for n, x in same.items())
    return (
        f"<h2>Settings that differ</h2>{differing}"
        f"<details><summary>Settings that are the same</summary><table>{rest}</table></details>"
    )


def _curves(name: str, panels: Panels, labels: Sequence[str], smooth: bool = True) -> str:
    image = draw_panels(panels, labels, smooth=smooth)
    note = "by update; pale as measured, strong its running mean" if smooth else "by update"
    return (
        f"<h2>{_shown(name)}</h2><figure>{_picture(image, ', '.join(panels))}"
        f"<figcaption>{note}</figcaption></figure>"
    )


def _notes(runs: Sequence[RunRecord]) -> str:
    items = "".join(
        f"<li>{_shown(run.label)}, update {step}: {_shown(text)}</li>"
        for run in runs
        for step, text in run.notes()
    )
    return f"<h2>Warnings</h2><ul>{items}</ul>" if items else ""


def _sheets(runs: Sequence[RunRecord]) -> str:
    from PIL import Image

    figures = []
    for run in runs:
        if run.sheet is None:
            continue
        with Image.open(run.sheet) as image:
            image.thumbnail((_WIDEST, 10 * _WIDEST))
            picture = _picture(image, f"teacher and student of {run.label}")
        text = f"{run.label}, after update {int(run.sheet.stem)}"
        figures.append(f"<figure>{picture}<figcaption>{_shown(text)}</figcaption></figure>")
    return f"<h2>Last contact sheets</h2>{''.join(figures)}" if figures else ""


def _picture(image: Image, text: str) -> str:
    """The picture itself inside the page."""
    data = io.BytesIO()
    image.save(data, "PNG")
    inside = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{_shown(text)}" src="data:image/png;base64,{inside}">'


def _table(runs: Sequence[RunRecord], rows: Mapping[str, Sequence[str]]) -> str:
    """A row for each name, a column for each run."""
    head = "".join(f"<th>{_shown(run.label)}</th>" for run in runs)
    body = "".join(
        f"<tr><th>{_shown(name)}</th>" + "".join(f"<td>{_shown(x)}</td>" for x in texts) + "</tr>"
        for name, texts in rows.items()
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _shown(text: str) -> str:
    """Text as HTML shows it, whatever is in it."""
    return html.escape(text, quote=True)

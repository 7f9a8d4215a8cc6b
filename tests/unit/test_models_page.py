"""The table of families in docs/models.md says what the families say."""

from __future__ import annotations

from pathlib import Path

from accvideo_core.models import FAMILIES, Family


def rows(root: Path) -> dict[str, list[str]]:
    lines = (root / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    return {row[0].strip("`"): row[1:] for row in cells if row[0].startswith("`")}


def shift(family: Family) -> str:
    low = "" if family.shift_low is None else f", at 480p {family.shift_low:g}"
    return f"{family.shift:g}{low}" + (" (SNR)" if family.variance_preserving else "")


def guidance(family: Family) -> str:
    if family.cfg is None:
        return "none" if family.guidance is None else f"embedded {family.guidance:g}"
    low = "" if family.cfg.low is None else f", low noise {family.cfg.low:g}"
    first = "" if family.cfg.first is None else f", first frame {family.cfg.first:g}"
    return f"cfg {family.cfg.scale:g}{low}{first}"


def experts(family: Family) -> str:
    return "1" if family.experts == 1 else f"{family.experts}, from {family.boundary:g}"


def test_every_family_is_on_the_page_with_its_own_numbers(root: Path):
    page = rows(root)
    assert set(page) == set(FAMILIES)
    for name, family in FAMILIES.items():
        title, steps, *numbers = page[name][:5]
        assert title.startswith(family.title) and steps == str(family.steps)
        assert numbers == [shift(family), guidance(family), experts(family)], name

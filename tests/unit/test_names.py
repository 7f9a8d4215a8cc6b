"""Names from outside never leave their folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from accvideo_core.errors import AccVideoError
from accvideo_core.names import child, safe_name

HOSTILE = [
    "",
    " ",
    ".",
    "..",
    "...",
    ".hidden",
    "../up",
    "a/../../b",
    "a/b",
    "a\\b",
    "..\\up",
    "/etc/passwd",
    "//server/share",
    "\\\\server\\share",
    "C:",
    "C:\\x",
    "c:x",
    "file:stream",
    "a\0b",
    "a\nb",
    "a\tb",
    "\x7f",
    "a\u202eb",
    "a\u200bb",
    "\ud800",
    "a" * 101,
    "\u4f60" * 90,
    "CON",
    "con",
    "nul.txt",
    "Com1",
    "LPT9.x.y",
    "a.",
    "a ",
    " a",
    "a*",
    "a?",
    "<a>",
    "a|b",
    'a"b',
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_are_refused_in_one_printable_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(AccVideoError, match="use a plain name") as caught:
        child(tmp_path, name, "dataset")
    message = str(caught.value)
    assert message.startswith("dataset ") and message.isascii() and message.isprintable()


@pytest.mark.parametrize("name", [None, 3, b"a", Path("a")])
def test_what_is_not_text_is_refused(name: object) -> None:
    with pytest.raises(AccVideoError, match="is not text"):
        safe_name(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "my_clips",
        "My clips (2)",
        "v1.5",
        "console",
        "com10",
        "\u4f60\u597d",
        "a..b",
        "x" * 100,
    ],
)
def test_plain_names_are_children(tmp_path: Path, name: str) -> None:
    assert child(tmp_path, name) == tmp_path.resolve() / name


def test_links_may_stay_inside_but_not_lead_out(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    links = {"inner": root / "real", "out": outside, "gone": outside / "x", "self": root}
    for name, target in links.items():
        (root / name).symlink_to(target)
    (root / "loop").symlink_to(root / "loop")
    assert child(root, "inner") == (root / "real").resolve()
    for name in ("out", "gone", "self"):
        with pytest.raises(AccVideoError, match=f"'{name}' leads out of"):
            child(root, name)
    try:
        assert child(root, "loop").parent == root.resolve()  # newer Pythons leave a loop as it is
    except AccVideoError as error:
        assert "leads out" in str(error)


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert child(tmp_path / "link", "a") == (tmp_path / "real" / "a").resolve()

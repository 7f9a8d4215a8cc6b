"""Files that hold prompts: text, JSON, CSV, Parquet, and folders of images with captions.

Every reader gives what stands in the file, entry by entry, empty ones too; `prompts.py` decides
what of it is used and says what is not.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AccVideoError
from ..files import disk_errors
from ..images import IMAGE_SUFFIXES

PROMPT_NAMES = ("prompt", "text", "caption")
"""Columns that hold the prompt when none is named, the first that is there."""
IMAGE_NAMES = ("image", "file_name")
"""Columns that hold the path of an image; the second is that of Hugging Face's imagefolder."""
LISTINGS = ("captions.jsonl", "metadata.jsonl")
"""Files that hold the captions of a folder of images or videos."""
_LINE_END = re.compile(r"\r\n|\r|\n")
_NAMED_AT_MOST = 5


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """A prompt as it stands in a file, with the image that its video begins with, if any."""

    text: str
    image: Path | None
    """Not opened yet."""
    line: int
    """Line of the file, entry of a JSON list, row of a Parquet file or image of a folder, from 1;
    0 where there is no file."""


@dataclass(frozen=True, slots=True)
class Contents:
    """All entries of a file; `unit` is what `PromptEntry.line` counts."""

    entries: Sequence[PromptEntry]
    unit: str = "line"
    notes: tuple[str, ...] = ()


def read_entries(path: Path, column: str | None = None, captioned: bool = True) -> Contents:
    """What stands in a file or folder, by its suffix (none is a text file).

    Images of a folder need a caption; unless `captioned`, those without are called by their names.

    Raises AccVideoError for a missing, foreign or damaged file, and for a column that it lacks.
    """
    if path.is_dir():
        return _folder(path, column, captioned)
    if not path.is_file():
        raise AccVideoError(f"there is no prompts file {path}; check the path")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise AccVideoError(
            f"{path} is no list of prompts by its name; use one of "
            f"{' '.join(suffix for suffix in _READERS if suffix)}, or a folder of images"
        )
    return reader(path, column)


def listed(names: Iterable[object]) -> str:
    """ "(3, 7, 9)", and dots where there are more than a few."""
    shown = [str(name) for name in names]
    return f"({', '.join(shown[:_NAMED_AT_MOST] + ['...'] * (len(shown) > _NAMED_AT_MOST))})"


def counted(number: int, thing: str) -> str:
    """ "1 line", "2 lines", "2 entries"."""
    several = f"{thing[:-1]}ies" if thing.endswith("ry") else f"{thing}s"
    return f"{number} {thing if number == 1 else several}"


# Text and JSON --------------------------------------------------------------------------------


def _text(path: Path, column: str | None) -> Contents:
    if column is not None:
        raise AccVideoError(
            f"{path} is a text file and has no column {column!r}; leave the column out, or give "
            "a CSV, JSON or Parquet file"
        )
    return Contents([PromptEntry(text.strip(), None, n) for n, text in _lines(decoded_text(path))])


def _json_lines(path: Path, column: str | None) -> Contents:
    return Contents(
        [
            PromptEntry("", None, number)
            if not text.strip()
            else _json_entry(_parsed(text, path, number), column, path, f"line {number}", number)
            for number, text in _lines(decoded_text(path))
        ]
    )


def _json(path: Path, column: str | None) -> Contents:
    """One list, or one entry; or lines under the wrong name."""
    text = decoded_text(path)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        if not text.lstrip().startswith("["):
            return _json_lines(path, column)
        whole = _parsed(text, path, 1)
    items = whole if isinstance(whole, list) else [whole]
    return Contents(
        [_json_entry(item, column, path, f"entry {n}", n) for n, item in enumerate(items, 1)],
        "entry",
    )


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = line + error.lineno - 1 if isinstance(error, json.JSONDecodeError) else line
        raise AccVideoError(
            f"{path} line {at} is not JSON ({error}); correct it, or name a file with a prompt a "
            "line .txt"
        ) from error


def _json_entry(item: Any, column: str | None, path: Path, place: str, number: int) -> PromptEntry:
    """A string, or an object with a prompt and maybe an image."""
    names = PROMPT_NAMES if column is None else (column,)
    fields: Mapping[str, Any] = {names[0]: item} if isinstance(item, str) else item
    name = next((n for n in names if n in fields), None) if isinstance(fields, dict) else None
    text = None if name is None else fields[name]
    if name is None or not isinstance(text, (str, type(None))):
        raise AccVideoError(
            f"{path} {place} holds no prompt; write a string, or an object with the prompt as "
            f"{' or '.join(map(repr, names))}"
        )
    image = next((fields[n] for n in IMAGE_NAMES if n != name and fields.get(n) is not None), None)
    if not isinstance(image, (str, type(None))):
        raise AccVideoError(f"{path} {place} has an image that is no path; write the file's name")
    return _entry(text, image, path, place, number)


def _entry(text: str | None, image: str | None, path: Path, place: str, number: int) -> PromptEntry:
    """An entry of the file `path`; its prompt on one line, its image relative to the file."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise AccVideoError(
            f"{path} {place} holds half of a character ({error.reason}); write it again"
        ) from error
    return PromptEntry(one_line(text or ""), path.parent / image if image else None, number)


def one_line(text: str) -> str:
    """Without line ends, which a prompt has none of in every list of prompts."""
    return " ".join(part.strip() for part in _LINE_END.split(text) if part.strip())


def _lines(text: str) -> list[tuple[int, str]]:
    """(number, line), where only \\n, \\r\\n and \\r end a line, as in every editor."""
    lines = _LINE_END.split(text)
    return list(enumerate(lines if lines[-1] else lines[:-1], 1))


def decoded_text(path: Path) -> str:
    """A UTF-8 file's text, without a byte order mark."""
    with disk_errors("read", path):
        data = path.read_bytes()
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text, bad = data.decode(), data.find(0)
    except UnicodeDecodeError as error:
        text, bad = "", error.start
    if bad >= 0:
        line = len(re.split(rb"\r\n|\r|\n", data[:bad]))
        raise AccVideoError(
            f"{path} line {line} holds the byte 0x{data[bad]:02X}, which is not UTF-8 text; save "
            "the file as UTF-8"
        )
    return text


# Tables ---------------------------------------------------------------------------------------


def _csv(path: Path, column: str | None) -> Contents:
    """The first line names the columns; fields stand apart by commas, semicolons or tabs."""
    rows = _csv_rows(path)
    header = next((row for _, row in rows if row), None)
    if header is None:
        raise AccVideoError(f"{path} is empty; write the columns' names and a prompt a line")
    name = _column(header, column, path)
    image = _image_column(header, name)
    entries = []
    for line, row in rows:
        if len(row) > len(header):
            raise AccVideoError(
                f"{path} line {line} has {len(row)} fields and the first line {len(header)}; put "
                "prompts with commas in double quotes"
            )
        fields = dict(zip(header, row, strict=False))
        picture = fields.get(image, "").strip() if image else None
        entries.append(_entry(fields.get(name), picture, path, f"line {line}", line))
    notes = ()
    if column is None and name.strip().lower() not in PROMPT_NAMES:
        notes = (f"the first line, {name!r}, is the column's name and no prompt",)
    return Contents(entries, notes=notes)


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line that it begins on, fields) of every row."""
    text = decoded_text(path)
    first = _LINE_END.split(text, maxsplit=1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    if delimiter not in first and ";" in first:
        delimiter = ";"
    # Without `strict` an unclosed quote swallows all lines that follow.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise AccVideoError(
                f"{path} line {line} is not CSV ({error}); put the field in double quotes and "
                "double the quotes inside it"
            ) from error
        if row is None:
            return
        yield line, row


def _parquet(path: Path, column: str | None) -> Contents:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise AccVideoError(
            f"reading {path} needs the package pyarrow, which is not installed; install it with: "
            "pip install pyarrow"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        types = {field.name: field.type for field in file.schema_arrow}
        text = [name for name, kind in types.items() if _is_text(kind)]
        name = _column(text, column, path)
        image = _image_column(text, name)
        columns = file.read(columns=[name, image] if image else [name])
        texts = columns.column(name).to_pylist()
        images = columns.column(image).to_pylist() if image else [None] * len(texts)
    except (pyarrow.ArrowException, OSError) as error:
        raise AccVideoError(
            f"{path} is not Parquet or is damaged ({one_line(str(error))}); write it again"
        ) from error
    pairs = enumerate(zip(texts, images, strict=True), 1)
    entries = [_entry(text, picture, path, f"row {row}", row) for row, (text, picture) in pairs]
    inside = _image_column(sorted(types.keys() - set(text)), name)
    notes = ()
    if inside is not None:
        notes = (
            f"column {inside!r} holds no paths and is not read; save its images as "
            "files for image to video",
        )
    return Contents(entries, "row", notes)


def _is_text(kind: Any) -> bool:
    """Whether a column of this Arrow type holds strings."""
    inner = kind.value_type if str(kind).startswith("dictionary") else kind
    return str(inner) in ("string", "large_string", "string_view")


def _column(names: Sequence[str], asked: str | None, path: Path) -> str:
    """The column asked for, the one that is called like a prompt, or the only one."""
    if asked is not None and asked in names:
        return asked
    obvious = {name.strip().lower(): name for name in reversed(names)}
    found = next((obvious[name] for name in PROMPT_NAMES if name in obvious), None)
    if asked is None and (found is not None or len(names) == 1):
        return found or names[0]
    wanted = " or ".join(repr(name) for name in (PROMPT_NAMES if asked is None else (asked,)))
    raise AccVideoError(
        f"{path} has no column {wanted} with text; name the one with the prompts: "
        f"{', '.join(names) or 'there is none'}"
    )


def _image_column(names: Sequence[str], prompts: str) -> str | None:
    return next((name for name in IMAGE_NAMES if name in names and name != prompts), None)


# Folders --------------------------------------------------------------------------------------


def _folder(path: Path, column: str | None, captioned: bool) -> Contents:
    """Images here and below, in the order of their paths, with their captions.

    A caption stands in the text file of the image's name, or else in one of LISTINGS.
    """
    found = (p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    images = sorted(p for p in found if p.is_file() and not is_hidden(p.relative_to(path)))
    if not images:
        raise AccVideoError(
            f"{path} holds no images ({' '.join(IMAGE_SUFFIXES)}); give a folder of images with "
            "captions, or the file with the prompts"
        )
    captions = listed_captions(path, column)
    entries, without = [], []
    for number, image in enumerate(images, 1):
        texts = captions.pop(os.path.abspath(image), [])
        beside = image.with_suffix(".txt")
        if beside.is_file():
            texts = [one_line(decoded_text(beside))]
        if not captioned and not any(texts):
            texts = [image.stem]
        entries += [PromptEntry(text, image, number) for text in texts if text]
        if not any(texts):
            without.append(image.relative_to(path).as_posix())
    if not entries:
        raise AccVideoError(
            f"none of the {len(images)} images in {path} has a caption; write it into a text file "
            "of the image's name, or all into captions.jsonl"
        )
    notes = []
    if without:
        left = counted(len(without), "image")
        notes.append(f"left out {left} without a caption {listed(without)}")
    if captions:
        left, names = counted(len(captions), "caption"), (Path(name).name for name in captions)
        notes.append(f"left out {left} of no image that is there {listed(names)}")
    return Contents(entries, "image", tuple(notes))


def listed_captions(path: Path, column: str | None) -> dict[str, list[str]]:
    """Absolute path of an image or video -> its captions, by the first of LISTINGS there."""
    captions: dict[str, list[str]] = {}
    listing = next((path / name for name in LISTINGS if (path / name).is_file()), None)
    for entry in _json_lines(listing, column).entries if listing else ():
        if entry.image is not None:
            captions.setdefault(os.path.abspath(entry.image), []).append(entry.text)
        elif entry.text:
            raise AccVideoError(
                f"{listing} line {entry.line} names no file; give its path as file_name"
            )
    return captions


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


_READERS: dict[str, Callable[[Path, str | None], Contents]] = {
    ".txt": _text,
    "": _text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}

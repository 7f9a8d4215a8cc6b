"""Prompts for recording: read from files, checked, and encoded, with images where they have them.

Nothing is left out without a note: one sentence on empty lines, on repetitions, on prompts that
the text encoder cuts, on images without a caption or that cannot be read.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..conditioning import AnyPrompt, LatePrompt, Prompt, encoded, text_id
from ..errors import AccVideoError
from ..files import disk_errors
from ..images import fitted, read_image
from ..monitor import Monitor, Progress, silent
from .prompt_files import Contents, PromptEntry, counted, listed, read_entries

if TYPE_CHECKING:
    from ..models.loading import Teacher

TOKENS_PER_WORD = 4 / 3
"""Of English text, roughly, in the vocabularies of UMT5, T5 and Llama."""
_TEXTS_AT_ONCE = 4096
_UNSPACED = re.compile("[\u2e80-\uffef]")
"""Chinese, Japanese and Korean, of which a character is about a token."""


@dataclass(frozen=True, slots=True)
class PromptList:
    """Prompts to be used, in the file's order, and a sentence on everything that is not."""

    entries: tuple[PromptEntry, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PromptEncoding:
    """Encoded prompts, no two with the same id, and a sentence on everything that was left out."""

    prompts: tuple[AnyPrompt, ...]
    notes: tuple[str, ...]


def read_prompts(
    path: Path, column: str | None = None, limit: int | None = None, captioned: bool = True
) -> PromptList:
    """The prompts of a file or folder, every one once.

    Args:
        path: .txt (a prompt a line), .jsonl or .json (a string, or an object with prompt, text or
            caption and maybe the path of an image), .csv, .tsv, .parquet, or a folder of images
            with captions. Text is UTF-8, with or without a byte order mark.
        column: name of the column or key with the prompts, in place of the obvious one.
        limit: tokens that are not too many, estimated from words; `too_long` counts them.
        captioned: whether images of a folder need a caption; else those without are called by
            their names, for a model that reads no text.

    Raises:
        AccVideoError: the file is missing, foreign, damaged or without prompts, or lacks the
            column; bad bytes are named with their line.
    """
    contents = read_entries(path, column, captioned)
    entries, notes = _distinct(contents)
    if not entries:
        raise AccVideoError(f"{path} holds no prompts; write at least one")
    notes = [f"{path.absolute().name}: {note}" for note in (*contents.notes, *notes)]
    if limit is not None:
        notes += too_long_notes([entry.text for entry in entries], limit)
    return PromptList(entries, tuple(notes))


def _distinct(contents: Contents) -> tuple[tuple[PromptEntry, ...], list[str]]:
    """The entries with a text, each once, and notes on the others."""
    first: dict[tuple[str, Path | None], PromptEntry] = {}
    empty, again = [], []
    for entry in contents.entries:
        if not entry.text:
            empty.append(entry.line)
        elif (earlier := first.setdefault((entry.text, entry.image), entry)) is not entry:
            again.append(f"{contents.unit} {entry.line} is {contents.unit} {earlier.line} again")
    notes = []
    if empty:
        left = counted(len(empty), contents.unit)
        notes.append(f"left out {left} without a prompt {listed(empty)}")
    if again:
        notes.append(f"left out {counted(len(again), 'repetition')} of a prompt ({again[0]})")
    return tuple(first.values()), notes


def too_long(
    texts: Sequence[str], limit: int, tokenizer: Any | None = None
) -> list[tuple[int, int]]:
    """(index, number of tokens) of every text of more than `limit` tokens.

    `tokenizer` is that of a text encoder (transformers); without one the number is an estimate
    from words.
    """
    counts: list[int] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = list(texts[start : start + _TEXTS_AT_ONCE])
        if tokenizer is None:
            counts += [_estimate(text) for text in part]
        else:
            counts += [len(ids) for ids in tokenizer(part, verbose=False)["input_ids"]]
    return [(index, count) for index, count in enumerate(counts) if count > limit]


def too_long_notes(
    texts: Sequence[str], limit: int, tokenizer: Any | None = None
) -> tuple[str, ...]:
    """One sentence on the texts that the text encoder will cut, or none."""
    found = too_long(texts, limit, tokenizer)
    if not found:
        return ()
    index, count = max(found, key=lambda each: each[1])
    start = texts[index] if len(texts[index]) <= 50 else f"{texts[index][:47]}..."
    about = "" if tokenizer is not None else "about "
    return (
        f"{counted(len(found), 'prompt')} with more than the {limit} tokens that the text encoder "
        f"reads will be cut there (the longest, {start!r}, has {about}{count})",
    )


def _estimate(text: str) -> int:
    """Tokens of a text, and the one that ends it, by its words."""
    unspaced = len(_UNSPACED.findall(text))
    return math.ceil(len(_UNSPACED.sub(" ", text).split()) * TOKENS_PER_WORD) + unspaced + 1


def encode_entries(
    teacher: Teacher,
    entries: Sequence[PromptEntry],
    size: tuple[int, int, int] | None = None,
    guidance: float | None = None,
    later: bool = False,
    monitor: Monitor = silent,
) -> PromptEncoding:
    """Entries as prompts of the teacher, those with an image by its image encoders.

    Args:
        teacher: with text encoders, and for images with a VAE and a family that takes them.
        size: (frames, height, width) of the videos, needed for images: their middle is taken and
            brought to that size.
        guidance: embedded guidance to ask for; None is the family's default.
        later: encode prompts when their conditions are asked for, for any number of them. Images
            are only read, one after the other, for their ids and to know which can be read.
        monitor: follows that reading.

    Raises:
        AccVideoError: the teacher lacks an encoder or takes no image or none of this size, or no
            image can be read.
    """
    images = sum(entry.image is not None for entry in entries)
    if images and size is None:
        raise AccVideoError("prompts with images need the size of the videos; give it")
    if images and size is not None:
        teacher.check_images(*size)
    teacher.check_encoders()
    scale = teacher.model.family.guidance if guidance is None else guidance
    encode = _Encoder(teacher, size, guidance)
    prompts: list[LatePrompt] = []
    faults: list[str] = []
    for number, entry in enumerate(entries, start=1):
        try:
            prompts.append(LatePrompt(_id(entry), entry.text, scale, encode, entry.image))
        except AccVideoError as error:
            faults.append(str(error))
        if images:
            monitor(Progress("read images", number, len(entries)))
    if not prompts:
        raise AccVideoError(f"none of the {images} images can be read; {faults[0]}")
    made = _encoding(prompts, faults)
    return made if later else replace(made, prompts=tuple(encoded(made.prompts)))


@dataclass(frozen=True, slots=True, eq=False)
class _Encoder:
    """How a teacher encodes prompts for videos of one size."""

    teacher: Teacher
    size: tuple[int, int, int] | None
    guidance: float | None

    def __call__(self, prompts: Iterable[LatePrompt]) -> Iterator[Prompt]:
        asked, given = tee(prompts)
        frames = self.size[0] if self.size else 1
        made = self.teacher.encode_each(map(self._input, given), frames, self.guidance)
        for prompt, one in zip(asked, made, strict=True):
            yield replace(one, id=prompt.id)

    def _input(self, prompt: LatePrompt) -> tuple[str, Tensor | None]:
        """Text and image of a prompt, if it is still the image that gave it its id."""
        if prompt.image is None or self.size is None:
            return prompt.text, None
        if image_prompt_id(prompt.text, prompt.image) != prompt.id:
            raise AccVideoError(
                f"{prompt.image} is not the image that it was when recording began; leave images "
                "alone until they are recorded, and start again"
            )
        return prompt.text, fitted(read_image(prompt.image), *self.size[1:])


def _id(entry: PromptEntry) -> str:
    """The id of a prompt. Raises AccVideoError for an image that cannot be read."""
    if entry.image is None:
        return text_id(entry.text)
    read_image(entry.image)
    return image_prompt_id(entry.text, entry.image)


def image_prompt_id(text: str, image: Path) -> str:
    """The id of a prompt with an image: 16 hex digits that follow from its text and its file.

    They do not follow from what it is encoded to, so that they are known before, and other
    hardware, whose encodings differ in the last bits, goes on with the same dataset.
    """
    with disk_errors("read", image):
        return hashlib.sha256(text.encode() + b"\0" + image.read_bytes()).hexdigest()[:16]


def _encoding(prompts: Sequence[AnyPrompt], faults: Sequence[str]) -> PromptEncoding:
    notes = []
    if faults:
        left = counted(len(faults), "image")
        notes.append(f"left out {left} that cannot be read ({faults[0]})")
    distinct = {prompt.id: prompt for prompt in prompts}
    same = len(prompts) - len(distinct)
    if same:
        notes.append(f"left out {counted(same, 'prompt')} given before already")
    return PromptEncoding(tuple(distinct.values()), tuple(notes))

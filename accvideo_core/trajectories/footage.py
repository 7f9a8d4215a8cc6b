"""Footage: the videos of a folder with their captions, looked at before any clip is cut.

What cannot be used is never an error by itself: it is told with its reason, file by file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import AccVideoError
from ..files import disk_errors
from ..monitor import Monitor, Progress, silent
from ..video_reading import BrokenVideo, Scan, scan
from .clips import Cutting
from .prompt_files import counted, decoded_text, is_hidden, listed, listed_captions, one_line

VIDEO_SUFFIXES = tuple(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .m2ts .mts .wmv .flv .ogv .3gp .gif".split()
)
CAPTION_SUFFIXES = (".txt", ".caption")
"""Of the file beside a video that holds its caption, the first that is there."""
_PIECE = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestSpec:
    """What to make of videos: clips of `frames` frames of `height` x `width` pixels."""

    frames: int
    height: int
    width: int
    cutting: Cutting = field(default_factory=Cutting)
    clips: int | None = None
    """At most so many clips of each video; None is all that fit."""
    caption: str | None = None
    """Caption of videos that have none. None leaves them out, but for families that begin with an
    image, which get an empty one."""
    dtype: str = "bfloat16"
    guidance: float | None = None
    """Embedded guidance; None is the family's."""

    def __post_init__(self) -> None:
        if self.clips is not None and self.clips < 1:
            raise AccVideoError(f"clips is {self.clips}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Source:
    """A video of which clips are made."""

    path: Path
    name: str
    """Path below the folder, with / between folders."""
    sha256: str
    """Of the file's content."""
    key: str
    """16 hex digits that follow from content, caption and settings, and begin the ids of its
    clips' prompts."""
    text: str
    scan: Scan
    clips: int
    stamp: tuple[int, int]
    """Bytes and time of the file when it was looked at."""

    def prompt_id(self, number: int) -> str:
        """The id of one clip's prompt, which is the clip's own."""
        return f"{self.key}-{number:04d}"

    @property
    def prompt_ids(self) -> tuple[str, ...]:
        return tuple(map(self.prompt_id, range(self.clips)))

    def check_unchanged(self) -> None:
        """Raise BrokenVideo when it is not the file any more that was looked at."""
        if not self.path.is_file() or _stamp(self.path) != self.stamp:
            raise BrokenVideo(f"{self.path} was changed meanwhile; start again")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A video, or some clips of it, that are not used, and why."""

    name: str
    reason: str
    """One sentence."""
    clips: tuple[int, ...] = ()
    """Numbers of the clips; none is the whole video."""

    def __str__(self) -> str:
        """One line, whatever the file is called."""
        which = f", clips {listed(self.clips)}" if self.clips else ""
        return f"{_printable(self.name)}{which}: {_printable(self.reason)}"


@dataclass(frozen=True, slots=True)
class Footage:
    """What a folder holds."""

    sources: tuple[Source, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = field(default=())
    """Sentences on what is used otherwise than one may think."""


def look_at(folder: Path, spec: IngestSpec, out: Path, monitor: Monitor = silent) -> Footage:
    """Every video in `folder` and below, in the order of their paths.

    A video that is there twice with the same caption is used once. The monitor is called for every
    video; it may raise.

    Args:
        out: a folder that is left out, because it may lie in this one.

    Raises:
        AccVideoError: there is no video, none can be used, or the list of captions is damaged.
    """
    paths = _videos(folder, out)
    captions = listed_captions(folder, None)
    found: dict[str, Source] = {}
    skipped: list[Skipped] = []
    for number, path in enumerate(paths, start=1):
        name = path.relative_to(folder).as_posix()
        try:
            source = _source(path, name, captions.pop(os.path.abspath(path), []), spec)
            first = found.setdefault(source.key, source)
            if first is not source:
                skipped.append(Skipped(name, f"it is the same video as {first.name}"))
        except AccVideoError as error:
            # The name is told already.
            skipped.append(Skipped(name, str(error).replace(f"{path} ", "it ")))
        monitor(Progress("scan", number, len(paths)))
    if not found:
        raise AccVideoError(
            f"none of the {counted(len(paths), 'video')} in {folder} can be used; {skipped[0]}"
        )
    notes = _notes(list(found.values()), spec, len(captions))
    return Footage(tuple(found.values()), tuple(skipped), notes)


def source_facts(source: Source) -> dict[str, object]:
    """Where a source's clips come from, as `videos.jsonl` says it."""
    seen, timing = source.scan, source.scan.timing
    return {
        "id": source.key,
        "video": source.name,
        "sha256": source.sha256,
        "caption": source.text,
        "clips": source.clips,
        "height": seen.height,
        "width": seen.width,
        "frames": timing.frames,
        "fps": round(timing.rate, 4),
    }


def _videos(folder: Path, out: Path) -> list[Path]:
    if not folder.is_dir():
        raise AccVideoError(f"there is no folder {folder}; check the path")
    inside = out.absolute()
    with disk_errors("read", folder):
        found = [p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES]
    found = [p for p in found if not is_hidden(p.relative_to(folder)) and p.is_file()]
    found = [p for p in found if inside not in p.absolute().parents]
    if not found:
        raise AccVideoError(
            f"{folder} holds no videos ({' '.join(VIDEO_SUFFIXES)}); give a folder of videos"
        )
    return sorted(found)


def _source(path: Path, name: str, captions: Sequence[str], spec: IngestSpec) -> Source:
    """A video that clips can be cut of. Raises AccVideoError with the reason where none can."""
    seen = scan(path)
    if seen.timing.frames < 0.99 * seen.stated:
        raise BrokenVideo(f"{path} breaks off after {seen.timing.frames} of {seen.stated} frames")
    clips = spec.cutting.count(seen.timing, spec.frames)
    if clips == 0:
        rate = spec.cutting.rate(seen.timing)
        lasts = seen.timing.end - seen.timing.first
        raise AccVideoError(
            f"{path} lasts {lasts:.2f} s, less than the {spec.frames / rate:.2f} s of a clip "
            f"({spec.frames} frames at {rate:.3g} a second)"
        )
    text = _caption(path, captions, spec)
    stamp, sha256 = _stamp(path), _sha256(path)
    asked = {**asdict(spec.cutting), "size": [spec.frames, spec.height, spec.width]}
    told = json.dumps([sha256, text, asked], sort_keys=True)
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    most = clips if spec.clips is None else min(clips, spec.clips)
    return Source(path, name, sha256, key, text, seen, most, stamp)


def _caption(path: Path, listed_ones: Sequence[str], spec: IngestSpec) -> str:
    beside = (path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
    own = next((file for file in beside if file.is_file()), None)
    texts = [one_line(decoded_text(own))] if own else list(listed_ones)
    text = next((text for text in texts if text), spec.caption)
    if text is None:
        raise AccVideoError(
            f"{path} has no caption; write it into {path.with_suffix('.txt').name}, or give one "
            "for all videos without"
        )
    return text


def _notes(sources: Sequence[Source], spec: IngestSpec, left: int) -> tuple[str, ...]:
    def those(text: str, chosen: Sequence[Source]) -> list[str]:
        names = listed(_printable(source.name) for source in chosen)
        return [f"{counted(len(chosen), 'video')} {text} {names}"] if chosen else []

    small = [s for s in sources if s.scan.height < spec.height or s.scan.width < spec.width]
    slow = [s for s in sources if spec.cutting.rate(s.scan.timing) > 1.01 * s.scan.timing.rate]
    notes = those(f"smaller than {spec.height} x {spec.width} will be enlarged", small)
    notes += those("with fewer frames a second than asked for will have some twice", slow)
    if left:
        notes.append(f"left out {counted(left, 'caption')} of no video that is there")
    return tuple(notes)


def _stamp(path: Path) -> tuple[int, int]:
    with disk_errors("read", path):
        file = path.stat()
    return file.st_size, file.st_mtime_ns


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with disk_errors("read", path), open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _printable(text: str) -> str:
    """On one line, with what no terminal shows written as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

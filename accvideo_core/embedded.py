"""The teachers that ship with the package, by the names under which the terminal knows them.

Without torch, so that the terminal answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_ASSETS = Path(__file__).resolve().parent / "assets"


@dataclass(frozen=True, slots=True)
class Embedded:
    """A pipeline folder, and the clips that it knows."""

    folder: str
    frames: int
    size: int
    """Height and width in pixels."""

    @property
    def path(self) -> Path:
        return _ASSETS / self.folder


TINY = Embedded("tiny_hunyuan_video", 17, 32)
TINY_SVD = Embedded("tiny_svd", 8, 32)
EMBEDDED = {"tiny": TINY, "tiny-svd": TINY_SVD}


def teacher_path(text: str) -> Path:
    """Where a teacher lies that is named so: an embedded one, unless a file has its name."""
    path = Path(text)
    known = EMBEDDED.get(text)
    return path if known is None or path.exists() else known.path


def embedded_at(folder: Path) -> Embedded | None:
    """The embedded teacher that lies there."""
    place = folder.resolve()
    return next((one for one in EMBEDDED.values() if one.path == place), None)

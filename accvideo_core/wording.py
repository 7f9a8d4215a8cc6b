"""Lists and settings as a person writes them, for sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def listed(parts: Sequence[str], last: str = "or") -> str:
    """a, b or c."""
    return f" {last} ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def changes(settings: Mapping[str, Any]) -> str:
    """batch to 1 and swap_blocks to 12."""
    return listed([f"{name} to {value}" for name, value in settings.items()], "and")

"""Empty files where the notes of the workflows say that a user's files go.

A workflow that names a file in a loader, but not in its note, then fails validation.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

NAMED = re.compile(r"`((?:input|[a-z_]+)/[^`/]+\.(?:safetensors|pt|png))`")


def named_files(workflow: Path) -> set[str]:
    """`folder/file` of everything that the notes of an API workflow ask for."""
    prompt = json.loads(workflow.read_text(encoding="utf-8"))
    notes = [entry["_meta"].get("note", "") for entry in prompt.values()]
    return {name for note in notes for name in NAMED.findall(note)}


def put_placeholders(workflows: Path, base: Path) -> None:
    """Make the files that the API workflows in a folder name, below a server's base folder."""
    for name in {name for path in workflows.glob("*.json") for name in named_files(path)}:
        path = base / name if name.startswith("input/") else base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

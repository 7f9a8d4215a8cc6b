"""A training state in one file, written beside and renamed, so that a kill never harms it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch


class Checkpoint:
    """Everything with a ``state_dict`` that a run must find again, and its step and seconds."""

    def __init__(self, path: Path, parts: dict[str, Any]) -> None:
        self.path, self.parts = path, parts
        self.step, self.seconds = 0, 0.0
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, self.seconds = state["step"], state["seconds"]
        self._resumed, self._before = time.monotonic(), self.seconds
        self._saved = self._resumed

    def advance(self) -> None:
        """Count one finished step."""
        self.step += 1
        self.seconds = self._before + time.monotonic() - self._resumed

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        beside = self.path.with_suffix(".tmp")
        torch.save(state | {"step": self.step, "seconds": self.seconds}, beside)
        os.replace(beside, self.path)
        self._saved = time.monotonic()

    def save_now_and_then(self, every_seconds: float = 180.0) -> None:
        if time.monotonic() - self._saved > every_seconds:
            self.save()

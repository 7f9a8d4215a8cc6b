"""A teacher for recording with many workers that meets with an accident when a file asks it to."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor

from accvideo_core.conditioning import Condition
from accvideo_core.errors import AccVideoError
from tests.analytic import GaussianFlow, analytic_model

STEPS = 4
"""Of the teacher in these tests; an accident happens in the middle of a batch."""


@dataclass(frozen=True)
class Accidents:
    """The Gaussian model. An accident's file in `folder` makes the first worker that finds it
    have that accident, once; "every ..." makes all of them."""

    folder: Path
    seconds: float = 0.0
    """Of every teacher step."""
    together: int = 1
    """Workers that have to be at work before any of them goes on."""

    def load(self) -> SimpleNamespace:
        if (self.folder / "refuse").exists():
            raise AccVideoError("teacher 'gone' does not exist; check the path")
        self._note("loaded")
        return SimpleNamespace(model=analytic_model(_Flow(self)))

    @property
    def loaded(self) -> list[int]:
        """Process ids of the workers that came to load."""
        return self._noted("loaded")

    def begin(self) -> None:
        """A worker's first step: wait for the others."""
        self._note("begun")
        while len(self._noted("begun")) < self.together:
            time.sleep(0.01)

    def _note(self, name: str) -> None:
        with open(self.folder / name, "a") as file:
            file.write(f"{os.getpid()}\n")

    def _noted(self, name: str) -> list[int]:
        return [int(line) for line in (self.folder / name).read_text().splitlines()]

    def plan(self, *accidents: str) -> None:
        for name in accidents:
            (self.folder / name).touch()

    def happens(self, name: str) -> bool:
        """Whether it is this worker that has the accident; renaming makes sure it is one."""
        if (self.folder / f"every {name}").exists():
            return True
        try:
            (self.folder / name).rename(self.folder / f"was {name}")
        except FileNotFoundError:
            return False
        return True


class _Flow(GaussianFlow):
    def __init__(self, accidents: Accidents) -> None:
        super().__init__(0.5, 0.25)
        self.accidents = accidents
        self.calls = 0

    def flow(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.calls += 1
        if self.calls == 1:
            self.accidents.begin()
        time.sleep(self.accidents.seconds)
        # In its second batch, so that something is done already.
        if self.calls > STEPS + 1:
            if self.accidents.happens("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.accidents.happens("crash"):
                raise RuntimeError("CUDA error: an illegal memory access\nand a long explanation")
            if self.accidents.happens("hang"):
                threading.Event().wait(600)
        return super().flow(x, t, cond)

"""What a study is: the experiments on one paper, which the lab runs without knowing which."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..conditioning import Prompt
from ..distill.recipes import Recipe
from ..evaluate.judge import Judge
from ..flow import Times
from ..guidance import Guided
from ..models.loading import Teacher
from ..models.video_model import Family, VideoModel
from ..monitor import Monitor
from ..trajectories.store import TrajectoryDataset
from .arms import Arm, Question

if TYPE_CHECKING:
    from .lab import Lab
    from .page import Results

PER_PROMPT = 2
"""Clips of every prompt that arms are measured on."""
NOISE_SEED = 1
"""Of these clips; not a dataset's: training has never seen this noise."""


class Amounts(Protocol):
    """How large the experiments are; it is stored in the folder of the results."""

    @property
    def prompts(self) -> int:
        """That arms are measured on."""
        ...

    @property
    def real_clips(self) -> int:
        """That the Frechet distance is taken to."""
        ...

    def as_dict(self) -> dict[str, Any]: ...


class Study(Protocol):
    """A teacher, its world, and what is trained, measured and asked there."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str:
        """Of the page."""
        ...

    @property
    def quick(self) -> tuple[str, ...]:
        """Questions that the preset quick answers."""
        ...

    @property
    def setting(self) -> Amounts: ...

    @staticmethod
    def teacher_folder() -> Path: ...

    def arms(self, teacher: VideoModel) -> dict[str, Arm]:
        """Every arm by name, those that others need first."""
        ...

    def questions(self) -> dict[str, Question]:
        """Every question by name, in the page's order."""
        ...

    def asked(self, teacher: Teacher) -> VideoModel | Guided:
        """The teacher as it is sampled."""
        ...

    def times(self, arm: Arm, family: Family) -> Times:
        """The falling times that an arm is sampled at."""
        ...

    def recipe(self, arm: Arm, seed: int, times: Times) -> Recipe:
        """How an arm is trained."""
        ...

    def dataset(
        self, name: str, teacher: Teacher, folder: Path, monitor: Monitor, /
    ) -> TrajectoryDataset:
        """What arms learn from; complete, or gone on with until it is."""
        ...

    def texts(self) -> list[str]:
        """What the prompts that arms are measured on are called."""
        ...

    def prompts(self, teacher: Teacher) -> list[Prompt]:
        """These prompts, encoded."""
        ...

    def judge(self) -> Judge:
        """Who knows what clips of these prompts should show."""
        ...

    def sections(self, lab: Lab, page: Path, monitor: Monitor) -> list[str]:
        """What the page shows before the questions."""
        ...

    def remarks(self, question: Question, results: Results, page: Path, /) -> list[str]:
        """Paragraphs of the page on a question, before its sentences."""
        ...

    def introduction(self, fingerprint: str) -> str:
        """What the page says of the teacher and of how much was done."""
        ...

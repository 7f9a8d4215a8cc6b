"""Arms and questions: the rows of the tables, and what some of them answer together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..distill.recipes import Recipe, preset
from ..errors import AccVideoError
from ..flow import Times

FULL_TEACHER = "teacher"
"""The arm that all others are set beside: the teacher on its family's own grid."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of a table: the teacher at some steps, or a student of every seed."""

    name: str
    title: str
    steps: int
    """That its clips are sampled in."""
    recipe: str | None = None
    """Preset that it is trained by; None for the teacher, and for a student of another arm."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the preset that are changed."""
    start: str | None = None
    """The arm whose student of the same seed it starts from; None starts from the teacher."""
    dataset: str = "dataset"
    """Which of the study's datasets it learns from."""
    student: str | None = None
    """The arm whose student of the same seed it is, sampled in other steps."""

    @property
    def seeded(self) -> bool:
        """Whether there is one of every training seed."""
        return self.recipe is not None or self.student is not None

    def trained_by(self, times: Times, **common: Any) -> Recipe:
        """Its preset at its own key `times`, with fields that all arms have in `common`."""
        assert self.recipe is not None
        own = {"name": self.name, "student_steps": self.steps, "key_times": times}
        often = {"checkpoint_every": 20, "keep_checkpoints": 1}
        return replace(preset(self.recipe), **{**own, **often, **common, **self.changes})

    @property
    def needs(self) -> str | None:
        """The arm that comes before it."""
        return self.start or self.student


@dataclass(frozen=True, slots=True)
class Question:
    """What some arms answer together."""

    name: str
    title: str
    text: str
    """What is asked, and what was done about it."""
    rows: tuple[str, ...]
    """Arms of its table."""
    pairs: tuple[tuple[str, str], ...]
    """(arm, the one that it is set against)."""
    claim: bool = False
    """Whether the paper says that the first of every pair is better."""
    titles: dict[str, str] = field(default_factory=dict)
    """What arms are called here, where that is not their title."""

    def called(self, arm: Arm) -> Arm:
        """The arm under the name that it has here."""
        return replace(arm, title=self.titles.get(arm.name, arm.title))


def needed(questions: Sequence[Question], arms: Mapping[str, Arm]) -> list[Arm]:
    """The arms that these questions need, with those that they need themselves.

    `arms` lists those that others need first; so does the result.
    """
    names = {FULL_TEACHER, *(row for question in questions for row in question.rows)}
    for name, arm in reversed([*arms.items()]):
        if name in names and arm.needs is not None:
            names.add(arm.needs)
    return [arm for name, arm in arms.items() if name in names]


def chosen(names: Sequence[str], questions: Mapping[str, Question]) -> list[Question]:
    """The questions called so, in the page's order."""
    for name in names:
        if name not in questions:
            raise AccVideoError(
                f"there is no question {name!r}; choose of {', '.join(questions)}"
            )
    return [question for name, question in questions.items() if name in names]


def in_steps(count: int) -> str:
    """`1 step`, `5 steps`."""
    return f"{count} step" + "s" * (count > 1)

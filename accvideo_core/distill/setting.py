"""Setting: what an objective is built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..flow import Times
from ..models.video_model import VideoModel
from ..ranks import ALONE, Ranks
from .batch import KeyBatch, KeyStates
from .optimiser import Average
from .recipes import Recipe


@dataclass(frozen=True, slots=True)
class Setting:
    """A run as an objective sees it."""

    recipe: Recipe
    teacher: VideoModel
    """Frozen."""
    key_times: Times
    """The student's, falling."""
    real: Callable[[int], KeyBatch]
    """So many recorded samples, by which heads learn the scale of what they look at."""
    states: KeyStates | None = None
    """Of the run's dataset; None where an update is only rehearsed."""
    average: Average | None = None
    """Running average of the student's weights, where the recipe asks for it."""
    ranks: Ranks = ALONE

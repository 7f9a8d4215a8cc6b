"""What an objective is: the phases of an update, and the terms that each backpropagates.

An objective yields its terms one by one and each is backpropagated before the next is computed, so
that only one of their graphs is in memory; the gradients are those of the weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from .batch import KeyBatch
from .student import Student


@dataclass(frozen=True, slots=True)
class Term:
    """One scalar loss, and whose parameters it trains: the student's, or the heads'."""

    name: str
    loss: Tensor
    weight: float = 1.0
    trains_heads: bool = False
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars worth a line in the metrics."""

    def measured(self) -> dict[str, Tensor]:
        """What the metrics show of it; "loss" is its part of what the student minimises."""
        found = {self.name: self.loss.detach(), **self.figures}
        return found if self.trains_heads else {**found, "loss": self.weight * self.loss.detach()}


Terms = Callable[[Student, KeyBatch, int], Iterator[Term]]
"""(student, batch, k) -> terms, for the key interval from t'_{k+1} to t'_k."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Part of an update after which whoever was trained takes an optimiser step."""

    terms: Terms
    draw: str = ""
    """Phases of one name read the same batch; "" is the update's own."""


class Objective(Protocol):
    """What the trainer minimises."""

    @property
    def phases(self) -> Sequence[Phase]:
        """The phases of every update, in order."""
        ...

    @property
    def heads(self) -> nn.Module | None:
        """What is trained beside the student."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What it remembers from one update to the next, beside weights: CPU tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        ...

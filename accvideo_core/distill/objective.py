"""What an objective is: the terms that one step backpropagates.

An objective yields its terms one by one and each is backpropagated before the next is computed, so
that only one of their graphs is in memory; the gradients are those of the weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

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


Objective = Callable[[Student, KeyBatch, int], Iterator[Term]]
"""(student, batch, k) -> terms, for the key interval from t'_{k+1} to t'_k."""

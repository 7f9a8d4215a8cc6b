"""A figure over training seeds, and the difference of two arms, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; more take the last."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean and half of its 95 % interval."""

    mean: float
    margin: float
    """Infinite where one value tells no interval."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Student's interval of the mean of independent values, one for each training seed."""
        n = len(values)
        if n < 2:
            return cls(mean(values), math.inf)
        quantile = _STUDENT[min(n - 1, len(_STUDENT)) - 1]
        return cls(mean(values), quantile * stdev(values) / math.sqrt(n))

    @property
    def low(self) -> float:
        return self.mean - self.margin

    @property
    def high(self) -> float:
        return self.mean + self.margin

    @property
    def told(self) -> bool:
        """Whether there is an interval, and 0 is outside."""
        return math.isfinite(self.margin) and (self.low > 0 or self.high < 0)

    def overlaps(self, other: Spread) -> bool:
        """Whether the two intervals have a value in common."""
        return self.low <= other.high and other.low <= self.high

    def text(self, share: bool = False, signed: bool = False) -> str:
        """`2.52 [2.41, 2.63]`, or as percent; without the interval where it is unknown."""
        scale, unit = (100.0, " %") if share else (1.0, "")
        sign = "+" if signed else ""

        def number(x: float) -> str:
            return f"{scale * x:{sign}.3g}"

        if math.isinf(self.margin):
            return f"{number(self.mean)}{unit}"
        return f"{number(self.mean)}{unit} [{number(self.low)}, {number(self.high)}]"


def paired(a: Sequence[float], b: Sequence[float]) -> Spread:
    """a - b over seeds that both arms share; one value of `b` stands for all seeds (a teacher)."""
    each = [b[0]] * len(a) if len(b) == 1 else b
    return Spread.of([x - y for x, y in zip(a, each, strict=True)])

"""What the one-dimensional experiment is run with, and its presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import AccVideoError

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, slots=True)
class ToySettings:
    """Every number of the experiment; the result follows from them alone."""

    seed: int = 0
    """Of weights, noise and batches."""
    width: int = 64
    """Channels of the network. The paper does not say its own."""
    teacher_updates: int = 3000
    """Updates of the teacher (10,000 in the paper)."""
    teacher_lr: float = 2e-3
    """Adam's learning rate for the teacher (1e-4 in the paper)."""
    batch_size: int = 512
    """Points per update, of the teacher and of the students (2048 in the paper)."""
    student_updates: int = 1000
    """Updates of each student. The paper does not say its own."""
    student_lr: float = 1e-3
    """Adam's learning rate for the students. The paper does not say its own."""
    schedule: str = "cosine"
    """Learning rates fall to zero by a cosine, or stay: "constant", as the paper names no fall."""
    steps: int = 50
    """Euler steps of the teacher from noise to data."""
    windows: int = 5
    """Steps of the students; each learns the teacher's mean velocity over steps / windows."""
    mismatches: tuple[float, ...] = (0.0, 0.75, 1.5, 2.25, 3.0)
    """Degrees of mismatch M (Eq. 4) at which useless points are counted."""
    student_mismatches: tuple[float, ...] = (0.0, 1.5, 3.0)
    """Degrees of mismatch M at which students are distilled, as in Figure 2 (f)."""
    points: int = 8192
    """Points per degree that are judged, and samples that a student is measured on."""
    tolerance: float = 0.5
    """Criterion "endpoint": a point is useless where the teacher takes it to an end farther than
    this from every training point. Also the largest fault of one prediction of x_0."""
    envelope: int = 256
    """Criterion "envelope": a point is useless where it lies outside the range that this many of
    the teacher's own trajectories cover at its time, for either of the two ends."""

    def __post_init__(self) -> None:
        for name in ("width", "teacher_updates", "batch_size", "student_updates", "windows"):
            self._need(name, getattr(self, name) >= 1, "at least 1")
        # Batch statistics need two points; the envelope needs a trajectory to either end.
        for name in ("batch_size", "points", "envelope"):
            self._need(name, getattr(self, name) >= 16, "at least 16")
        for name in ("teacher_lr", "student_lr", "tolerance"):
            self._need(name, 0 < getattr(self, name) < float("inf"), "positive")
        self._need("windows", self.steps % self.windows == 0, f"a divisor of {self.steps} steps")
        self._need("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        for name in ("mismatches", "student_mismatches"):
            degrees = getattr(self, name)
            inside = all(0 <= degree < 6 for degree in degrees)
            rising = all(a < b for a, b in zip(degrees, degrees[1:], strict=False))
            self._need(name, bool(degrees) and inside and rising, "rising, from 0 to below 6")

    def as_dict(self) -> dict[str, Any]:
        """As JSON reads it back."""
        fields = asdict(self).items()
        return {name: list(x) if isinstance(x, tuple) else x for name, x in fields}

    def _need(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise AccVideoError(f"{name} is {getattr(self, name)}, but it must be {wanted}")


PRESETS: dict[str, ToySettings] = {
    "short": ToySettings(),
    "paper": ToySettings(
        teacher_updates=10_000, teacher_lr=1e-4, batch_size=2048, schedule="constant"
    ),
}
"""`short` for a laptop; `paper` with the published updates, batch and learning rate."""

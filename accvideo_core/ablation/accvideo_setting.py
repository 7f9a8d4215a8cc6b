"""How large the experiments on AccVideo are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import AccVideoError


@dataclass(frozen=True, slots=True)
class Setting:
    """What all arms have in common; it is stored in the folder of the results."""

    trajectories: int = 512
    """That every arm learns from, unless their number is the question."""
    counts: tuple[int, ...] = (64, 256, 1024, 2048)
    """Other numbers of trajectories; the largest of all is recorded."""
    updates: int = 400
    """Of trajectory guidance."""
    tune_updates: int = 120
    """After that, with the adversarial term or without."""
    batch: int = 16
    prompts: int = 128
    """That students are measured on, two clips of each, with noise that training never saw."""
    real_clips: int = 1024
    """That the Frechet distance is taken to."""
    student_steps: int = 5
    """m, unless the steps are the question."""
    other_steps: tuple[int, ...] = (1, 2, 3, 8)

    def __post_init__(self) -> None:
        numbers = asdict(self)
        for name, value in numbers.items():
            least = min(value) if isinstance(value, tuple) else value
            if least < 1:
                raise AccVideoError(f"setting.{name} is {value}; it must be at least 1")
        if self.recorded % self.samples:
            raise AccVideoError(
                f"{self.recorded} trajectories are not {self.samples} of every prompt; make the "
                f"largest of trajectories and counts a multiple of {self.samples}"
            )

    @property
    def recorded(self) -> int:
        """Trajectories in the dataset."""
        return max(self.trajectories, *self.counts)

    @property
    def samples(self) -> int:
        """Of every prompt: as many prompts as possible, up to 256, and at least 2 samples."""
        return max(2, -(-self.recorded // 256))

    def kept(self, teacher_steps: int) -> tuple[int, ...]:
        """Steps of the teacher whose states are recorded: every student's key times."""
        all_steps = (self.student_steps, *self.other_steps)
        return tuple(sorted({i for m in all_steps for i in key_steps(teacher_steps, m)}))

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        values = asdict(self)
        return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}


def key_steps(teacher_steps: int, m: int) -> tuple[int, ...]:
    """m + 1 of the teacher's steps, evenly; where m does not divide them, the nearest ones."""
    return tuple(round(i * teacher_steps / m) for i in range(m + 1))


PRESETS: dict[str, Setting] = {
    "quick": Setting(
        trajectories=64,
        counts=(16, 32),
        updates=60,
        tune_updates=20,
        batch=8,
        prompts=32,
        real_clips=256,
    ),
    "full": Setting(),
}

"""How large the experiments on SF-V are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import AccVideoError


@dataclass(frozen=True, slots=True)
class SfvSetting:
    """What all arms have in common; it is stored in the folder of the results."""

    clips: int = 2048
    """Real ones that students learn from."""
    synthetic: int = 512
    """The teacher's own clips, which LADD takes for real ones."""
    updates: int = 600
    batch: int = 16
    prompts: int = 128
    """First frames that students are measured on, two clips of each, which training never saw."""
    real_clips: int = 1024
    """That the Frechet distance is taken to."""
    teacher_steps: tuple[int, ...] = (16, 8, 4, 2, 1)
    """That the teacher is shown at beside its own."""
    student_steps: tuple[int, ...] = (1, 2, 4, 8)
    """That the methods are compared at."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = min(value) if isinstance(value, tuple) else value
            if least < 1:
                raise AccVideoError(f"setting.{name} is {value}; it must be at least 1")

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        values = asdict(self)
        return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}


PRESETS: dict[str, SfvSetting] = {
    "quick": SfvSetting(
        clips=64,
        synthetic=16,
        updates=40,
        batch=8,
        prompts=16,
        real_clips=256,
        teacher_steps=(4, 1),
        student_steps=(1, 4),
    ),
    "full": SfvSetting(),
}

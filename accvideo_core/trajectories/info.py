"""What all trajectories of one dataset have in common, as `dataset.json` holds it."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import torch

from ..errors import AccVideoError
from ..flow import Times, validate_times
from ..guidance import Cfg
from ..latents import LatentSpec
from .clips import Cutting

FORMAT = 2
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """What all records of a dataset have in common."""

    family: str
    teacher: str
    """Fingerprint of the teacher's weights."""
    teacher_source: str
    """Name of the teacher's folder, for people."""
    latent_spec: LatentSpec
    frames: int
    height: int
    width: int
    time_grid: Times
    """Every time at which the teacher was asked, from noise to data."""
    kept: tuple[int, ...]
    """Indices in `time_grid` of the states that are stored."""
    guidance: float | None
    """Embedded guidance of every prompt, or None for a family without."""
    cfg: Cfg | None = None
    """Classifier-free guidance of the teacher, or None."""
    negative: str | None = None
    """Id of the negative prompt that goes with `cfg`."""
    seed: int
    batch_size: int
    """Records computed together. It decides the last bits, so it belongs to the dataset."""
    dtype: str
    cutting: Cutting | None = None
    """How clips were cut from videos, for a dataset that no teacher made; else None."""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        validate_times(self.time_grid)
        self.latent_spec.shape(self.frames, self.height, self.width)
        if self.dtype not in DTYPES:
            raise AccVideoError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        if self.batch_size < 1:
            raise AccVideoError(f"batch_size is {self.batch_size}; it must be at least 1")
        last = len(self.time_grid) - 1
        rising = all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        way = len(self.kept) >= 2 and rising and self.kept[0] == 0 and self.kept[-1] <= last
        if not way and self.kept != (last,):
            raise AccVideoError(
                f"kept states {list(self.kept)} must be rising indices from 0 (the noise) to at "
                f"most {last} (the data), at least two of them, or {last} alone"
            )

    @property
    def times(self) -> Times:
        """The K times at which states are stored."""
        return tuple(self.time_grid[i] for i in self.kept)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one state."""
        return self.latent_spec.shape(self.frames, self.height, self.width)

    def differences(self, other: DatasetInfo) -> list[str]:
        """Every setting that makes records of the two differ, as "seed 1 instead of 0"."""
        skip = ("versions", "teacher_source", "format")
        return [
            f"{name} {_short(getattr(other, name))} instead of {_short(getattr(self, name))}"
            for name in (f.name for f in fields(self) if f.name not in skip)
            if getattr(self, name) != getattr(other, name)
        ]

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form; `DatasetInfo.from_dict` reads it back."""
        data = {"format": self.format, **asdict(self)}
        return data if self.cutting else {k: x for k, x in data.items() if k != "cutting"}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DatasetInfo:
        """The inverse of `as_dict`."""
        changed = {
            "latent_spec": LatentSpec.from_dict(data["latent_spec"]),
            "time_grid": tuple(data["time_grid"]),
            "kept": tuple(data["kept"]),
            "cfg": Cfg(**data["cfg"]) if data.get("cfg") else None,
            "cutting": Cutting(**data["cutting"]) if data.get("cutting") else None,
        }
        return cls(**{**data, **changed})

    @classmethod
    def from_json(cls, data: Any, what: str) -> DatasetInfo:
        """What the file `what` holds. Raises AccVideoError when it is foreign, newer or older."""
        data = data if isinstance(data, dict) else {}
        version = data.get("format")
        if isinstance(version, int) and version != FORMAT:
            age, remedy = "newer", "update AccVideo"
            if version < FORMAT:
                age, remedy = "older", "record it again under another name"
            raise AccVideoError(
                f"{what} has format {version}, {age} than the {FORMAT} that this version reads; "
                f"{remedy}"
            )
        needed = [
            f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING
        ]
        lacking = [name for name in ("format", *needed) if name not in data]
        try:
            if not lacking:
                return cls.from_dict(data)
            reason = f"it lacks {', '.join(lacking)}"
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, AccVideoError):
                raise
            reason = str(error)
        raise AccVideoError(
            f"{what} does not describe a trajectory dataset, or one of an older version "
            f"({reason}); choose another folder, or record it again under another name"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""A profile's figures, as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .peaks import Peaks

GROUPS = ("text", "transfers", "network", "solver", "VAE", "writing")
"""In the order in which they come first."""
_LINES = 12
"""More steps than this are told together."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a run. `flops` and `bytes` are None where they do not apply or are not known."""

    group: str
    """One of `GROUPS`."""
    name: str
    """Parts of one name are of one kind."""
    start: float
    """Seconds from the beginning of the run."""
    seconds: float
    flops: float | None = None
    bytes: float | None = None
    """Moved within the device's memory; of a transfer between it and main memory."""
    step: int | None = None
    """Number of the step it is in, from 1."""
    time: float | None = None
    """Of that step, 1 noise and 0 data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Where the time of sampling one clip went."""

    what: str
    """The model and how it was sampled."""
    parts: tuple[Part, ...]
    seconds: float
    """From the prompt to the file."""
    warm_up: float
    """Seconds of what is paid once, before: loading text encoders, compiling, choosing kernels."""
    memory: int
    """The most bytes of tensors on the device at once, 0 where that is not known."""
    peaks: Peaks
    notes: tuple[str, ...] = ()

    def of_group(self, group: str) -> list[Part]:
        return [part for part in self.parts if part.group == group]

    def seconds_of(self, group: str) -> float:
        return sum(part.seconds for part in self.of_group(group))

    @property
    def unexplained(self) -> float:
        """Seconds that are in no part."""
        return self.seconds - sum(part.seconds for part in self.parts)

    def flops_share(self, parts: Sequence[Part]) -> float | None:
        """Operations a second of some parts, as a share of a large product's."""
        return self._share([part.flops for part in parts], parts, self.peaks.flops)

    def bytes_share(self, parts: Sequence[Part]) -> float | None:
        """Bytes a second of some parts, as a share of a copy's."""
        if any(part.group == "transfers" for part in parts):
            return None  # they go over another road, whose rate is known in each direction only
        return self._share([part.bytes for part in parts], parts, self.peaks.bytes)

    @staticmethod
    def _share(amounts: Sequence[float | None], parts: Sequence[Part], peak: float) -> float | None:
        known = [amount for amount in amounts if amount is not None]
        seconds = sum(part.seconds for part in parts)
        return sum(known) / seconds / peak if len(known) == len(parts) and seconds > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form, with what follows from it."""
        parts = [
            {
                **asdict(part),
                "flops_share": self.flops_share([part]),
                "bytes_share": self.bytes_share([part]),
            }
            for part in self.parts
        ]
        groups = {group: self.seconds_of(group) for group in GROUPS}
        return {**asdict(self), "parts": parts, "groups": groups, "unexplained": self.unexplained}

    def table(self) -> str:
        """For people; many steps are told together."""
        peaks = self.peaks
        head = [
            self.what,
            f"on {peaks.device}: {_rate(peaks.flops, 'FLOP/s')} in a {peaks.dtype} product of "
            f"{peaks.size} x {peaks.size}, {_rate(peaks.bytes, 'B/s')} in a copy" + _link(peaks),
            f"{'':34}{'seconds':>10}{'share':>8}{'TFLOP':>9}{'of peak':>9}{'GB':>9}{'of peak':>9}",
        ]
        lines = [
            self._line(name, parts)
            for group in GROUPS
            for name, parts in _rows(self.of_group(group)).items()
        ]
        lines.append(self._line("everything", self.parts, self.seconds))
        rest = f"{self.unexplained:.3f} s lie between the parts" if self.unexplained > 0 else ""
        once = f"once before: {self.warm_up:.2f} s"
        memory = f"at most {self.memory / 1e9:.2f} GB of tensors" if self.memory else ""
        tail = "; ".join(text for text in (once, memory, rest) if text)
        return "\n".join([*head, *lines, tail, *self.notes])

    def _line(self, name: str, parts: Sequence[Part], seconds: float | None = None) -> str:
        took = sum(part.seconds for part in parts) if seconds is None else seconds
        flops = [part.flops for part in parts if part.flops is not None]
        moved = [part.bytes for part in parts if part.bytes is not None]
        whole = seconds is not None
        cells = [
            f"{took:10.4f}{took / self.seconds:8.1%}",
            f"{sum(flops) / 1e12:9.3g}" if any(flops) else f"{'':9}",
            _percent(None if whole else self.flops_share(parts)),
            f"{sum(moved) / 1e9:9.3g}" if moved else f"{'':9}",
            _percent(None if whole else self.bytes_share(parts)),
        ]
        return f"{name[:33]:34}{''.join(cells)}".rstrip()


def _rows(parts: Sequence[Part]) -> dict[str, list[Part]]:
    """Label -> the parts of a line: each step of a few, all steps of a kind of many."""
    steps = {part.step for part in parts if part.step is not None}
    apart = len(steps) <= _LINES and all(part.group == "network" for part in parts)
    rows: dict[str, list[Part]] = {}
    for part in parts:
        label = part.name
        if part.step is not None and apart:
            label = f"step {part.step} (t {part.time:.3f}), {part.name}"
        rows.setdefault(label, []).append(part)
    return {
        label if len(row) == 1 or apart else f"{label} (x{len(row)})": row
        for label, row in rows.items()
    }


def _percent(share: float | None) -> str:
    return f"{'':9}" if share is None or share == 0 else f"{share:9.1%}"


def _rate(value: float, unit: str) -> str:
    """With a prefix, such as 790 TFLOP/s."""
    prefixes = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
    size, prefix = next((one for one in prefixes if value >= one[0]), prefixes[-1])
    return f"{value / size:.3g} {prefix}{unit}"


def _link(peaks: Peaks) -> str:
    if peaks.upload is None or peaks.download is None:
        return ""
    return f", {_rate(peaks.upload, 'B/s')} to the device and {_rate(peaks.download, 'B/s')} back"

"""Evaluating videos: one set, such as a student's, by another, such as its teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..errors import AccVideoError
from ..monitor import Monitor, Progress, silent
from .clips import Clip, UnusableClip
from .fvd import FEW, Detector
from .lpips import Lpips
from .measure import ClipFigures, Measured
from .video_evaluation import Evaluation, Side
from .yardsticks import PairYardstick, pair_yardsticks


@dataclass(frozen=True, eq=False)
class Tools:
    """What figures need beside the videos."""

    lpips: Lpips | None = None
    detector: Detector | None = None
    """Of FVD."""
    device: str = "cpu"


def evaluate_videos(
    reference: Sequence[Clip],
    judged: Sequence[Clip],
    folder: Path,
    tools: Tools | None = None,
    labels: tuple[str, str] = ("reference", "judged"),
    monitor: Monitor = silent,
) -> Evaluation:
    """Measure `judged` by `reference`.

    Videos of one name are a pair. Where there are pairs, nothing else is measured; where there are
    none, only the two sets are compared. A single video on each side is a pair, whatever its name.

    Args:
        folder: what was measured is kept in its folder `measured` and not measured again.
        labels: what the two sets are called.
        monitor: called after every video and every pair; it may raise.

    Raises:
        AccVideoError: none of the videos of a side can be measured.
    """
    tools = tools or Tools()
    ones, others, left_out = _matched(reference, judged)
    paired = list(ones) == list(others)
    yardsticks, notes = pair_yardsticks(tools.lpips)
    if not paired:
        notes.append("no video has the name of another, so that only the two sets are compared")
    counted = _Counted(monitor, len(ones) + len(others) + len(ones) * paired)
    work = _Work(Measured(folder / "measured"), tools, counted, left_out)
    one, other = (work.side(*each) for each in zip(labels, (ones, others), strict=True))
    if paired:
        both = one.figures.keys() & other.figures.keys()
        one, other = _only(one, both), _only(other, both)
    if not (one.figures and other.figures):
        raise AccVideoError(f"no video can be measured; of the last one it is said: {left_out[-1]}")
    pairs = dict(work.pairs(one, other, yardsticks)) if paired else {}
    return Evaluation(
        one,
        other,
        yardsticks=yardsticks,
        pairs=pairs,
        detector=tools.detector.digest if tools.detector else None,
        left_out=left_out,
        notes=notes + _notes(one, other),
    )


def _matched(
    reference: Sequence[Clip], judged: Sequence[Clip]
) -> tuple[dict[str, Clip], dict[str, Clip], list[str]]:
    """Both sides by name, in one order, and a sentence for every video that has no partner."""
    if len(reference) == len(judged) == 1:
        return {judged[0].name: reference[0]}, {judged[0].name: judged[0]}, []
    ones, others = ({clip.name: clip for clip in side} for side in (reference, judged))
    both = [name for name in ones if name in others]
    if not both:
        return ones, others, []
    alone = [f"{name} is among the reference's videos only" for name in ones if name not in others]
    alone += [f"{name} is among the judged videos only" for name in others if name not in ones]
    return {name: ones[name] for name in both}, {name: others[name] for name in both}, alone


@dataclass(eq=False)
class _Counted:
    """A monitor of so many steps."""

    monitor: Monitor
    total: int
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        self.monitor(Progress("evaluate", self.done, self.total))


@dataclass(eq=False)
class _Work:
    measured: Measured
    tools: Tools
    step: _Counted
    left_out: list[str] = field(default_factory=list)

    def side(self, label: str, clips: Mapping[str, Clip]) -> Side:
        """The figures of every video, and its features for FVD."""
        figures: dict[str, ClipFigures] = {}
        features: dict[str, Tensor] = {}
        for name, clip in clips.items():
            try:
                figures[name] = self.measured.clip(clip, self.tools.device)
                if self.tools.detector is not None:
                    features[name] = self.measured.features(clip, self.tools.detector)
            except UnusableClip as error:
                self.left_out.append(str(error))
            self.step()
        return Side(label, {name: clips[name] for name in figures}, figures, features)

    def pairs(
        self, reference: Side, judged: Side, yardsticks: Mapping[str, PairYardstick]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name of a pair, and its figures by yardstick."""
        for name, one in reference.figures.items():
            fault = _misfit(one, judged.figures[name])
            small = min(one.height, one.width)
            fitting = {key: x for key, x in yardsticks.items() if small >= x.smallest}
            if fault:
                self.left_out.append(f"{name} frame by frame: {fault}")
            else:
                self.left_out += [
                    f"{name} by {key}, which needs {x.smallest} pixels of height and width"
                    for key, x in yardsticks.items()
                    if key not in fitting
                ]
                clips = reference.clips[name], judged.clips[name]
                yield name, self.measured.pair(*clips, fitting, self.tools.device)
            self.step()


def _only(side: Side, names: set[str]) -> Side:
    """The videos whose partner can be measured too."""
    figures = {name: one for name, one in side.figures.items() if name in names}
    features = {name: x for name, x in side.features.items() if name in names}
    return Side(side.label, {name: side.clips[name] for name in figures}, figures, features)


def _misfit(a: ClipFigures, b: ClipFigures) -> str | None:
    """Why two videos cannot be compared frame by frame."""
    if (a.frames, a.height, a.width) == (b.frames, b.height, b.width):
        return None
    return f"the reference has {a.size} and the judged one {b.size}; bring them to one size"


def _notes(reference: Side, judged: Side) -> list[str]:
    notes = []
    one, other = (list(side.figures.values()) for side in (reference, judged))
    rates = [sorted({round(x.fps, 2) for x in side}) for side in (one, other)]
    if rates[0] != rates[1]:
        shown = [", ".join(f"{rate:g}" for rate in side) for side in rates]
        notes.append(
            f"the reference's videos have {shown[0]} frames per second and the judged ones "
            f"{shown[1]}; frames are compared by their number, and motion is per frame"
        )
    if {(x.height, x.width) for x in one} != {(x.height, x.width) for x in other}:
        notes.append("the sizes differ, and sharpness and motion are of neighbouring pixels")
    count = min(len(reference.features), len(judged.features))
    if reference.features and count < FEW:
        notes.append(
            f"FVD of {count} videos is mostly the bias of so few, where papers take 2048; compare "
            "it only with FVD of as many videos"
            if count > 1
            else "FVD needs at least 2 videos on each side"
        )
    return notes

"""VBench (Huang et al. 2024) by its own package: what it expects of videos, and its totals.

Facts of github.com/Vchitect/VBench, commit 45e79ec: `prompts/README.md` for the names of files,
`vbench/__init__.py` for how they are found, `scripts/constant.py` and `scripts/cal_final_score.py`
for the totals. The networks are VBench's own, which its package fetches when it is asked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import AccVideoError
from ..files import disk_errors, read_json
from ..monitor import Monitor, Progress, silent

SAMPLES = 5
"""Videos of a prompt that are looked at, numbered from 0."""

FLICKERING = "temporal_flickering"

_QUALITY_WEIGHT, _SEMANTIC_WEIGHT = 4, 1
_RESULTS = "_eval_results.json"


@dataclass(frozen=True, slots=True)
class Dimension:
    """How one dimension's score enters the totals: (score - low) / (high - low), with a weight."""

    low: float = 0.0
    high: float = 1.0
    semantic: bool = False
    weight: float = 1.0

    def normalised(self, score: float) -> float:
        return (score - self.low) / (self.high - self.low)


DIMENSIONS: dict[str, Dimension] = {
    "subject_consistency": Dimension(0.1462),
    "background_consistency": Dimension(0.2615),
    "temporal_flickering": Dimension(0.6293),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "dynamic_degree": Dimension(weight=0.5),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(),
    "object_class": Dimension(semantic=True),
    "multiple_objects": Dimension(semantic=True),
    "human_action": Dimension(semantic=True),
    "color": Dimension(semantic=True),
    "spatial_relationship": Dimension(semantic=True),
    "scene": Dimension(0.0, 0.8222, semantic=True),
    "appearance_style": Dimension(0.0009, 0.2855, semantic=True),
    "temporal_style": Dimension(0.0, 0.364, semantic=True),
    "overall_consistency": Dimension(0.0, 0.364, semantic=True),
}
"""In the order of VBench's own tables."""


@dataclass(frozen=True)
class Scores:
    """The scores of a set of videos, from 0 to 1; totals only where every dimension is there."""

    dimensions: dict[str, float]

    @property
    def quality(self) -> float | None:
        return self._mean(False)

    @property
    def semantic(self) -> float | None:
        return self._mean(True)

    @property
    def total(self) -> float | None:
        quality, semantic = self.quality, self.semantic
        if quality is None or semantic is None:
            return None
        weighted = _QUALITY_WEIGHT * quality + _SEMANTIC_WEIGHT * semantic
        return weighted / (_QUALITY_WEIGHT + _SEMANTIC_WEIGHT)

    def table(self) -> str:
        """The scores as text, in %."""
        totals = {"total": self.total, "quality": self.quality, "semantic": self.semantic}
        rows = {**totals, **{name: self.dimensions.get(name) for name in DIMENSIONS}}
        return "\n".join(
            f"{name.replace('_', ' '):24}{'-' if score is None else f'{100 * score:.2f}':>7}"
            for name, score in rows.items()
        )

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        totals = {"total": self.total, "quality": self.quality, "semantic": self.semantic}
        return {"format": 1, **totals, "dimensions": self.dimensions}

    def _mean(self, semantic: bool) -> float | None:
        kind = {name: x for name, x in DIMENSIONS.items() if x.semantic == semantic}
        if not kind.keys() <= self.dimensions.keys():
            return None
        parts = (x.weight * x.normalised(self.dimensions[name]) for name, x in kind.items())
        return sum(parts) / sum(x.weight for x in kind.values())


def video_names(prompts: Path, names: Path) -> dict[str, str]:
    """Prompt -> what its videos are called but for "-0.mp4", "-1.mp4", ...

    VBench finds videos by its own prompts, also where others (the augmented ones) were sampled.
    Where several prompts have one name, the first is kept.

    Args:
        prompts: text file with a prompt a line, such as `hunyuan_all_dimension.txt`.
        names: text file with as many lines, such as `all_dimension.txt`.

    Raises:
        AccVideoError: the files do not belong together, or a name cannot be a file's.
    """
    texts, called = _lines(prompts), _lines(names)
    if len(texts) != len(called):
        raise AccVideoError(
            f"{prompts} has {len(texts)} prompts and {names} {len(called)} names; give files that "
            "belong together line by line"
        )
    found: dict[str, str] = {}
    taken: set[str] = set()
    for text, name in zip(texts, called, strict=True):
        if set(name) & set("/\\") or name.startswith("."):
            raise AccVideoError(f"{names} holds {name!r}, which cannot be a file's name; change it")
        if name not in taken and text not in found:
            found[text] = name
            taken.add(name)
    return found


def prompts_of(info: Path, dimensions: Iterable[str]) -> list[str]:
    """VBench's prompts of some dimensions, by its file VBench_full_info.json."""
    wanted, entries = set(dimensions), read_json(info)
    try:
        found = [x["prompt_en"] for x in entries if wanted & set(x["dimension"])]
    except (TypeError, KeyError) as error:
        raise AccVideoError(f"{info} is not VBench's list of prompts; name the file") from error
    return list(dict.fromkeys(found))


def check_videos(folder: Path, info: Path, dimensions: Sequence[str]) -> None:
    """Refuse a folder in which VBench would not find what it looks for.

    It would go on with the videos that are there and call that the score. Of temporal flickering
    alone any number will do: VBench's static filter leaves as many as stand still.

    Raises:
        AccVideoError: videos are missing, or files of several kinds lie there.
    """
    with disk_errors("read", folder):
        files = {path.name for path in folder.iterdir()}
    suffixes = sorted({Path(name).suffix for name in files})
    if len(suffixes) > 1:
        raise AccVideoError(
            f"{folder} holds files of several kinds ({', '.join(suffixes)}), of which VBench takes "
            "one for all; leave only the videos there"
        )
    suffix = next(iter(suffixes), ".mp4")
    wanted = [f"{p}-{n}{suffix}" for p in prompts_of(info, dimensions) for n in range(SAMPLES)]
    missing = [name for name in wanted if name not in files]
    if missing and (set(dimensions) != {FLICKERING} or len(missing) == len(wanted)):
        raise AccVideoError(
            f"{len(missing)} of the {len(wanted)} videos that VBench wants are not in {folder}, "
            f"such as {missing[0]!r}; sample them with accvideo sample --names"
        )


def package_folder() -> Path:
    """Where the package vbench lies, found without importing it.

    Raises:
        AccVideoError: it is not installed.
    """
    spec = importlib.util.find_spec("vbench")
    if spec is None or spec.origin is None:
        raise AccVideoError(
            "the package vbench is not installed; install it as github.com/Vchitect/VBench says "
            "(it needs a GPU), or name a folder of its results made elsewhere with --results"
        )
    return Path(spec.origin).parent


def run(
    videos: Path,
    info: Path,
    results: Path,
    dimensions: Sequence[str],
    device: str = "cuda",
    monitor: Monitor = silent,
) -> None:
    """Have VBench judge a folder of videos, one dimension after the other.

    Each leaves a file in `results`; those that are there are not judged again.

    Raises:
        AccVideoError: the package is not installed, or videos are missing.
    """
    package_folder()
    todo = [name for name in dimensions if not (results / f"{name}{_RESULTS}").exists()]
    if not todo:
        return
    check_videos(videos, info, todo)
    from vbench import VBench

    judge = VBench(torch.device(device), str(info), str(results))
    for number, name in enumerate(todo, start=1):
        judge.evaluate(videos_path=str(videos), name=name, dimension_list=[name])
        monitor(Progress("vbench", number, len(todo)))


def collect(results: Path) -> Scores:
    """The scores in VBench's own files `*_eval_results.json`, wherever it has run.

    Raises:
        AccVideoError: there are none, they are not VBench's, or two disagree.
    """
    found: dict[str, float] = {}
    files = sorted(results.glob(f"**/*{_RESULTS}"))
    for file in files:
        for name, score in _scores(file).items():
            if found.setdefault(name, score) != score:
                raise AccVideoError(
                    f"{file} says {score:.4g} for {name} and another file there {found[name]:.4g}; "
                    "remove the one that is not meant"
                )
    if not found:
        raise AccVideoError(
            f"there are no results of VBench (*{_RESULTS}) in {results}; check the path"
        )
    return Scores({name: found[name] for name in DIMENSIONS if name in found})


def _scores(file: Path) -> dict[str, float]:
    """Dimension -> score; VBench writes [score, [of each video]]."""
    try:
        found = {str(name): float(x[0]) for name, x in read_json(file).items()}
    except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise AccVideoError(f"{file} is no result of VBench; remove it or make it again") from error
    return {name: score for name, score in found.items() if name in DIMENSIONS}


def _lines(path: Path) -> list[str]:
    with disk_errors("read", path):
        text = path.read_text(encoding="utf-8-sig")
    return [line.strip() for line in text.splitlines() if line.strip()]

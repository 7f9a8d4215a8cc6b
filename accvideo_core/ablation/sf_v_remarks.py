"""What the page of SF-V's study says beside its tables: against the paper's own numbers."""

from __future__ import annotations

from math import isinf
from pathlib import Path

from ..files import replacing
from .arms import FULL_TEACHER
from .page import Results
from .spread import Spread

P_MEANS = {-2.0: 3370.4, -1.0: 180.9, 0.0: 416.7, 1.0: 632.9}
"""The sweep, and the FVD on UCF-101 that the paper has for it (Table 3)."""
USUAL = "sf_v"
USUAL_MEAN = -1.0
PUBLISHED_RATIO = 180.9 / 153.4
"""The paper's FVD of one step by that of its teacher's 25 steps (Table 1)."""
ASKED_RATIO = 1.25
"""The most that this project asks of its own."""


def sweep_row(mean: float) -> str:
    """The arm of one P_mean."""
    return USUAL if mean == USUAL_MEAN else f"p_mean_{mean:g}"


def one_step_remarks(results: Results) -> list[str]:
    """The student's Frechet distance and its seconds beside the teacher's."""
    values = results.values()
    (full,) = values[FULL_TEACHER]["fd_real"]
    ratio = Spread.of([x / full for x in values[USUAL]["fd_real"]])
    met = "**holds**" if ratio.mean <= ASKED_RATIO else "**does not hold**"
    (slow,) = values[FULL_TEACHER]["seconds_per_clip"]
    faster = Spread.of([slow / x for x in values[USUAL]["seconds_per_clip"]]).mean
    return [
        f"One step has {ratio.text()} times the Frechet distance to real clips of the teacher's "
        f"{results.arms[FULL_TEACHER].steps} steps. That it is at most {ASKED_RATIO:g} times "
        f"{met}; the paper's own ratio is {PUBLISHED_RATIO:.2f}.",
        f"Sampling a clip is {faster:.3g} times as fast as the teacher's, which is asked twice a "
        "step, with and without its image.",
    ]


def heads_remarks(results: Results) -> list[str]:
    """Whether students of spatial heads alone stand still."""
    values = results.values()
    (full,) = values[FULL_TEACHER]["motion_energy"]
    names = (USUAL, "spatial", "temporal")
    both, spatial, temporal = (Spread.of(values[name]["motion_energy"]) for name in names)
    told = ", ".join(
        f"{results.arms[name].title} {spread.text()}"
        for name, spread in zip(names, (both, spatial, temporal), strict=True)
    )
    shows = "**shows**" if spatial.high < both.low else "**does not show**"
    return [
        f"Motion energy, of which the teacher has {full:.3g}: {told}. That students of spatial "
        f"heads alone stand still {shows}."
    ]


def sweep_remarks(results: Results, page: Path) -> list[str]:
    """The sweep as a curve, beside the paper's on an axis of its own."""
    picture = page.parent / "images" / f"{page.stem}_p_mean_curve.png"
    values = results.values()
    spreads = [Spread.of(values[sweep_row(mean)]["fd_real"]) for mean in P_MEANS]
    _draw_sweep(picture, spreads)
    return [f"![Frechet distance by P_mean, and the paper's FVD](images/{picture.name})"]


def _draw_sweep(path: Path, spreads: list[Spread]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ours = figure.subplots()
    means = [spread.mean for spread in spreads]
    known = [0.0 if isinf(spread.margin) else spread.margin for spread in spreads]
    mine = ours.errorbar([*P_MEANS], means, known, marker="o", capsize=4)
    ours.set_xlabel("P_mean")
    ours.set_ylabel("Frechet distance to real clips")
    ours.set_xticks([*P_MEANS])
    theirs = ours.twinx()
    (published,) = theirs.plot([*P_MEANS], [*P_MEANS.values()], "s--", color="grey")
    theirs.set_yscale("log")
    theirs.set_ylabel("FVD, the paper's")
    told = ["here, mean and 95 %", "the paper's, on UCF-101"]
    ours.legend([mine, published], told, loc="upper center")
    with replacing(path) as temp:
        figure.savefig(temp, format="png", dpi=120)

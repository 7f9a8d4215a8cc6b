"""What each panel of the figure shows, as plain numbers that JSON can hold.

Shapes: N points, S Euler steps, K windows; states are [N], trajectories [S + 1, N].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..flow import time_grid
from ..latents import key_generator
from .data import DATA, diffused, draw, exact_x0, mismatch_degree, mismatched, nearest
from .network import VelocityNet
from .settings import ToySettings
from .teacher import grid_times, paths, solve, trajectories
from .useless import Envelope, ends_wrong, predicted_x0, useless_rates

Panel = dict[str, Any]

EDGES = (-3.2, 1.2)
BINS = 88
"""Of the histograms of outputs, by their offset from the data."""

_SHOWN = 24  # trajectories behind the panels
_USEFUL, _WRONG, _OUTSIDE = 12, 8, 6  # points of each sort in a panel


def teacher_panel(teacher: VelocityNet, settings: ToySettings) -> Panel:
    """The teacher's own trajectories, which panels (a) to (d) have behind them."""
    noise = _test_noise(settings)
    states = trajectories(teacher, noise, settings.steps)
    return {
        "times": time_grid(settings.steps),
        "trajectories": _rounded(states[:, :_SHOWN].T),
        "error": nearest(states[-1]).mean().item(),
        "outputs": _histogram(states[-1]),
    }


def knowledge_panel(
    teacher: VelocityNet, envelope: Envelope, degree: float, settings: ToySettings
) -> Panel:
    """(a), (b): forward-diffused points, and where the teacher takes them for a student to learn.

    "wrong" are ends that the criterion "endpoint" calls so, "outside" are points that the criterion
    "envelope" excludes.
    """
    generator = key_generator(settings.seed, "toy rates", degree)  # the very points of (e)
    t = grid_times(settings.points, settings.steps, generator)
    x_t = diffused(draw(mismatched(degree), settings.points, generator), t, generator)
    states = paths(teacher, x_t, t, settings.steps)
    begin = ((1 - t) * settings.steps).round().long().tolist()
    wrong = ends_wrong(states[-1], settings.tolerance)
    marks = {"wrong": wrong, "outside": envelope.excludes(x_t, t)}
    points = [
        {"kind": "x_t", "t": t[i].item(), "way": _rounded(states[begin[i] :, i]), **_at(marks, i)}
        for i in _chosen(marks)
    ]
    return {"mismatch": degree, "share": {"x_t": _shares(marks)}, "points": points}


def matching_panel(
    teacher: VelocityNet,
    student: VelocityNet,
    envelope: Envelope,
    degree: float,
    settings: ToySettings,
) -> Panel:
    """(c), (d): diffused data and diffused outputs of a student, and the x_0 that the teacher's
    score predicts there.

    "wrong" is an x_0 farther than `settings.tolerance` from E[x_0 | x_t].
    """
    generator = key_generator(settings.seed, "toy matching", degree)
    noise = torch.randn(settings.points, generator=generator)
    x_0 = {
        "real": draw(mismatched(degree), settings.points, generator),
        "fake": solve(student, noise, time_grid(settings.windows)),
    }
    panel: Panel = {"mismatch": degree, "share": {}, "points": []}
    for kind, clean in x_0.items():
        t = grid_times(settings.points, settings.steps, generator)
        x_t = diffused(clean, t, generator)
        predicted = predicted_x0(teacher, x_t, t)
        fault = (predicted - exact_x0(x_t, t)).abs()
        marks = {"wrong": fault > settings.tolerance, "outside": envelope.excludes(x_t, t)}
        panel["share"][kind] = _shares(marks)
        panel["points"] += [
            {"kind": kind, "t": t[i].item(), **_at(marks, i),
             "way": _rounded(torch.stack([x_t[i], predicted[i]]))}
            for i in _chosen(marks, parts=2)
        ]  # fmt: skip
    return panel


def rates_row(
    teacher: VelocityNet, envelope: Envelope, degree: float, settings: ToySettings
) -> Panel:
    """(e): the share of useless points by both criteria at one degree of mismatch."""
    points = mismatched(degree)
    rates = useless_rates(teacher, envelope, points, settings, degree)
    return {"mismatch": mismatch_degree(points), "p_d": points, **rates}


def student_row(
    student: VelocityNet, teacher: VelocityNet, kind: str, degree: float, settings: ToySettings
) -> Panel:
    """(f): what a student makes of noise that it was not trained on.

    `error` is the mean distance to the nearest training point, `to_distilled` to the nearest point
    of p_d, `to_teacher` to the teacher's own end from the same noise; `wrong` is the share of
    outputs farther than the tolerance from every training point.
    """
    noise = _test_noise(settings)
    out = solve(student, noise, time_grid(settings.windows))
    end = trajectories(teacher, noise, settings.steps)[-1]
    return {
        "mismatch": degree,
        "start_points": kind,
        "error": nearest(out).mean().item(),
        "to_distilled": nearest(out, mismatched(degree)).mean().item(),
        "to_teacher": (out - end).abs().mean().item(),
        "wrong": _mean(ends_wrong(out, settings.tolerance)),
        "outputs": _histogram(out),
    }


def numbers(panels: Mapping[str, Any]) -> dict[str, Any]:
    """The figures alone, without what is only there to be drawn."""
    drawn = ("points", "outputs", "trajectories", "times")

    def figures(panel: Panel) -> Panel:
        return {name: value for name, value in panel.items() if name not in drawn}

    return {
        name: [figures(row) for row in panel] if isinstance(panel, list) else figures(panel)
        for name, panel in panels.items()
    }


def _test_noise(settings: ToySettings) -> Tensor:
    return torch.randn(settings.points, generator=key_generator(settings.seed, "toy test"))


def _chosen(marks: Mapping[str, Tensor], parts: int = 1) -> list[int]:
    """The first few points of each sort: a rare one would hardly be seen at its own rate."""
    wrong, outside = marks["wrong"], marks["outside"]
    sorts = {_USEFUL: ~(wrong | outside), _WRONG: wrong, _OUTSIDE: outside & ~wrong}
    return [
        i
        for count, sort in sorts.items()
        for i in sort.nonzero().flatten()[: -(-count // parts)].tolist()
    ]


def _at(marks: Mapping[str, Tensor], i: int) -> dict[str, bool]:
    return {name: bool(mark[i]) for name, mark in marks.items()}


def _shares(marks: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: _mean(mark) for name, mark in marks.items()}


def _histogram(x: Tensor) -> list[float]:
    """Density of the offset from the nearest training point, outwards positive, in each of `BINS`
    between `EDGES`; what lies outside is counted at the rim."""
    low, high = EDGES
    x = x.abs() - DATA[1]  # the two points are each other's mirror image
    counts = torch.histc(x.clamp(low, high), BINS, low, high)
    return _rounded(counts / len(x) / ((high - low) / BINS))


def _rounded(x: Tensor) -> list[Any]:
    return x.double().mul(1e4).round().div(1e4).tolist()


def _mean(mask: Tensor) -> float:
    return mask.double().mean().item()

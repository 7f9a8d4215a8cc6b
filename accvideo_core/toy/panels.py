"""What each panel of the figure shows, as plain numbers that JSON can hold.

Shapes: N points, S Euler steps, K windows; states are [N], trajectories [S + 1, N].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..flow import predict_x0, time_grid
from ..latents import key_generator
from .data import diffused, draw, mismatch_degree, mismatched, nearest
from .network import VelocityNet
from .settings import ToySettings
from .teacher import grid_times, paths, solve, trajectories
from .useless import Envelope, ends_wrong, prediction_fault, useless_rates

Panel = dict[str, Any]

EDGES = (-6.0, 6.0)
BINS = 120
"""Of the histograms of outputs."""

_SHOWN = 24  # trajectories behind the panels
_USEFUL, _USELESS = 14, 10  # points of either sort in a panel


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


def knowledge_panel(teacher: VelocityNet, degree: float, settings: ToySettings) -> Panel:
    """(a), (b): forward-diffused points, and where the teacher takes them for a student to learn.

    A point is useless by the criterion "endpoint".
    """
    generator = key_generator(settings.seed, "toy knowledge", degree)
    t = grid_times(settings.points, settings.steps, generator)
    x_t = diffused(draw(mismatched(degree), settings.points, generator), t, generator)
    states = paths(teacher, x_t, t, settings.steps)
    useless = ends_wrong(states[-1], settings.tolerance)
    begin = ((1 - t) * settings.steps).round().long().tolist()
    shown = [
        {"t": t[i].item(), "useless": bool(useless[i]), "way": _rounded(states[begin[i] :, i])}
        for i in _chosen(useless)
    ]
    return {"mismatch": degree, "share": {"x_t": _mean(useless)}, "points": shown}


def matching_panel(
    teacher: VelocityNet, student: VelocityNet, degree: float, settings: ToySettings
) -> Panel:
    """(c), (d): diffused data and diffused outputs of a student, and the x_0 that the teacher's
    score predicts there.

    A point is useless where that x_0 is farther than `settings.tolerance` from E[x_0 | x_t].
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
        useless = prediction_fault(teacher, x_t, t) > settings.tolerance
        with torch.no_grad():
            predicted = predict_x0(x_t, teacher(x_t, t), t)  # type: ignore[arg-type]
        panel["share"][kind] = _mean(useless)
        panel["points"] += [
            {"kind": kind, "t": t[i].item(), "useless": bool(useless[i]),
             "way": _rounded(torch.stack([x_t[i], predicted[i]]))}
            for i in _chosen(useless, parts=2)
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


def _chosen(useless: Tensor, parts: int = 1) -> list[int]:
    """The first few points of either sort: a rare one would hardly be seen at its own rate."""
    useful, bad = (~useless).nonzero().flatten(), useless.nonzero().flatten()
    return [*useful[: _USEFUL // parts].tolist(), *bad[: _USELESS // parts].tolist()]


def _histogram(x: Tensor) -> list[float]:
    """Density in each of `BINS` between `EDGES`; what lies outside is counted at the rim."""
    low, high = EDGES
    counts = torch.histc(x.clamp(low, high), BINS, low, high)
    return _rounded(counts / len(x) / ((high - low) / BINS))


def _rounded(x: Tensor) -> list[Any]:
    return x.double().mul(1e4).round().div(1e4).tolist()


def _mean(mask: Tensor) -> float:
    return mask.double().mean().item()

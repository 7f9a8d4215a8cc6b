"""The six panels of the paper's Figure 2, measured, as PNG and SVG. Drawn with matplotlib.

Time runs from left to right as denoising does: from t = 1, noise, to t = 0, data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AccVideoError
from ..files import replacing
from .data import DATA, mismatched
from .panels import BINS, EDGES, Panel
from .settings import ToySettings
from .useless import PAPER_RATES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart.
_BLUE, _RED, _GREEN, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
_GREY, _PALE = "#666666", "#C9D3DC"
_STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "accvideo",
}
_HEIGHT = 4.6  # of the panels over time: states between -4.6 and 4.6
_KINDS = {"forward": ("PeRFlow-style points", _RED), "trajectory": ("AccVideo's points", _GREEN)}


def check_matplotlib() -> None:
    """Raise AccVideoError, before the work that is to be drawn, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise AccVideoError(
            "the figure needs the package matplotlib, which is not installed; "
            "run pip install matplotlib with this Python and start again"
        ) from error


def draw_figure(panels: Mapping[str, Any], settings: ToySettings, path: Path) -> None:
    """Write `path`.png and `path`.svg."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = _figure(panels, settings)
        with replacing(path.with_suffix(".png")) as temp:
            figure.savefig(temp, format="png", dpi=170)
        figure.set_layout_engine("none")  # it stays as laid out, which takes most of the time
        with replacing(path.with_suffix(".svg")) as temp:
            figure.savefig(temp, format="svg", metadata={"Date": None})


def _figure(panels: Mapping[str, Any], settings: ToySettings) -> Figure:
    # Not pyplot, which keeps its figures and a state of the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 8.6), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    above, below = halves
    above.suptitle("Where the teacher is asked (dots) and what it answers (lines), over its own "
                   "trajectories (grey). Red box: it goes wrong. Dotted box: off its "
                   "trajectories, yet right.", x=0.01, ha="left", fontsize=8.5)  # fmt: skip
    _over_time(above.subplots(1, 4, sharey=True), panels)
    left, right = below.subfigures(1, 2, width_ratios=(1, 2.1))
    _rates(left.subplots(), panels["e"], settings)
    _students(right, panels["f"], panels["teacher"])
    return figure


def _over_time(axes: Sequence[Axes], panels: Mapping[str, Any]) -> None:
    titles = {
        "a": "knowledge distillation,\n      dataset mismatch",
        "b": "knowledge distillation,\n      noise mismatch alone",
        "c": "distribution matching,\n      dataset mismatch",
        "d": "distribution matching,\n      noise mismatch alone",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.set_title(f"({name}) {title}")
        _behind(axis, panels["teacher"], mismatched(panels[name]["mismatch"]))
        _points(axis, panels[name])
        axis.set(xlim=(1.03, -0.06), ylim=(-_HEIGHT, _HEIGHT), xlabel="t  (1: noise, 0: data)")
        axis.text(0.0, -0.2, "\n".join(_said(panels[name])), transform=axis.transAxes, va="top",
                  fontsize=7.5)  # fmt: skip
    axes[0].set_ylabel("$x_t$")


def _said(panel: Panel) -> list[str]:
    """The shares under a panel."""
    marks = {"x_t": "$x_t$", "real": "$x_t^{real}$ (filled)", "fake": "$x_t^{fake}$ (hollow)"}
    return [
        f"{marks[kind]}, M = {panel['mismatch']:g}: {share['wrong']:.2%} go wrong,\n"
        f"    {share['outside']:.2%} off the trajectories"
        for kind, share in panel["share"].items()
    ]


def _behind(axis: Axes, teacher: Panel, distilled: Sequence[float]) -> None:
    """The teacher's own trajectories, and where they should end."""
    for path in teacher["trajectories"]:
        axis.plot(teacher["times"], path, color=_PALE, lw=0.6, zorder=0)
    axis.scatter([-0.03] * len(DATA), DATA, marker=">", s=22, color="black", zorder=4, lw=0)
    if tuple(distilled) != DATA:
        axis.scatter([-0.03] * len(distilled), distilled, marker="<", s=22, color=_ORANGE, lw=0)


def _points(axis: Axes, panel: Panel) -> None:
    """Points and the ways from there (a prediction's is straight).

    A red box stands around a point that goes wrong, a dotted one around another that is off the
    trajectories.
    """
    for point in panel["points"]:
        way, t = point["way"], point["t"]
        colour = _RED if point["wrong"] else _BLUE
        times = [t * (1 - i / (len(way) - 1)) for i in range(len(way))]
        axis.plot(times, way, color=colour, lw=0.7, alpha=0.7, zorder=1)
        fill = "white" if point["kind"] == "fake" else colour
        axis.scatter(t, way[0], s=11, facecolor=fill, edgecolor=colour, lw=0.8, zorder=3)
        if point["wrong"] or point["outside"]:
            line = "-" if point["wrong"] else ":"
            axis.scatter(t, way[0], s=52, marker="s", facecolor="none", edgecolor=colour, lw=0.8,
                         ls=line)  # fmt: skip


def _rates(axis: Axes, rows: Sequence[Panel], settings: ToySettings) -> None:
    degrees = [row["mismatch"] for row in rows]
    labels = {
        "endpoint": f"ours, endpoint (farther than {settings.tolerance:g})",
        "envelope": f"ours, envelope (of {settings.envelope} trajectories)",
    }
    for (name, label), colour, mark in zip(labels.items(), (_RED, _BLUE), "os", strict=True):
        rates = [100 * row[name] for row in rows]
        axis.plot(degrees, rates, color=colour, marker=mark, ms=4.5, lw=1.4, label=label)
        _numbers(axis, degrees, rates, colour, (-5, 5) if name == "envelope" else (5, -11))
    spread = [degrees[-1] * i / (len(PAPER_RATES) - 1) for i in range(len(PAPER_RATES))]
    theirs = [100 * rate for rate in PAPER_RATES]
    label = "the paper's, by its own criterion\n(printed without M; spread evenly here)"
    axis.plot(spread, theirs, "D:", ms=4.5, mfc="none", color=_GREY, lw=0.9, label=label)
    _numbers(axis, spread, theirs, _GREY, (7, -4))
    axis.set_title("(e) useless points by degree of mismatch")
    axis.set(xlabel="M (Eq. 4)", ylabel="useless points, %", xticks=degrees)
    axis.margins(x=0.14)
    axis.set_ylim(-2.5, 1.35 * max(theirs + [100 * row["envelope"] for row in rows]))
    axis.legend(loc="upper left")


def _numbers(
    axis: Axes, xs: Sequence[float], ys: Sequence[float], colour: str, offset: tuple[int, int]
) -> None:
    """Each value beside its mark."""
    for x, y in zip(xs, ys, strict=True):
        axis.annotate(f"{y:.2f}", (x, y), offset, textcoords="offset points", fontsize=7,
                      color=colour, ha="left" if offset[0] > 0 else "right")  # fmt: skip


def _students(figure: Any, rows: Sequence[Panel], teacher: Panel) -> None:
    """A row for each sort of start points, a column for each M."""
    degrees = list(dict.fromkeys(row["mismatch"] for row in rows))
    figure.suptitle("(f) outputs of few-step students (lines) and of the teacher (grey)",
                    x=0.02, ha="left", fontsize=9.5)  # fmt: skip
    grid = figure.subplots(len(_KINDS), len(degrees), sharex=True, sharey=True, squeeze=False)
    for row in rows:
        label, colour = _KINDS[row["start_points"]]
        column = degrees.index(row["mismatch"])
        axis = grid[list(_KINDS).index(row["start_points"])][column]
        _outputs(axis, row, teacher, colour)
        if column == 0:
            axis.set_ylabel(f"{label}\ndensity")
    for axis in grid[-1]:
        axis.set_xlabel("offset from the data, outwards > 0")


def _outputs(axis: Axes, row: Panel, teacher: Panel, colour: str) -> None:
    low, high = EDGES
    edges = [low + (high - low) * i / BINS for i in range(BINS + 1)]
    axis.stairs(teacher["outputs"], edges, fill=True, color=_PALE)
    axis.stairs(row["outputs"], edges, color=colour, lw=1.1)
    axis.axvline(0, color="black", lw=0.7, ls="--", zorder=0)
    if row["mismatch"]:
        axis.axvline(-row["mismatch"] / 2, color=_ORANGE, lw=1.2, ls=":")
        axis.text(-row["mismatch"] / 2 - 0.08, 12, "$p_d$", color=_ORANGE, ha="right", va="top")
    axis.set(yscale="log", xlim=EDGES, xticks=[-3, -2, -1, 0, 1], ylim=(4e-3, 20))
    axis.set_title(f"M = {row['mismatch']:g}: mean error {row['error']:.3f}", fontsize=8.5)

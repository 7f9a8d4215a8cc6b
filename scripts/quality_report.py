"""docs/quality.md from the figures of `scripts.quality`.

A figure is the mean over training seeds, "+-" their standard deviation. The bootstrap errors of a
seed's figures are over prompts; the interval of a mean over seeds is Student's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

ARMS = ("trajectory", "continued", "adversarial")
Results = Mapping[int, Mapping[str, Any]]

_COLUMNS = {
    "shape": "shape",
    "colour": "colour",
    "motion": "motion",
    "background": "background",
    "all": "all four",
    "first_frame": "first frame, dB",
    "fd_real": "tiny FVD to real",
    "gap_closed": "gap closed",
    "fd_teacher": "tiny FVD to teacher@50",
    "patch_distance": "patch distance",
    "psnr": "PSNR, dB",
    "latent_mse": "latent MSE",
    "sharpness": "sharpness",
    "detail": "detail",
    "motion_energy": "motion energy",
    "diversity": "diversity",
}
_SHARES = ("shape", "colour", "motion", "background", "all", "gap_closed")
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
_NEEDED = {5: 0.5, 2: 0.7}
_TOLERATED = 0.01


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over training seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def margin(self) -> float:
        """Half of the 95 % interval of the mean; infinite for one seed."""
        n = len(self.values)
        if n < 2:
            return math.inf
        return _STUDENT.get(n - 1, 2.0) * stdev(self.values) / math.sqrt(n)

    def text(self, share: bool = False) -> str:
        scale, unit = (100, " %") if share else (1, "")
        if len(set(self.values)) == 1:
            return f"{scale * self.mean:.3g}{unit}"
        return f"{scale * self.mean:.3g} +- {scale * stdev(self.values):.2g}{unit}"


def render(results: Results, *, command: str, pictures: Sequence[str], note: str = "") -> str:
    """The document.

    Args:
        results: training seed -> what `Lab.compare` wrote.
        command: how to make it again.
        pictures: paths relative to the document.
        note: markdown that goes in front of the tables.
    """
    one = next(iter(results.values()))
    setting = one["setting"]
    steps = setting["steps"]
    parts = [
        "# How good are the students?",
        _introduction(one, len(results), command),
        note.strip(),
        "## What was asked",
        _verdicts(results, steps),
        "## All figures",
        _figures(results),
        "\n".join(f"- *{_COLUMNS[key]}*: {what}" for key, what in one["figures"].items()),
        "## Student against the teacher at the same steps",
        _differences(results, [(f"trajectory@{m}", f"teacher@{m}") for m in steps]),
        "## Adversarial against continued trajectory training",
        "Both start from the same trajectory student and take the same number of updates at the "
        "same learning rates; the only difference is the adversarial term.",
        _differences(results, [(f"adversarial@{m}", f"continued@{m}") for m in steps]),
        "## Pictures",
        *(f"![{path.rsplit('/', 1)[-1]}]({path})" for path in pictures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(one: Mapping[str, Any], seeds: int, command: str) -> str:
    setting = one["setting"]
    changes = [*setting["changes"], *(f"{x} (adversarial)" for x in setting["adversarial_changes"])]
    return f"""\
The embedded teacher (fingerprint `{one["teacher"]}`), {setting["trajectories"]} recorded
trajectories, {seeds} training seeds. A trajectory student has {setting["updates"]} updates of
{setting["batch"]} samples; from there "continued" and "adversarial" take {setting["more_updates"]}
more each. {one["clips"]} clips of {len(one["prompts"])} prompts with noise that training never saw,
decoded by the real VAE; the Frechet distance is to {setting["real_clips"]} real clips. A "+-" is
the standard deviation over training seeds, an interval in brackets is 95 %.
{"Changed recipe fields: " + ", ".join(changes) + "." if changes else ""}

Made by (it goes on where it was interrupted; see the script for how to use several cores):

    {command}"""


def _verdicts(results: Results, steps: Sequence[int]) -> str:
    """The project's own demands, and whether these figures meet them."""
    lines = []
    for m in steps:
        gap = _spread(results, f"trajectory@{m}", "gap_closed")
        if gap and m in _NEEDED:
            lines.append(
                f"- {m} steps: the trajectory student closes {gap.text(True)} of the Frechet gap "
                f"between teacher@{m} and the teacher at 50 steps (asked: at least "
                f"{100 * _NEEDED[m]:.0f} %): **{_yes(gap.mean >= _NEEDED[m])}**."
            )
        mine = _spread(results, f"trajectory@{m}", "all")
        full = _spread(results, _reference(results), "all")
        if mine and full and m in _NEEDED:
            lost = 100 * (full.mean - mine.mean)
            lines.append(
                f"- {m} steps: all four attributes right in {mine.text(True)} of clips, teacher at "
                f"50 steps {full.text(True)} (asked: within 2 points): **{_yes(lost <= 2)}**."
            )
    lines += [_adversarial_verdict(results, m) for m in steps if m <= 2]
    return "\n".join(lines)


def _adversarial_verdict(results: Results, m: int) -> str:
    """A gain counts when its interval over seeds excludes none; a sharpness above real does not."""
    tuned, control = f"adversarial@{m}", f"continued@{m}"
    names = ("fd_real", "sharpness", "diversity")
    closer, sharper, varied = (_paired(results, tuned, control, name) for name in names)
    better = closer.mean + closer.margin < 0
    crisp = sharper.mean - sharper.margin > 0 and not _oversharp(results, tuned)
    before = _spread(results, control, "diversity")
    kept = varied.mean + varied.margin >= -_TOLERATED * (before.mean if before else 0.0)
    return (
        f"- {m} step{'s' * (m > 1)}: the adversarial term changes the Frechet distance by "
        f"{_signed(closer)} and the sharpness by {_signed(sharper)} against equally long "
        f"trajectory training, diversity by {_signed(varied)} (asked: one of the first two "
        f"better, diversity kept to {100 * _TOLERATED:.0f} %, at some m <= 2): "
        f"**{_yes((better or crisp) and kept)}**."
    )


def _oversharp(results: Results, name: str) -> bool:
    mine, real = (_spread(results, x, "sharpness") for x in (name, "real clips"))
    return mine is not None and real is not None and mine.mean > real.mean


def _figures(results: Results) -> str:
    rows = next(iter(results.values()))["rows"]
    names = [row["name"] for row in rows]
    columns = {
        key: heading
        for key, heading in _COLUMNS.items()
        if any(_spread(results, name, key) for name in names)
    }
    lines = [
        "| | " + " | ".join(columns.values()) + " | s per clip |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for name in names:
        cells = []
        for key in (*columns, "seconds_per_clip"):
            spread = _spread(results, name, key)
            cells.append(spread.text(key in _SHARES) if spread else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _differences(results: Results, pairs: Sequence[tuple[str, str]]) -> str:
    figures = list(dict.fromkeys(row["figure"] for row in _all_differences(results)))
    lines = [
        "| difference | figure | mean over seeds | each seed with its interval over prompts |",
        "|---|---|---|---|",
    ]
    for a, b in pairs:
        for figure in figures:
            rows = [row for row in _all_differences(results) if _is(row, a, b, figure)]
            each = ", ".join(
                f"{row['value']:+.3g} [{row['value'] - 1.96 * row['error']:+.3g}, "
                f"{row['value'] + 1.96 * row['error']:+.3g}]"
                for row in rows
            )
            spread = _signed(_paired(results, a, b, figure))
            lines.append(f"| {a} - {b} | {_COLUMNS[figure]} | {spread} | {each} |")
    return "\n".join(lines)


def _spread(results: Results, name: str, figure: str) -> Spread | None:
    rows = [row for one in results.values() for row in one["rows"] if row["name"] == name]
    found = [row.get(figure) for row in rows]
    return Spread(tuple(found)) if found and None not in found else None


def _paired(results: Results, a: str, b: str, figure: str) -> Spread:
    rows = [row for row in _all_differences(results) if _is(row, a, b, figure)]
    return Spread(tuple(row["value"] for row in rows))


def _all_differences(results: Results) -> list[Mapping[str, Any]]:
    return [row for one in results.values() for row in one["differences"]]


def _is(row: Mapping[str, Any], a: str, b: str, figure: str) -> bool:
    return (row["a"], row["b"], row["figure"]) == (a, b, figure)


def _reference(results: Results) -> str:
    return next(iter(results.values()))["reference"]


def _signed(spread: Spread) -> str:
    if math.isinf(spread.margin):
        return f"{spread.mean:+.3g}"
    low, high = spread.mean - spread.margin, spread.mean + spread.margin
    return f"{spread.mean:+.3g} [{low:+.3g}, {high:+.3g}]"


def _yes(met: bool) -> str:
    return "yes" if met else "no"

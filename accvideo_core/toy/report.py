"""The experiment's numbers as a table of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .useless import PAPER_RATES


def table(numbers: Mapping[str, Any]) -> str:
    """Useless points and students by degree of mismatch, with the paper's printed rates."""
    tolerance = numbers["settings"]["tolerance"]
    theirs = ", ".join(f"{100 * rate:.2f}" for rate in PAPER_RATES)
    lines = [
        "useless points, % of those that the forward process gives",
        f"{'M':>6} {'endpoint':>10} {'envelope':>10}",
        *(
            f"{row['mismatch']:6.2f} {100 * row['endpoint']:10.2f} {100 * row['envelope']:10.2f}"
            for row in numbers["e"]
        ),
        f"the paper's, by its own criterion, rising with M: {theirs}",
        "",
        "students: distance of outputs to the data, to p_d and to the teacher's; "
        f"% farther than {tolerance:g} from the data",
        f"{'start points':>14} {'M':>6} {'data':>8} {'p_d':>8} {'teacher':>8} {'wrong':>8}",
    ]
    for row in numbers["f"]:
        lines.append(
            f"{row['start_points']:>14} {row['mismatch']:6.2f} {row['error']:8.3f} "
            f"{row['to_distilled']:8.3f} {row['to_teacher']:8.3f} {100 * row['wrong']:8.2f}"
        )
    return "\n".join(lines)

"""What the figures say, in sentences that the figures choose.

A difference counts where the 95 % interval of its mean over training seeds leaves out zero. Seeds
are paired: two arms of one seed start alike and read the same batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .arms import Arm, Question
from .spread import Spread, paired

Values = Mapping[str, Sequence[float]]
"""Figure -> one value for each seed, in the same order for all arms."""


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of the table."""

    heading: str
    words: str
    meaning: str
    share: bool = False
    lower: bool | None = None
    """Whether a lower value is better; None where neither is, or nearness to the teacher counts."""


COLUMNS: dict[str, Column] = {
    "all": Column("prompt accuracy", "prompt accuracy",
                  "clips that show all of their prompt: shape, colour, motion and background",
                  share=True, lower=False),
    "fd_real": Column("FD real", "Frechet distance to real clips",
                      "Frechet distance to real clips on the tiny world's classifier (not FVD)",
                      lower=True),
    "fd_teacher": Column("FD teacher", "Frechet distance to the teacher's clips",
                         "the same to the clips of the teacher's 50 steps", lower=True),
    "latent_mse": Column("distance", "distance to the teacher's own result",
                         "mean squared distance of latents to the teacher's 50-step result of the "
                         "same noise", lower=True),
    "first_frame": Column("first frame", "nearness of the first frame to its picture",
                          "dB of the first frame to the picture that the clip continues",
                          lower=False),
    "motion_energy": Column("motion", "motion energy", "mean change from frame to frame"),
    "diversity": Column("diversity", "diversity",
                        "RMS distance between latents of the same prompt's clips"),
    "seconds_per_clip": Column("s per clip", "seconds per clip", "sampling alone, one clip"),
    "train_seconds": Column("s of training", "seconds of training",
                            "of this arm's own updates; an adversarial arm's students have learnt "
                            "by trajectory guidance before"),
}  # fmt: skip
JUDGED = ("fd_real", "latent_mse", "all")
"""Figures that every sentence speaks of; the first one decides about a claim of the paper."""
TEACHER_LIKE = ("motion_energy", "diversity")
"""Figures that should be the teacher's: spoken of where they move away from it or towards it."""


def pair_words(a: Arm, b: Arm, values: Mapping[str, Values], full: Values) -> str:
    """One arm against another, figure by figure.

    Args:
        values: arm -> its figures.
        full: the figures of the teacher's 50 steps.
    """
    mine, theirs = values[a.name], values[b.name]
    parts = [_judged(figure, mine[figure], theirs[figure]) for figure in JUDGED]
    for figure in TEACHER_LIKE:
        if figure in mine and figure in theirs:
            words = _nearness(figure, mine[figure], theirs[figure], full[figure][0])
            parts += [words] if words else []
    return f"**{a.title}** against **{b.title}**: {'; '.join(parts)}. {_overlap(a, b, values)}"


def claim_words(a: Arm, b: Arm, values: Mapping[str, Values]) -> str:
    """Whether the paper's claim that `a` is better than `b` shows in the Frechet distance."""
    figure = JUDGED[0]
    found = paired(values[a.name][figure], values[b.name][figure])
    step = f"*{a.title}* is better than *{b.title}*"
    if not _known(found):
        return f"That {step} cannot be judged by one seed."
    if not found.told:
        return f"That {step} **does not show**: the interval of the difference has zero in it."
    if found.high < 0:
        return f"That {step} **holds** by the Frechet distance to real clips."
    return f"That {step} **does not hold**: the Frechet distance to real clips is larger."


def best_words(question: Question, arms: Mapping[str, Arm], values: Mapping[str, Values]) -> str:
    """Who has the least Frechet distance of a question's students, and who is not told from it."""
    figure = JUDGED[0]
    students = [name for name in question.rows if arms[name].seeded]
    means = {name: Spread.of(values[name][figure]).mean for name in students}
    best = min(students, key=lambda name: means[name])
    text = f"The least Frechet distance to real clips has *{arms[best].title}* ({means[best]:.3g})"
    differences = {
        name: paired(values[name][figure], values[best][figure])
        for name in students
        if name != best
    }
    if not all(_known(one) for one in differences.values()):
        return text + "; one seed does not tell whether others are as good."
    alike = [f"*{arms[name].title}*" for name, one in differences.items() if not one.told]
    if not alike:
        return text + ", and every other row of students is told apart from it."
    return text + f"; not told apart from it: {', '.join(alike)}."


def _judged(figure: str, mine: Sequence[float], theirs: Sequence[float]) -> str:
    column, found = COLUMNS[figure], paired(mine, theirs)
    amount = found.text(column.share, signed=True).replace(" %", " points")
    if not _known(found):
        return f"{column.words} {amount} (one seed)"
    if found.mean == found.margin == 0:
        return f"{column.words} the same in every seed"
    if not found.told:
        return f"{column.words} not told apart ({amount})"
    better = (found.high < 0) == column.lower
    return f"{column.words} **{'better' if better else 'worse'}** ({amount})"


def _nearness(
    figure: str, mine: Sequence[float], theirs: Sequence[float], full: float
) -> str | None:
    """Whether a figure is nearer to the teacher's or farther from it; None where it is neither."""
    each = [abs(x - full) for x in mine], [abs(x - full) for x in theirs]
    found = paired(*each)
    if not found.told:
        return None
    way = "nearer to" if found.high < 0 else "farther from"
    return (
        f"{COLUMNS[figure].words} {way} the teacher's "
        f"({Spread.of(mine).mean:.3g} and {Spread.of(theirs).mean:.3g}, teacher {full:.3g})"
    )


def _overlap(a: Arm, b: Arm, values: Mapping[str, Values]) -> str:
    """Whether the two rows' own intervals of the deciding figure overlap."""
    mine, theirs = (Spread.of(values[arm.name][JUDGED[0]]) for arm in (a, b))
    if not (_known(mine) and (_known(theirs) or not b.seeded)):
        return "One seed tells no interval."
    if not b.seeded:
        inside = mine.low <= theirs.mean <= mine.high
        return (
            f"The teacher's Frechet distance ({theirs.mean:.3g}) lies "
            f"{'inside' if inside else 'outside'} the students' interval."
        )
    lap = "overlap" if mine.overlaps(theirs) else "do not overlap"
    return f"Their own intervals of the Frechet distance {lap}."


def _known(spread: Spread) -> bool:
    return spread.margin < float("inf")

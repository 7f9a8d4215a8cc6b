"""The page of a study: tables, sentences and contact sheets from the files of the runs.

Everything in it is read from result.json and shown.safetensors of the arms.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluate.pictures import contact_sheet
from ..files import read_json, read_safetensors, replacing, write_bytes
from .arms import FULL_TEACHER, Arm, Question
from .lab import RESULT, SHOWN, Job, Lab
from .spread import Spread
from .study import PER_PROMPT
from .words import COLUMNS, best_words, claim_words, pair_words

_Z95 = 1.959964
_OF_MACHINE = ("seconds_per_clip", "train_seconds")
"""Figures of which only the mean is shown."""
_SHEET_PROMPTS = 4


@dataclass(frozen=True, slots=True)
class Results:
    """What was found of some arms, for the seeds that all of them have."""

    arms: Mapping[str, Arm]
    seeds: tuple[int, ...]
    found: Mapping[str, list[dict[str, Any]]]
    """Arm -> what result.json holds, for each seed; of the teacher's arms once."""

    def values(self) -> dict[str, dict[str, list[float]]]:
        """Arm -> figure -> one value for each seed; figures that are not defined are left out."""
        table = {}
        for name, rows in self.found.items():
            figures = [row["figures"] for row in rows]
            known = [key for key in COLUMNS if all(one.get(key) is not None for one in figures)]
            table[name] = {key: [one[key] for one in figures] for key in known}
        return table

    def figures(self) -> set[str]:
        """Those that some arm has."""
        return {figure for found in self.values().values() for figure in found}

    def cell(self, name: str, figure: str) -> str:
        """A figure with its interval: over seeds, or of the teacher over prompts."""
        rows = [row["figures"].get(figure) for row in self.found[name]]
        if None in rows or (name == FULL_TEACHER and figure in ("fd_teacher", "latent_mse")):
            return ""
        if figure in _OF_MACHINE:
            return f"{Spread.of(rows).mean:.2g}"
        spread = Spread.of(rows)
        if not self.arms[name].seeded:
            error = self.found[name][0]["errors"].get(figure)
            spread = spread if error is None else Spread(rows[0], _Z95 * error)
        return spread.text(COLUMNS[figure].share)


def read_results(lab: Lab, question: Question, seeds: Sequence[int]) -> Results | None:
    """The results of a question's arms; None while an arm has none of any seed."""
    rows = {FULL_TEACHER, *question.rows}
    arms = {name: question.called(arm) for name, arm in lab.arms().items() if name in rows}
    students = [arm for arm in arms.values() if arm.seeded]
    teachers = [arm for arm in arms.values() if not arm.seeded]
    done = tuple(
        seed for seed in seeds if all(_path(lab, Job(arm, seed)).exists() for arm in students)
    )
    if not done or not all(_path(lab, Job(arm, None)).exists() for arm in teachers):
        return None
    found = {
        name: [read_json(_path(lab, Job(arm, x))) for x in (done if arm.seeded else (None,))]
        for name, arm in arms.items()
    }
    return Results(arms, done, found)


def write_page(
    lab: Lab,
    questions: Sequence[Question],
    seeds: Sequence[int],
    path: Path,
    command: str,
    first: Sequence[str] = (),
) -> Path:
    """The page at `path`, with its contact sheets in `images` beside it.

    Questions of which nothing is there yet are named as such; `first` are sections before theirs.
    """
    sections, shown = [*first], set[str]()
    for question in questions:
        results = read_results(lab, question, seeds)
        shown |= set() if results is None else results.figures()
        if results is None:
            sections.append(f"## {question.title}\n\nNothing of it has been run yet.")
            continue
        picture = path.parent / "images" / f"{path.stem}_{question.name}.png"
        with replacing(picture) as temp:
            _sheet(lab, question, results).save(temp, format="PNG")
        remarks = lab.study.remarks(question, results, path)
        sections.append(_section(question, results, f"images/{picture.name}", remarks))
    parts = [f"# {lab.study.title}", _introduction(lab, seeds, command, shown)]
    parts += sections
    write_bytes(path, ("\n\n".join(parts) + "\n").encode())
    return path


def _introduction(lab: Lab, seeds: Sequence[int], command: str, shown: Collection[str]) -> str:
    setting = lab.study.setting
    columns = [column for name, column in COLUMNS.items() if name in shown]
    figures = "\n".join(f"- *{one.heading}*: {one.meaning}" for one in columns)
    return f"""\
{lab.study.introduction(lab.teacher.model.fingerprint)}

Seeds of training: {', '.join(map(str, seeds))}. All are measured on {PER_PROMPT * setting.prompts}
clips of {setting.prompts} prompts, with noise that training never saw.

A student's figure is the mean over seeds with Student's 95 % interval of that mean; the teacher's
has the bootstrap interval over prompts. Two arms are told apart where the interval of their
difference, seed by seed, leaves out zero; such seeds start alike and read the same batches. With
few seeds intervals are wide: "not told apart" does not mean "equal". Many differences are looked
at, and of twenty that are none, one is told apart by chance.

{figures}

Made from the runs' own files by

    {command}"""


def _section(
    question: Question, results: Results, picture: str, remarks: Sequence[str]
) -> str:
    values, arms = results.values(), results.arms
    full = values[FULL_TEACHER]
    sentences = []
    for a, b in question.pairs:
        if question.claim:
            sentences.append(f"- {claim_words(arms[a], arms[b], values)}")
        sentences.append(f"- {pair_words(arms[a], arms[b], values, full)}")
    if not question.claim and len([arm for arm in arms.values() if arm.seeded]) > 2:
        sentences.append(f"- {best_words(question, arms, values)}")
    missing = "" if len(results.seeds) > 1 else "\n\nOne seed alone is done: no intervals yet."
    parts = [
        f"## {question.title}",
        f"{question.text}{missing}",
        _table(question, results),
        *remarks,
        "\n".join(sentences),
        f"![{question.title}]({picture})",
    ]
    return "\n\n".join(parts)


def _table(question: Question, results: Results) -> str:
    rows = [name for name in question.rows if name in results.found]
    columns = {name: x for name, x in COLUMNS.items() if name in results.figures()}
    lines = [
        "| | " + " | ".join(column.heading for column in columns.values()) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in rows:
        cells = [results.cell(name, figure) for figure in columns]
        lines.append(f"| {results.arms[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sheet(lab: Lab, question: Question, results: Results) -> Any:
    """The same prompts and noise, arm beside arm, of the first seed."""
    names = list(dict.fromkeys((FULL_TEACHER, *question.rows)))
    clips = {}
    for name in names:
        arm = results.arms[name]
        job = Job(arm, results.seeds[0] if arm.seeded else None)
        frames = read_safetensors(job.folder(lab.folder) / SHOWN)[0]["frames"]
        clips[arm.title] = frames[:_SHEET_PROMPTS].float() / 255
    texts = lab.study.texts()[: len(next(iter(clips.values())))]
    return contact_sheet(clips, texts, frames_per_clip=3 if len(names) < 7 else 2, frame_size=96)


def _path(lab: Lab, job: Job) -> Path:
    return job.folder(lab.folder) / RESULT

"""The students that are trained, and the questions that they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..distill.recipes import Recipe, preset
from ..distill.student import LoraSpec
from ..errors import AccVideoError
from ..flow import Times
from .setting import Setting, key_steps

BASE = "base"
"""The trajectory student from which the adversarial arms of its seed start."""
FULL_TEACHER = "teacher"


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of a table: the teacher at some steps, or a student of every seed."""

    name: str
    title: str
    steps: int
    kind: str = "trajectory"
    """"teacher"; "trajectory", which starts from the teacher; "tuned", which starts from BASE."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the tiny recipe that are changed."""

    @property
    def seeded(self) -> bool:
        return self.kind != "teacher"

    @property
    def start(self) -> str | None:
        return BASE if self.kind == "tuned" else None

    def times(self, grid: Times) -> Times:
        """The falling times that it is sampled at, on the teacher's `grid` where it is trained."""
        return tuple(grid[i] for i in key_steps(len(grid) - 1, self.steps))

    def recipe(self, setting: Setting, seed: int, grid: Times) -> Recipe:
        """How it is trained. Arms of one seed read the same batches in the same order."""
        tuned = self.kind == "tuned"
        common = replace(
            preset("tiny-adversarial" if tuned else "tiny-trajectory"),
            name=self.name,
            student_steps=self.steps,
            key_times=self.times(grid),
            trajectories=setting.trajectories,
            train_steps=setting.tune_updates if tuned else setting.updates,
            batch_size=setting.batch,
            checkpoint_every=20,
            keep_checkpoints=1,
            seed=seed + 1000 if tuned else seed,  # another order of batches than before
        )
        return replace(common, **self.changes)


@dataclass(frozen=True, slots=True)
class Question:
    """What some arms answer together."""

    name: str
    title: str
    text: str
    """What is asked, and what was done about it."""
    rows: tuple[str, ...]
    """Arms of its table."""
    pairs: tuple[tuple[str, str], ...]
    """(arm, the one that it is set against)."""
    claim: bool = False
    """Whether the paper says that the first of every pair is better."""
    titles: dict[str, str] = field(default_factory=dict)
    """What arms are called here, where that is not their title."""

    def called(self, arm: Arm) -> Arm:
        """The arm under the name that it has here."""
        return replace(arm, title=self.titles.get(arm.name, arm.title))


def all_arms(setting: Setting, depth: int, teacher_steps: int) -> dict[str, Arm]:
    """Every arm by name, those that others start from first.

    Args:
        depth: blocks of the teacher's network.
        teacher_steps: of its official grid.
    """
    m = setting.student_steps
    last = {"feature_blocks": (depth - 1,)}
    arms = [
        Arm(FULL_TEACHER, f"teacher, {teacher_steps} steps", teacher_steps, "teacher"),
        *(
            Arm(f"teacher_{n}", f"teacher, {_steps(n)}", n, "teacher")
            for n in sorted({m, *setting.other_steps})
        ),
        Arm(BASE, f"trajectory guidance, {setting.updates} updates", m),
        Arm("trajectory", "+ trajectory guidance", m, "tuned", {"adversarial": False}),
        Arm("shared", "+ adversarial, one shared head", m, "tuned", {"heads": "shared", **last}),
        Arm("timestep", "+ adversarial, a head per key time", m, "tuned"),
        Arm("last_block", "heads at the last block alone", m, "tuned", last),
        Arm("hinge", "hinge loss", m, "tuned", {"gan_loss": "hinge"}),
        Arm("queued", "queued rollout", m, "tuned", {"rollout": "queued"}),
        Arm("no_r1", "no R1", m, "tuned", {"r1_weight": 0.0}),
        *(Arm(f"lambda_{x:g}", f"lambda = {x:g}", m, "tuned", {"adv_weight": x})
          for x in (0.01, 1.0)),
        *(Arm(f"trajectories_{n}", f"{n} trajectories", m, changes={"trajectories": n})
          for n in setting.counts),
        *(Arm(f"steps_{n}", f"m = {n}", n) for n in setting.other_steps),
        *(Arm(f"rank_{r}", f"LoRA of rank {r}", m, changes={"lora": LoraSpec(rank=r)})
          for r in (4, 16)),
        *(Arm(f"full_{lr:g}", f"all weights, learning rate {lr:g}", m,
              changes={"lora": None, "lr": lr}) for lr in (1e-4, 1e-3)),
    ]  # fmt: skip
    return {arm.name: arm for arm in arms}


def all_questions(setting: Setting) -> dict[str, Question]:
    """Every question by name, Figure 7 first."""
    return {one.name: one for one in (*_parts(setting), *_game(), *_amounts(setting))}


def _parts(setting: Setting) -> list[Question]:
    """What the method consists of."""
    m, usual = setting.student_steps, "timestep"
    return [
        Question(
            "figure7",
            "Figure 7: what each part of the method gives",
            "The paper shows this ablation as pictures. Students learn by trajectory guidance; "
            "from there all rows take the same number of further updates on the same batches.",
            (FULL_TEACHER, f"teacher_{m}", "trajectory", "shared", usual),
            (("trajectory", f"teacher_{m}"), ("shared", "trajectory"), (usual, "shared")),
            claim=True,
        ),
        Question(
            "heads",
            "Where the heads look",
            "The paper takes the last block for t > 0 and another at two thirds of the depth for "
            "t = 0. One shared head can look at one block alone, the last; so there is a row with "
            "its features and separate heads.",
            ("shared", "last_block", usual),
            (("last_block", "shared"), (usual, "last_block")),
            titles={
                "shared": "one head, the last block",
                "last_block": "a head per key time, the last block",
                usual: "a head per key time, another block at t = 0",
            },
        ),
    ]


def _game() -> list[Question]:
    """How the adversarial term is computed; arms of a seed start from one trajectory student."""
    usual, lambdas = "timestep", ("trajectory", "lambda_0.01", "timestep", "lambda_1")
    return [
        Question(
            "loss",
            "Logistic or hinge loss",
            "The paper gives the game's value and not the loss of each side.",
            (usual, "hinge"),
            (("hinge", usual),),
            titles={usual: "logistic loss"},
        ),
        Question(
            "rollout",
            "Direct or queued rollout",
            "The paper's queues spread a rollout over m updates, so that fakes are a little old; "
            "direct rollout makes all steps in each update and costs more.",
            (usual, "queued"),
            (("queued", usual),),
            titles={usual: "direct rollout"},
        ),
        Question(
            "regulariser",
            "With and without R1",
            "The paper says that trajectory guidance makes a regulariser of the heads unnecessary; "
            "the recipe for the embedded teacher has one.",
            (usual, "no_r1"),
            (("no_r1", usual),),
            titles={usual: "approximate R1 of weight 10"},
        ),
        Question(
            "lambda",
            "The weight of the adversarial term",
            "The paper takes 0.1; 0 is as many updates of trajectory guidance alone.",
            lambdas,
            tuple((name, usual) for name in lambdas if name != usual),
            titles={"trajectory": "lambda = 0", usual: "lambda = 0.1"},
        ),
    ]


def _amounts(setting: Setting) -> list[Question]:
    """About trajectory guidance alone, at equal updates."""
    m = setting.student_steps
    counts = sorted({*setting.counts, setting.trajectories})
    by_count = [BASE if n == setting.trajectories else f"trajectories_{n}" for n in counts]
    pairs = [(f"teacher_{n}", BASE if n == m else f"steps_{n}")
             for n in sorted({*setting.other_steps, m})]  # fmt: skip
    ranks = ("rank_4", "rank_16", BASE, "full_0.0001", "full_0.001")
    return [
        Question(
            "trajectories",
            "How many trajectories",
            "Trajectory guidance alone, at equal updates.",
            tuple(by_count),
            tuple((name, BASE) for name in by_count if name != BASE),
            titles={BASE: f"{setting.trajectories} trajectories"},
        ),
        Question(
            "steps",
            "How many key steps",
            "Trajectory guidance alone, at equal updates, beside the teacher at as many steps. "
            "Where m does not divide its steps, key times are the nearest of them.",
            tuple(name for pair in pairs for name in pair),
            tuple((student, teacher) for teacher, student in pairs),
            titles={BASE: f"m = {m}"},
        ),
        Question(
            "rank",
            "LoRA rank, or all weights",
            "Trajectory guidance alone, at equal updates. All weights want a lower learning rate "
            "than adapters, so there are two of them.",
            ranks,
            tuple((name, BASE) for name in ranks if name != BASE),
            titles={BASE: "LoRA of rank 64"},
        ),
    ]


def needed(questions: Sequence[Question], arms: dict[str, Arm]) -> list[Arm]:
    """The arms that these questions need, with those that they start from, in order."""
    names = {FULL_TEACHER, *(row for question in questions for row in question.rows)}
    names |= {start for name in names if (start := arms[name].start) is not None}
    return [arm for name, arm in arms.items() if name in names]


def chosen(names: Sequence[str], setting: Setting) -> list[Question]:
    """The questions called so, in the page's order."""
    questions = all_questions(setting)
    for name in names:
        if name not in questions:
            raise AccVideoError(
                f"there is no question {name!r}; choose of {', '.join(questions)}"
            )
    return [question for name, question in questions.items() if name in names]


def _steps(count: int) -> str:
    return f"{count} step" + "s" * (count > 1)

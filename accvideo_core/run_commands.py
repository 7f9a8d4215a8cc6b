"""The terminal's commands about recipes and runs: `accvideo recipe`, `accvideo compare RUN...`,
and `--plan` of those that train.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import recipe_of
from .errors import AccVideoError

if TYPE_CHECKING:
    from .distill.recipes import Recipe
    from .distill.student import Student
    from .models.loading import Teacher
    from .trajectories.store import TrajectoryDataset

PAGE = Path("compare.html")


def recipe(args: Namespace) -> None:
    """List recipes; print one as JSON or with its fields' meanings; or write it to a file."""
    from .distill.recipe_file import explained, recipe_json, summary
    from .distill.recipes import PRESETS
    from .files import write_bytes

    if args.recipe is None:
        if args.set or args.explain or args.out is not None:
            raise AccVideoError("--set, --explain and --out need a recipe; name one, such as paper")
        for name, one in PRESETS.items():
            print(f"{name:22}{summary(one)}")
        return
    chosen = recipe_of(args)
    if args.out is not None:
        write_bytes(args.out, (recipe_json(chosen) + "\n").encode())
        print(f"recipe {chosen.name} is in {args.out}", file=sys.stderr)
    if args.explain or args.out is None:
        print((explained if args.explain else recipe_json)(chosen))


def print_plan(
    device: str, teacher: Teacher, dataset: TrajectoryDataset, recipe: Recipe, start: Student | None
) -> None:
    """The memory that training needs on `device`, or where the teacher is if that is empty."""
    import torch

    from .distill.trainer import memory_plan

    try:
        there = torch.device(device) if device else None
    except RuntimeError as error:
        raise AccVideoError(f"--plan {device} is no device; write cuda, mps or cpu") from error
    print(memory_plan(teacher.model, dataset, recipe, start=start, device=there).table())


def draw_runs(args: Namespace) -> None:
    """Several runs on one page."""
    from .evaluate.runs_page import write_runs_page

    page = args.out or PAGE
    write_runs_page(args.paths, page)
    print(f"{len(args.paths)} runs are on {page}" if len(args.paths) > 1 else f"see {page}")


def about_runs(args: Namespace) -> bool:
    """Whether `compare` is asked to draw runs, not to measure students.

    Raises:
        AccVideoError: it is asked for both, or for neither.
    """
    from .distill.run import CONFIG_FILE

    first: Path = args.paths[0]
    measured = args.student or args.prompt or args.prompts or args.world or args.curves
    several = len(args.paths) > 1 or args.out is not None
    if measured and several:
        raise AccVideoError(
            "students are measured into one folder, and runs are drawn without being measured; "
            "give one folder and no --out, or leave --student, --curves and the prompts out"
        )
    if not measured and not several and not (first / CONFIG_FILE).is_file():
        raise AccVideoError(
            f"{first} is no training run (no {CONFIG_FILE}), and there are no prompts to measure "
            "students on; name run folders, or use --prompt, --prompts or --world"
        )
    return not measured

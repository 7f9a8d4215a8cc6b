"""`accvideo toy`: the paper's one-dimensional experiment."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from . import argument_groups as groups
from .errors import AccVideoError
from .terminal import Terminal


def add_arguments(parser: ArgumentParser) -> None:
    """Give `accvideo toy` its arguments."""
    from .toy.settings import PRESETS, ToySettings

    usual = ToySettings()
    parser.add_argument("out", type=Path, help="folder for it; a cancelled experiment goes on")
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="short",
        help="short, or paper with its updates, batch and learning rate (short)",
    )
    parser.add_argument("--seed", type=int, default=usual.seed, help="of everything (0)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=usual.tolerance,
        help="how far from the data an end makes a point useless, of data at -3 and 3 "
        f"({usual.tolerance:g})",
    )
    parser.add_argument(
        "--envelope",
        type=int,
        default=usual.envelope,
        help=f"trajectories outside whose range a point is useless ({usual.envelope})",
    )
    for of in ("teacher", "student"):
        parser.add_argument(
            f"--{of}-updates", type=int, metavar="N", help=f"of the {of} (the preset's)"
        )
    groups.threads(parser)


def toy(args: Namespace) -> None:
    """Run the experiment, print its numbers and say where the figure is."""
    import torch

    from .toy import FIGURE, PRESETS, run_toy
    from .toy.report import table

    asked = {name: getattr(args, name) for name in ("teacher_updates", "student_updates")}
    settings = replace(
        PRESETS[args.preset], seed=args.seed, tolerance=args.tolerance, envelope=args.envelope,
        **{name: updates for name, updates in asked.items() if updates is not None},
    )  # fmt: skip
    if args.threads is not None:
        if args.threads < 1:
            raise AccVideoError(f"--threads is {args.threads}, but there must be at least 1")
        torch.set_num_threads(args.threads)
    with Terminal(sys.stderr) as terminal:
        found = run_toy(args.out, settings, terminal)
    print(table(found))
    print(f"the figure is {args.out / FIGURE}.png (and .svg), the numbers lie beside it")

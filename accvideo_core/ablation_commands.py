"""`accvideo ablation`: what each part of the method gives, on the embedded teacher."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from . import argument_groups as groups
from .errors import AccVideoError
from .terminal import Terminal

if TYPE_CHECKING:
    from .ablation.study import Study


def add_arguments(parser: ArgumentParser) -> None:
    """Give `accvideo ablation` its arguments."""
    parser.add_argument("out", type=Path, help="folder for everything; the same one goes on")
    parser.add_argument(
        "--paper",
        choices=("accvideo", "sf-v"),
        default="accvideo",
        help="whose experiments: on the embedded text-to-video teacher, or on the embedded "
        "image-to-video one (accvideo)",
    )
    parser.add_argument(
        "--preset",
        choices=("quick", "full"),
        default="quick",
        help="quick takes minutes and answers the first question coarsely; full takes hours "
        "(quick)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="QUESTION",
        help="of figure7, heads, loss, rollout, regulariser, lambda, trajectories, steps, rank; "
        "of sf-v: one_step, heads, p_mean, methods (quick: the first; full: all)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        metavar="N",
        help="of training (0 1 2); several processes may share the folder, each with its own",
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="Markdown to write, with pictures in images beside it (OUT/experiments.md)",
    )
    groups.machine(parser)


def ablation(args: Namespace) -> None:
    """Run what is not done yet, and write the page from what is there."""
    from .ablation.arms import chosen, needed
    from .ablation.lab import Lab
    from .ablation.page import write_page
    from .models.source import TeacherSource

    study = _study(args)
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise AccVideoError(f"--seeds {args.seeds} must be different numbers of at least 0")
    every = study.quick if args.preset == "quick" else tuple(study.questions())
    questions = chosen(args.only or every, study.questions())
    source = TeacherSource(
        study.teacher_folder(),
        device=args.device,
        dtype=args.dtype or "float32",
        threads=args.threads,
    )
    lab, page = Lab(source.load(), study, args.out), args.page or args.out / "experiments.md"
    with Terminal(sys.stderr) as terminal:
        lab.run(needed(questions, lab.arms()), args.seeds, terminal)
        first = study.sections(lab, page, terminal)
    write_page(lab, questions, lab.seeds_done(), page, _command(args), first)
    print(page)


def _study(args: Namespace) -> Study:
    from .ablation.accvideo import AccVideoStudy
    from .ablation.sf_v import SfvStudy

    made = AccVideoStudy.preset if args.paper == "accvideo" else SfvStudy.preset
    return made(args.preset)


def _command(args: Namespace) -> str:
    """What gives the page again."""
    words = ["accvideo ablation OUT"]
    if args.paper != "accvideo":
        words.append(f"--paper {args.paper}")
    words.append(f"--preset {args.preset}")
    if args.only:
        words.append(f"--only {' '.join(args.only)}")
    if args.seeds != [0, 1, 2]:
        words.append(f"--seeds {' '.join(map(str, args.seeds))}")
    if args.page:
        words.append(f"--page {args.page}")
    return " ".join(words)

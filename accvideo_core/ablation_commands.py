"""`accvideo ablation`: what each part of the method gives, on the embedded teacher."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from . import argument_groups as groups
from .errors import AccVideoError
from .terminal import Terminal


def add_arguments(parser: ArgumentParser) -> None:
    """Give `accvideo ablation` its arguments."""
    parser.add_argument("out", type=Path, help="folder for everything; the same one goes on")
    parser.add_argument(
        "--preset",
        choices=("quick", "full"),
        default="quick",
        help="quick takes minutes and answers Figure 7 coarsely; full takes hours (quick)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="QUESTION",
        help="of figure7, heads, loss, rollout, regulariser, lambda, trajectories, steps, rank "
        "(quick: figure7; full: all)",
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
    from .ablation.accvideo import AccVideoStudy
    from .ablation.arms import chosen, needed
    from .ablation.lab import Lab
    from .ablation.page import write_page
    from .models.source import TeacherSource

    study = AccVideoStudy.preset(args.preset)
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise AccVideoError(f"--seeds {args.seeds} must be different numbers of at least 0")
    every = study.quick if args.preset == "quick" else tuple(study.questions())
    questions = chosen(args.only or every, study.questions())
    source = TeacherSource(device=args.device, dtype=args.dtype or "float32", threads=args.threads)
    lab, page = Lab(source.load(), study, args.out), args.page or args.out / "experiments.md"
    with Terminal(sys.stderr) as terminal:
        lab.run(needed(questions, lab.arms()), args.seeds, terminal)
        first = study.sections(lab, page, terminal)
    write_page(lab, questions, lab.seeds_done(), page, _command(args), first)
    print(page)


def _command(args: Namespace) -> str:
    """What gives the page again."""
    words = [f"accvideo ablation OUT --preset {args.preset}"]
    if args.only:
        words.append(f"--only {' '.join(args.only)}")
    if args.seeds != [0, 1, 2]:
        words.append(f"--seeds {' '.join(map(str, args.seeds))}")
    if args.page:
        words.append(f"--page {args.page}")
    return " ".join(words)

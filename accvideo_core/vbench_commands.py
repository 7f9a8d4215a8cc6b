"""`accvideo vbench`: videos judged by the package vbench, or its results collected."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from .errors import AccVideoError
from .terminal import Terminal


def add_arguments(parser: ArgumentParser) -> None:
    """Give `accvideo vbench` its arguments."""
    parser.add_argument(
        "videos", type=Path, nargs="?", help="folder of videos that sample --names made"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("vbench"), metavar="FOLDER",
        help="for scores and VBench's own results (vbench); what is judged there is not judged "
        "again",
    )  # fmt: skip
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="collect these results of VBench, made anywhere, and judge nothing",
    )
    parser.add_argument(
        "--dimension",
        action="append",
        metavar="NAME",
        help="one of VBench's dimensions; may be repeated (all, which totals need)",
    )
    parser.add_argument(
        "--info", type=Path, metavar="FILE", help="VBench_full_info.json (the package's)"
    )
    parser.add_argument("--device", default="cuda", help="of VBench's networks (cuda)")


def vbench(args: Namespace) -> None:
    """Judge, and write the scores."""
    from .evaluate.vbench_scores import DIMENSIONS, collect, package_folder, run
    from .files import write_bytes, write_json

    if (args.videos is None) == (args.results is None):
        raise AccVideoError("vbench needs a folder of videos, or --results; give one of them")
    unknown = [name for name in args.dimension or () if name not in DIMENSIONS]
    if unknown:
        raise AccVideoError(
            f"VBench has no dimension {unknown[0]!r}; it has {', '.join(DIMENSIONS)}"
        )
    results = args.results or args.out / "results"
    if args.videos is not None:
        info = args.info or package_folder() / "VBench_full_info.json"
        dimensions = args.dimension or list(DIMENSIONS)
        with Terminal(sys.stderr) as terminal:
            run(args.videos, info, results, dimensions, args.device, terminal)
    scores = collect(results)
    write_json(args.out / "vbench.json", scores.as_dict())
    write_bytes(args.out / "vbench.txt", f"{scores.table()}\n".encode())
    print(scores.table())

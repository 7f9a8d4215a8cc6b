"""`accvideo ingest`: real videos as a dataset."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from . import argument_groups as groups
from .arguments import plan_of, source_of
from .terminal import Terminal


def add_arguments(parser: ArgumentParser) -> None:
    """Give `accvideo ingest` its arguments."""
    parser.add_argument(
        "folder",
        type=Path,
        help="folder of videos, with their captions beside them (a.txt or a.caption for a.mp4) or "
        "in captions.jsonl or metadata.jsonl",
    )
    parser.add_argument("dataset", type=Path, help="dataset folder; ingesting goes on if it exists")
    groups.teacher(parser)
    groups.size(parser)
    group = parser.add_argument_group("clips")
    group.add_argument("--fps", type=float, help="frames a second to take (each video's own)")
    group.add_argument("--stride", type=int, default=1, help="take every so many of those (1)")
    group.add_argument(
        "--spacing",
        type=float,
        metavar="SECONDS",
        help="from the beginning of one clip to that of the next (a clip's length)",
    )
    group.add_argument(
        "--clips", type=int, metavar="N", help="most clips of a video (all that fit)"
    )
    group.add_argument(
        "--caption",
        metavar="TEXT",
        help="of videos without one (they are left out, but for image-to-video models)",
    )
    group.add_argument("--store", default="bfloat16", help="dtype on disk (bfloat16)")
    group.add_argument("--guidance", type=float, help="embedded guidance (the family's)")


def ingest(args: Namespace) -> None:
    """Ingest a folder, and say what was left out."""
    from .trajectories.clips import Cutting
    from .trajectories.footage import IngestSpec
    from .trajectories.ingest import SKIPPED_FILE
    from .trajectories.ingest import ingest as work

    cutting = Cutting(args.fps, args.stride, args.spacing)
    # The network itself is not asked, and its place is better left to VAE and text encoders.
    teacher = replace(source_of(args), in_main_memory=True).load()
    plan = plan_of(args, teacher)
    spec = IngestSpec(
        frames=plan.frames,
        height=plan.height,
        width=plan.width,
        cutting=cutting,
        clips=args.clips,
        caption=args.caption,
        dtype=args.store,
        guidance=args.guidance,
    )
    with Terminal(sys.stderr) as terminal:
        done = work(teacher, args.folder, spec, args.dataset, terminal)
    for one in done.skipped:
        print(f"left out {one}", file=sys.stderr)
    print(f"{len(done.dataset)} clips are in {args.dataset}, of {done.videos} videos")
    if done.skipped:
        verb = "was" if len(done.skipped) == 1 else "were"
        print(f"{len(done.skipped)} {verb} left out, see {args.dataset / SKIPPED_FILE}")

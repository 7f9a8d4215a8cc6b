"""`accvideo evaluate`: videos judged by others."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from . import argument_groups as groups
from .errors import AccVideoError
from .terminal import Terminal


def add_arguments(parser: ArgumentParser) -> None:
    """Give `accvideo evaluate` its arguments."""
    parser.add_argument(
        "reference", type=Path, metavar="A", help="the reference: a folder of videos, or one video"
    )
    parser.add_argument(
        "judged", type=Path, metavar="B", help="what is judged by it; videos of one name are a pair"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("evaluation"), metavar="FOLDER",
        help="for page, report and plots (evaluation); what was measured there is not measured "
        "again",
    )  # fmt: skip
    group = parser.add_argument_group("figures that need weights (see docs/evaluation.md)")
    group.add_argument(
        "--lpips",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="torchvision's AlexNet or VGG-16, and the linear heads of LPIPS where torchmetrics, "
        "which has them, is not installed",
    )
    group.add_argument(
        "--fvd", type=Path, metavar="FILE", help="I3D as StyleGAN-V's i3d_torchscript.pt"
    )
    parser.add_argument("--players", type=int, default=8, help="pairs whose videos are shown (8)")
    groups.device(parser)


def evaluate(args: Namespace) -> None:
    """Measure, and write the page."""
    import torch

    from .evaluate.clips import clips_of
    from .evaluate.evaluate_videos import Tools, evaluate_videos
    from .evaluate.fvd import Detector
    from .evaluate.lpips import load_lpips
    from .evaluate.video_page import write_evaluation

    sides = clips_of(args.reference), clips_of(args.judged)
    if args.reference.is_dir() != args.judged.is_dir():
        raise AccVideoError(
            f"{args.reference} and {args.judged} are a folder and a file; give two of a kind"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tools = Tools(
        lpips=load_lpips(*args.lpips) if args.lpips else None,
        detector=Detector(args.fvd, device) if args.fvd else None,
        device=device,
    )
    with Terminal(sys.stderr) as terminal:
        labels = str(args.reference), str(args.judged)
        found = evaluate_videos(*sides, args.out, tools, labels, terminal)
        write_evaluation(found, args.out, args.players, terminal)
    print(found.table())
    print(f"page, report and plots are in {args.out}")

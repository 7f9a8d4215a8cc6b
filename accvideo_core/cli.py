"""The terminal's way in: accvideo record | dataset | distill | tune | sample | export | compare ...

This file holds the arguments and what all commands share; `commands.py` does the work.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from . import argument_groups as groups
from .errors import AccVideoError
from .monitor import Cancelled

_DESCRIPTION = """\
Turn a video diffusion model (a diffusers folder) into a student that needs 1 to 8 steps.
Without --teacher every command works on the tiny embedded HunyuanVideo."""

_LINE = """\
the whole line, on the embedded teacher:
  accvideo record   clips --world 256 --samples 2
  accvideo distill  clips runs/traj --recipe tiny-trajectory-2
  accvideo tune     clips runs/adv --student runs/traj/student.safetensors
  accvideo sample   out --student runs/adv/student.safetensors --world 4
  accvideo compare  report --student runs/adv/student.safetensors --world 64
or all of it with  accvideo demo build/demo"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    0 when done, 1 for a dataset with faults, 2 for a user's error, 130 when cancelled.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        return args.work(args) or 0
    except AccVideoError as error:
        print(f"accvideo {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (Cancelled, KeyboardInterrupt):
        print("\ncancelled; run the same command to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from . import (
        ablation_commands,
        commands,
        dataset_commands,
        evaluate_commands,
        ingest_commands,
        inspect_commands,
        profile_commands,
        run_commands,
        sample_commands,
        toy_commands,
        vbench_commands,
    )

    parser = argparse.ArgumentParser(
        prog="accvideo",
        description=_DESCRIPTION,
        epilog=_LINE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"accvideo {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, work: object, text: str, example: str) -> argparse.ArgumentParser:
        one = subparsers.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  accvideo {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(work=work)
        return one

    _record(add("record", commands.record, "record a teacher's trajectories into a dataset folder",
                "clips --world 256 --samples 2 --batch 16"))  # fmt: skip
    ingest_commands.add_arguments(
        add("ingest", ingest_commands.ingest, "make a dataset of clips of real videos",
            "videos clips --fps 8 --clips 4"))  # fmt: skip
    _distill(add("distill", commands.distill, "train a student on a dataset",
                 "clips runs/traj --recipe tiny-trajectory-2 --set train_steps=200"))  # fmt: skip
    _tune(add("tune", commands.tune, "train a student further, adversarially by default",
              "clips runs/adv --student runs/traj/student.safetensors"))  # fmt: skip
    _recipe(add("recipe", run_commands.recipe, "list, explain and save recipes of training",
                "adversarial --set lora.rank=64 --out mine.json"))  # fmt: skip
    _sample(add("sample", sample_commands.sample,
                "sample videos from a student or from the teacher",
                "out --student student.safetensors --prompt "
                '"a red circle moving left on a plain background"'))  # fmt: skip
    _export(add("export", commands.export, "write a student for ComfyUI's loaders or for diffusers",
                "runs/adv ComfyUI/models/loras/fast.safetensors"))  # fmt: skip
    inspect_commands.add_arguments(
        add("inspect", inspect_commands.inspect, "say what a folder or file is",
            "runs/traj/student.safetensors"))  # fmt: skip
    dataset_commands.add_arguments(
        add("dataset", None, "check, measure, merge, divide or export a dataset",
            "verify clips --repair"), groups.teacher)  # fmt: skip
    _compare(add("compare", commands.compare,
                 "measure students against their teacher, or draw training runs on one page",
                 "report --student fast=student.safetensors --world 128\n"
                 "  accvideo compare runs/a runs/b --out page.html"))  # fmt: skip
    profile_commands.add_arguments(
        add("profile", profile_commands.profile, "say where the time of sampling a clip goes",
            'out --prompt "a red circle moving left on a plain background"'))  # fmt: skip
    evaluate_commands.add_arguments(
        add("evaluate", evaluate_commands.evaluate, "judge real videos by others, or by pairs",
            "teacher/ student/ --out report"))  # fmt: skip
    vbench_commands.add_arguments(
        add("vbench", vbench_commands.vbench, "have VBench judge videos, or collect its results",
            "videos --out scores"))  # fmt: skip
    ablation_commands.add_arguments(
        add("ablation", ablation_commands.ablation,
            "measure what each part of the method gives, on the embedded teacher",
            "build/ablation --preset quick"))  # fmt: skip
    toy_commands.add_arguments(
        add("toy", toy_commands.toy, "run the paper's one-dimensional experiment (Figure 2)",
            "build/toy --seed 1"))  # fmt: skip
    _demo(add("demo", commands.demo, "run the whole line on the embedded teacher",
              "build/demo --trajectories 256"))  # fmt: skip
    return parser


def _record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="dataset folder; recording goes on if it exists")
    groups.teacher(parser)
    groups.prompts(parser)
    groups.size(parser)
    parser.add_argument("--samples", type=int, default=1, help="samples per prompt (1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (0)")
    parser.add_argument("--steps", type=int, help="teacher steps (the family's official number)")
    parser.add_argument(
        "--keep",
        default="10",
        help='which states to keep: m for every n/m-th, indices like "0,25,50", or all (10)',
    )
    parser.add_argument("--store", default="bfloat16", help="dtype on disk (bfloat16)")
    parser.add_argument("--guidance", type=float, help="embedded guidance (the family's)")
    parser.add_argument("--batch", type=int, default=8, help="records at once (8)")
    parser.add_argument("--shift", type=float, help="shift of the time grid (the family's)")
    parser.add_argument("--times", help='the time grid itself, such as "1,0.9,0.5,0"')
    groups.cfg(parser)
    groups.speed(parser, exact=True)
    _cluster(parser)


def _cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many GPUs or machines, with Ray (see docs/cluster.md)")
    group.add_argument(
        "--cluster",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help='of a Ray that runs, such as "auto"; without it one is started on this machine',
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="one per GPU, or without GPUs one per machine"
    )
    group.add_argument(
        "--lease",
        type=float,
        metavar="SECONDS",
        help="without a teacher step, after which a worker is replaced (900)",
    )


def _distill(parser: argparse.ArgumentParser) -> None:
    _training(parser, "tiny-trajectory")
    parser.add_argument("--student", type=Path, help="student file to start from (the teacher)")


def _tune(parser: argparse.ArgumentParser) -> None:
    _training(parser, "tiny-adversarial")
    parser.add_argument("--student", type=Path, required=True, help="student file to start from")


def _training(parser: argparse.ArgumentParser, recipe: str) -> None:
    parser.add_argument("dataset", type=Path, help="dataset folder that `record` made")
    parser.add_argument("run", type=Path, help="run folder; training goes on if it exists")
    groups.teacher(parser)
    parser.add_argument("--recipe", default=recipe, help=f"{_recipes()} ({recipe})")
    _changes(parser)
    parser.add_argument(
        "--plan",
        nargs="?",
        const="",
        metavar="DEVICE",
        help="print the memory that the run needs, here or on a device such as cuda, and stop",
    )
    parser.add_argument("--out", type=Path, help="student file to write (RUN/student.safetensors)")
    parser.add_argument(
        "--validation",
        type=Path,
        metavar="DATASET",
        help="dataset whose clips are looked at every validate_every updates (the training one)",
    )
    parser.add_argument(
        "--sequence-parallel",
        type=int,
        metavar="N",
        help="under torchrun: N processes divide the tokens of a clip (1); see "
        "docs/distributed_training.md",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write RUN/tensorboard too (needs the package tensorboard)",
    )


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=f"{_recipes()} (lists them)")
    _changes(parser)
    parser.add_argument(
        "--explain", action="store_true", help="print every field with its meaning, not JSON"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")


def _recipes() -> str:
    from .distill.recipes import PRESETS

    return f"one of {', '.join(PRESETS)}; a JSON file; or the run folder to take it from"


def _changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the recipe, such as lr=1e-4 or lora.rank=16 or lora=null",
    )


def _sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder for the MP4s")
    groups.teacher(parser)
    groups.prompts(parser)
    groups.size(parser)
    groups.sampling(parser)
    parser.add_argument("--samples", type=int, default=1, help="samples per prompt (1)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the noise (1)")
    parser.add_argument("--batch", type=int, default=8, help="clips at once (8)")
    parser.add_argument("--fps", type=float, default=8, help="frames per second (8)")
    parser.add_argument("--upscale", type=int, help="enlarge pixels (small clips, to 128 pixels)")
    parser.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="text file with a name a line for the prompts of --prompts: videos are called "
        "NAME-0.mp4, NAME-1.mp4, ... as VBench wants, and those that are there are not sampled "
        "again (see docs/evaluation.md)",
    )
    groups.decoding(parser)
    groups.speed(parser)
    parser.add_argument(
        "--sequence-parallel",
        type=int,
        metavar="N",
        help="under torchrun: N processes divide the tokens of a clip, where otherwise processes "
        "divide the clips (1)",
    )


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="run folder, finished or not, or a student file")
    parser.add_argument(
        "out",
        type=Path,
        help="file to write (.safetensors; two with _high_noise and _low_noise for a model of two "
        "experts), or for full weights in diffusers' layout a folder",
    )
    groups.network(parser)
    groups.device(parser)
    parser.add_argument(
        "--layout",
        choices=("native", "diffusers"),
        default="native",
        help="names of the official release, which ComfyUI loads, or of diffusers (native)",
    )
    parser.add_argument(
        "--what",
        choices=("lora", "full"),
        help="adapters alone, or merged into the teacher's weights (lora where there is one)",
    )
    parser.add_argument(
        "--dtype",
        dest="store",
        choices=("bf16", "fp16", "fp32", "fp8"),
        default="bf16",
        help="of the file (bf16); fp8 is ComfyUI's scaled fp8, for full weights",
    )
    parser.add_argument("--rank", type=int, help="cut adapters to this rank by SVD (exact)")


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="OUT | RUN",
        help="folder for report, table, pictures and MP4s of students on prompts; or, without "
        "students and prompts, the folders of runs to draw, finished or not",
    )
    parser.add_argument(
        "--out", type=Path, metavar="PAGE", help="HTML file to draw runs on (compare.html)"
    )
    groups.teacher(parser)
    groups.prompts(parser)
    groups.size(parser)
    parser.add_argument(
        "--student",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="student file, with a name for the table; may be given more than once",
    )
    parser.add_argument(
        "--steps",
        default="",
        help='more steps to show, such as "10,4": the teacher\'s, and students\' that take any',
    )
    groups.cfg(parser)
    parser.add_argument("--samples", type=int, default=2, help="samples per prompt (2)")
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the noise, not the dataset's (1)"
    )
    parser.add_argument("--batch", type=int, default=16, help="clips at once (16)")
    parser.add_argument("--real", type=int, default=1024, help="real clips to measure against")
    parser.add_argument("--fps", type=float, default=8, help="frames per second (8)")
    parser.add_argument(
        "--curves", type=Path, action="append", default=[], help="run folder whose losses to draw"
    )
    groups.speed(parser, exact=True)


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder for everything")
    parser.add_argument("--trajectories", type=int, default=256, help="to record (256)")
    parser.add_argument("--updates", type=int, default=200, help="of each training stage (200)")
    parser.add_argument("--clips", type=int, default=64, help="prompts to compare on (64)")
    groups.machine(parser)

if __name__ == "__main__":  # torchrun -m accvideo_core.cli
    raise SystemExit(main())

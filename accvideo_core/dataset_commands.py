"""The terminal's `accvideo dataset verify | stats | merge | subset | split | export`.

What each does and which arguments it takes; `cli.py` hangs them into the whole.
"""

from __future__ import annotations

import argparse
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import decoder_of, kept_states, teacher_of
from .errors import AccVideoError
from .terminal import Terminal

if TYPE_CHECKING:
    from .conditioning import Prompt
    from .models.loading import Teacher
    from .trajectories.stats import DatasetStats
    from .trajectories.store import TrajectoryDataset
    from .trajectories.verify import Fault

FAULTY = 1
"""Exit code of `verify` when something is wrong with the dataset."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def add_arguments(parser: ArgumentParser, teacher: Callable[[ArgumentParser], None]) -> None:
    """Give `accvideo dataset` its sub-commands; `teacher` adds a teacher's arguments to one."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(work: Callable[[Namespace], int | None], text: str, example: str) -> ArgumentParser:
        one = actions.add_parser(
            work.__name__,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  accvideo dataset {work.__name__} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(work=work)
        return one

    _verify(add(verify, "read everything and print every fault", "clips --repair"), teacher)
    _stats(add(stats, "measure a dataset and make a page to look at", "clips --out page"), teacher)
    _merge(add(merge, "make one dataset of several", "clips_a clips_b clips"))
    _subset(add(subset, "make a dataset of a part of one", 'clips few --match "red|blue"'))
    _split(add(split, "split by prompt for training and validation", "clips train validation"))
    _export(add(export, "write tars for other trainers", "clips tars --shard-size 1GB"))


def verify(args: Namespace) -> int:
    """Print what is wrong, and mend it where asked to."""
    dataset = _opened(args.dataset)
    faults = _shown(dataset, content=not args.quick)
    if faults and args.repair:
        from .trajectories.mend import mend

        teacher = teacher_of(args)
        negative = _negative(args, dataset, teacher, faults)
        with Terminal(sys.stderr) as terminal:
            notes = mend(dataset, faults, teacher, negative, terminal)
        for note in notes:
            print(note)
        faults = _shown(dataset, content=True)
    if not faults:
        print(f"{args.dataset} has {len(dataset)} records and no fault")
    return FAULTY if faults else 0


def stats(args: Namespace) -> None:
    """Measure a dataset; with --out also write a page with previews."""
    from .evaluate.trajectory_report import facts, write_dataset_page
    from .trajectories.stats import dataset_stats

    dataset = _opened(args.dataset)
    decode = decoder_of(args, dataset)
    if decode is None:
        note = f"clips are not decoded; give the --teacher ({dataset.info.teacher_source}) for that"
        print(note, file=sys.stderr)
    with Terminal(sys.stderr) as terminal:
        notes = args.out / "measured.jsonl" if args.out is not None else None
        found = dataset_stats(dataset, decode, args.samples, terminal, notes)
        page = None
        if args.out is not None:
            page = write_dataset_page(dataset, found, args.out, decode, monitor=terminal)
    told = {**facts(dataset, found), **_figures(found), **({"page": str(page)} if page else {})}
    for name, text in told.items():
        print(f"{name:15}{text}")


def merge(args: Namespace) -> None:
    """One dataset of several."""
    from .trajectories.tools import merge as work

    with Terminal(sys.stderr) as terminal:
        made = work([_opened(folder) for folder in args.datasets], args.out, terminal)
    _say_made(made)


def subset(args: Namespace) -> None:
    """A dataset of chosen prompts, records or states."""
    from .trajectories.tools import Choice
    from .trajectories.tools import subset as work

    dataset = _opened(args.dataset)
    kept = None if args.kept is None else kept_states(args.kept)
    choice = Choice(
        texts=None if args.prompts is None else _texts(args.prompts, dataset),
        match=args.match,
        records=args.records,
        kept=(kept,) if isinstance(kept, int) else kept,
    )
    if choice == Choice():
        raise AccVideoError(
            "nothing is chosen; give at least one of --prompts, --match, --records and --kept"
        )
    with Terminal(sys.stderr) as terminal:
        _say_made(work(dataset, args.out, choice, terminal))


def split(args: Namespace) -> None:
    """Two datasets without a common prompt."""
    from .trajectories.tools import split as work

    sides = args.train, args.validation
    with Terminal(sys.stderr) as terminal:
        made = work(_opened(args.dataset), *sides, args.fraction, args.seed, terminal)
    for dataset in made:
        _say_made(dataset)


def export(args: Namespace) -> None:
    """Tars for other trainers."""
    from .trajectories.webdataset import Export, export_webdataset

    how = Export(byte_size(args.shard_size), args.tensors, args.conditions, args.text_length)
    dataset = _opened(args.dataset)
    with Terminal(sys.stderr) as terminal:
        shards = export_webdataset(dataset, args.out, how, terminal)
    size = sum(path.stat().st_size for path in shards)
    print(f"{len(dataset)} records are in {len(shards)} tars in {args.out} ({size / 1e6:.1f} MB)")


def byte_size(text: str) -> int:
    """1GB, 500 MB, 2GiB or a plain number -> bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not found or found[2] not in _UNITS:
        raise AccVideoError(f"{text!r} is no size; write it like 1GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2]])


def _shown(dataset: TrajectoryDataset, content: bool) -> list[Fault]:
    """The dataset's faults, after printing them."""
    from .trajectories.verify import verify as work

    with Terminal(sys.stderr) as terminal:
        faults = work(dataset, content, terminal)
    for fault in faults:
        print(" ".join(str(fault).split()))
    if faults:
        print(f"{dataset.folder} has {len(faults)} fault{'s' if len(faults) > 1 else ''}")
    return faults


def _figures(found: DatasetStats) -> dict[str, str]:
    """What was measured, in words."""
    words = found.words
    named = {
        "prompt lengths": f"{words[0]} to {words[-1]} words, median {words[len(words) // 2]}",
        "same texts": ", ".join(f"{text!r} {count} times" for text, count in found.same_text[:5]),
        "measured": f"{found.clips} records",
        "same clips": f"{len(found.same_clip)} pairs" if found.same_clip else "",
    }
    spreads = {**({"bend": found.bend} if found.bend else {}), **found.figures}
    named |= {
        name: f"{x.mean:.4g}, from {x.low:.4g} to {x.high:.4g}" for name, x in spreads.items()
    }
    return {name: text for name, text in named.items() if text}


def _negative(
    args: Namespace, dataset: TrajectoryDataset, teacher: Teacher, faults: list[Fault]
) -> Prompt | None:
    """The negative prompt anew, where the dataset's own is damaged."""
    id = dataset.info.negative
    if id is None or not any(fault.kind == "prompt" and fault.id == id for fault in faults):
        return None
    if args.negative is None:
        return teacher.encode_negative()
    return teacher.encode_prompts([args.negative])[0]


def _texts(path: Path, dataset: TrajectoryDataset) -> frozenset[str]:
    """The prompts of a file; says how many of them the dataset does not have."""
    from .trajectories.listing import read_listing
    from .trajectories.prompts import read_prompts

    listed = read_prompts(path)
    for note in listed.notes:
        print(note, file=sys.stderr)
    texts = frozenset(entry.text for entry in listed.entries)
    absent = texts - set(read_listing(dataset.folder).texts.values())
    if absent:
        print(f"{len(absent)} of {len(texts)} prompts in {path} are not in {dataset.folder}, "
              f"such as {min(absent)!r}", file=sys.stderr)  # fmt: skip
    return texts


def _opened(folder: Path) -> TrajectoryDataset:
    from .trajectories.store import TrajectoryDataset

    return TrajectoryDataset.open(folder)


def _say_made(dataset: TrajectoryDataset) -> None:
    from .trajectories.listing import read_listing

    prompts = sum(1 for _ in read_listing(dataset.folder).ids())
    print(f"{len(dataset)} records of {prompts} prompts are in {dataset.folder}")


def _verify(parser: ArgumentParser, teacher: Callable[[ArgumentParser], None]) -> None:
    parser.add_argument("dataset", type=Path, help="dataset folder")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="remove what is damaged and let the teacher record exactly that again",
    )
    parser.add_argument(
        "--quick", action="store_true", help="read headers and sizes alone, not every byte"
    )
    parser.add_argument("--negative", help="negative prompt, if that is damaged (the family's)")
    teacher(parser)


def _stats(parser: ArgumentParser, teacher: Callable[[ArgumentParser], None]) -> None:
    parser.add_argument("dataset", type=Path, help="dataset folder")
    parser.add_argument("--out", type=Path, help="folder for an HTML page with previews")
    parser.add_argument("--samples", type=int, default=64, help="records to read states of (64)")
    teacher(parser)


def _merge(parser: ArgumentParser) -> None:
    parser.add_argument("datasets", type=Path, nargs="+", help="dataset folders, at least two")
    parser.add_argument("out", type=Path, help="folder of the new dataset")


def _subset(parser: ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="dataset folder")
    parser.add_argument("out", type=Path, help="folder of the new dataset")
    parser.add_argument("--prompts", type=Path, help="file of prompts to take")
    parser.add_argument("--match", help="take prompts in which this regular expression is found")
    parser.add_argument(
        "--records", type=int, help="take so many: sample 0 of the prompts in order, then sample 1"
    )
    parser.add_argument("--kept", help='states to keep, by their index in the grid: "0,25,50"')


def _split(parser: ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="dataset folder")
    parser.add_argument("train", type=Path, help="folder of the dataset for training")
    parser.add_argument("validation", type=Path, help="folder of the dataset for validation")
    parser.add_argument(
        "--fraction", type=float, default=0.05, help="of the prompts for validation (0.05)"
    )
    parser.add_argument("--seed", type=int, default=0, help="other seeds split otherwise (0)")


def _export(parser: ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="dataset folder")
    parser.add_argument("out", type=Path, help="folder for the tars; an export goes on there")
    parser.add_argument(
        "--format", choices=("webdataset",), default="webdataset", help="(webdataset)"
    )
    parser.add_argument("--shard-size", default="1GB", help="most bytes of a tar (1GB)")
    parser.add_argument(
        "--tensors",
        choices=("safetensors", "npy"),
        default="safetensors",
        help="the records' own files, or numpy arrays, in float32 for bfloat16 (safetensors)",
    )
    parser.add_argument("--conditions", action="store_true", help="with the text embeddings")
    parser.add_argument(
        "--text-length", type=int, help="fill text embeddings up to this length (npy)"
    )

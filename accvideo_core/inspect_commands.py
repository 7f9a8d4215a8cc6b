"""`accvideo inspect`: what a folder or file is; pictures of a record or of a network's features."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import argument_groups as groups
from .arguments import decoder_of, guidance_of, plan_of, teacher_of
from .errors import AccVideoError
from .monitor import Monitor
from .terminal import Terminal

if TYPE_CHECKING:
    from torch import Tensor

    from .evaluate.features import KeyStates
    from .models.loading import Teacher


def add_arguments(parser: ArgumentParser) -> None:
    """Give `accvideo inspect` its arguments."""
    parser.add_argument("path", type=Path, help="dataset, run, teacher, or student file")
    parser.add_argument("--verify", action="store_true", help="read everything and check it")
    parser.add_argument(
        "--record", help="of a dataset: an id, its beginning, a number, first, last or random"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for pictures of the record, or of --features"
    )
    groups.teacher(parser)
    group = parser.add_argument_group(
        "features: what the network's blocks see at the key times, of a dataset's record or of a "
        "clip that a teacher (PATH) samples"
    )
    group.add_argument(
        "--features",
        nargs="?",
        const="",
        metavar="BLOCKS",
        help='draw them, of blocks such as "0,20,39" (some, and those that the heads look at)',
    )
    group.add_argument("--shown", type=int, default=1, help="latent frames of each map (1)")
    group.add_argument("--prompt", help="of the clip that a teacher samples")
    group.add_argument("--seed", type=int, default=1, help="seed of its noise (1)")
    group.add_argument("--student-steps", type=int, default=5, help="its key steps (5)")
    groups.cfg(parser)
    groups.size(parser)


def inspect(args: Namespace) -> None:
    """Say what something is, or draw what is in it."""
    from .inspection import describe

    if args.features is not None:
        _features(args)
    elif args.record is not None or args.out is not None:
        _record(args)
    else:
        print(describe(args.path, args.verify))


def _record(args: Namespace) -> None:
    """Pictures and curves of one record of a dataset."""
    from .evaluate.trajectory_pictures import record_facts, write_record
    from .trajectories.stats import chosen_record, record_curves
    from .trajectories.store import TrajectoryDataset

    if args.out is None:
        raise AccVideoError("--record needs a folder for its pictures; give --out FOLDER")
    dataset = TrajectoryDataset.open(args.path)
    trajectory = dataset.read(chosen_record(dataset, args.record or "first"))
    decode = decoder_of(args, dataset)
    with Terminal(sys.stderr) as terminal:
        if decode is None:
            source = dataset.info.teacher_source
            terminal.say(f"states are not decoded; give the --teacher ({source}) for that")
        paths = write_record(dataset, trajectory, args.out, decode, terminal)
    text = dataset.prompt(trajectory.prompt_id).text
    print(record_facts(trajectory, record_curves(trajectory), text))
    for path in paths:
        print(path)


def _features(args: Namespace) -> None:
    """Feature maps of a record, or of a clip that the teacher samples first."""
    from .evaluate.feature_pictures import feature_facts, write_features
    from .evaluate.features import blocks_of, feature_maps

    if args.out is None:
        raise AccVideoError("--features needs a folder for its picture; give --out FOLDER")
    blocks = blocks_of(args.features)
    recorded = (args.path / "dataset.json").is_file()
    with Terminal(sys.stderr) as terminal:
        teacher, states, frames, told = (_recorded if recorded else _sampled)(args, terminal)
        maps = feature_maps(teacher.model, states, blocks, frames=args.shown, monitor=terminal)
        decoded = None
        if teacher.vae_path is not None:
            spec = teacher.model.latent_spec
            clips = (teacher.vae.decode(spec.crop(x[None], frames)) for x in states.latents)
            decoded = torch.cat(list(clips))
        paths = write_features(maps, decoded, args.out, told)
    print(feature_facts(maps))
    for path in paths:
        print(path)


_States = tuple["Teacher", "KeyStates", int, dict[str, Any]]
"""The teacher, a clip's states, its frames, and what is told of it in features.json."""


def _recorded(args: Namespace, _monitor: Monitor) -> _States:
    """The kept states of one record of a dataset, after its noise if that is kept."""
    from .evaluate.features import KeyStates
    from .trajectories.stats import chosen_record
    from .trajectories.store import TrajectoryDataset

    dataset = TrajectoryDataset.open(args.path)
    teacher, info = teacher_of(args), dataset.info
    if teacher.model.fingerprint != info.teacher:
        raise AccVideoError(
            f"dataset {dataset.folder.name!r} was recorded from another teacher than "
            f"{teacher.model.source}; give --teacher ({info.teacher_source})"
        )
    trajectory = dataset.read(chosen_record(dataset, args.record or "first"))
    prompt = dataset.prompt(trajectory.prompt_id)
    cond = prompt.condition.with_guidance(info.guidance)
    after = slice(1 if len(trajectory.times) > 1 else 0, None)
    states = KeyStates(trajectory.times[after], trajectory.latents[after].float(), cond)
    return teacher, states, info.frames, {"record": trajectory.id, "prompt": prompt.text}


def _sampled(args: Namespace, monitor: Monitor) -> _States:
    """The states at the key times of a clip that the teacher at PATH samples."""
    from .evaluate.features import sample_states
    from .guidance import guided

    if args.prompt is None:
        raise AccVideoError(
            "--features of a teacher needs a clip to look at; give --prompt TEXT, or a dataset "
            "instead of the teacher"
        )
    args.teacher = args.teacher or args.path
    teacher = teacher_of(args)
    plan, model = plan_of(args, teacher), teacher.model
    asked = guided(model, *guidance_of(args, teacher))
    prompts = teacher.encode_prompts([args.prompt])
    grid = model.family.time_grid(size=(plan.height, plan.width))
    noise: Tensor = plan.noise(model.latent_spec, prompts, args.seed)
    states = sample_states(
        asked, prompts[0].condition, noise, grid, args.student_steps, monitor
    )
    return teacher, states, plan.frames, {"prompt": args.prompt, "seed": args.seed}

"""`accvideo profile`: where the time of sampling one clip goes."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from . import argument_groups as groups
from .arguments import guidance_of, plan_of, prompts_of, sampling_of, speed_of, teacher_of
from .terminal import Terminal

if TYPE_CHECKING:
    from .arguments import Sampling
    from .conditioning import Prompt
    from .models.loading import Teacher
    from .profiling import Profile
    from .sampling import HasVelocity
    from .speed import Speed


def add_arguments(parser: ArgumentParser) -> None:
    """Give `accvideo profile` its arguments."""
    parser.add_argument("out", type=Path, help="folder for table, JSON, chart and MP4")
    groups.teacher(parser)
    groups.prompts(parser)
    groups.size(parser)
    groups.sampling(parser)
    groups.speed(parser)
    groups.vae_speed(parser)
    parser.add_argument("--seed", type=int, default=1, help="seed of the noise (1)")
    parser.add_argument("--fps", type=float, default=8, help="frames per second (8)")


def profile(args: Namespace) -> None:
    """Sample the first prompt's clip with a clock in hand."""
    from .export import load_student
    from .profiling import Job
    from .profiling import profile as work
    from .sampling_room import room_to_encode

    speed = speed_of(args)
    teacher = teacher_of(args)
    student = None if args.student is None else load_student(args.student, teacher.model)
    plan = plan_of(args, teacher, student)
    with room_to_encode(teacher):
        how = sampling_of(args, teacher, student, plan)

    def encode(own: Teacher) -> Prompt:
        with room_to_encode(own):
            if how.negative is not None:
                guidance_of(args, own)
            return prompts_of(args, own, plan)[0]

    job = Job(
        model=how.network,
        times=how.times,
        encode=encode,
        plan=plan,
        guidance=how.guidance,
        solver=how.solver,
        seed=args.seed,
        fps=args.fps,
    )
    with Terminal(sys.stderr) as terminal, teacher.decoding(args.vae_speed):
        faster = _faster(how, speed, teacher)
        found = work(teacher, job, faster, args.out / "clip.mp4", terminal)
    _publish(found, args.out)
    print(found.table())
    print(f"table, JSON, chart and clip are in {args.out}")


@contextmanager
def _faster(how: Sampling, speed: Speed, teacher: Teacher) -> Iterator[HasVelocity]:
    """What is asked, as fast as `speed` says."""
    from .speed import sped_up

    device = teacher.compute_device
    with sped_up(how.network, speed, device) as network:
        yield how.asked(network, speed.cfg_batch)


def _publish(found: Profile, folder: Path) -> None:
    from .evaluate.profile_chart import profile_chart
    from .files import replacing, write_bytes, write_json

    write_bytes(folder / "profile.txt", f"{found.table()}\n".encode())
    write_json(folder / "profile.json", found.as_dict())
    with replacing(folder / "profile.png") as temp:
        profile_chart(found).save(temp, format="PNG")

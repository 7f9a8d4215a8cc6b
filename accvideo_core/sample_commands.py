"""`accvideo sample`: videos of a student or a teacher, in one process or in those of torchrun.

Processes divide the clips among them. With --sequence-parallel N, groups of N processes divide the
clips, and the processes of a group the tokens of each clip; the first of a group writes it.
"""

from __future__ import annotations

import io
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, repeat
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Sampling, late_prompts_of, plan_of, sampling_of, speed_of, teacher_of
from .errors import AccVideoError
from .monitor import Cancelled, Held, Progress
from .terminal import Terminal

if TYPE_CHECKING:
    from torch import Tensor

    from .conditioning import AnyPrompt, Prompt
    from .models.loading import Teacher
    from .ranks import Ranks
    from .sampling import SamplePlan
    from .sampling_room import Room
    from .speed import Speed

    _Clip = tuple[Prompt, int, Tensor]
    """A prompt, the number of its sample, and latents [C, T, H, W]."""


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Clips that are sampled at once: one sample number of a few prompts."""

    number: int
    prompts: Sequence[Prompt]


@dataclass(frozen=True, slots=True, eq=False)
class _Names:
    """The files of clips, as `--names` wants them or as they are otherwise."""

    folder: Path
    given: Mapping[str, str] | None = None
    """Prompt -> name; prompts without one are left out."""

    def path(self, prompt: AnyPrompt, number: int) -> Path:
        from .evaluate.publish import file_name

        if self.given is not None:
            return self.folder / f"{self.given[prompt.text]}-{number}.mp4"
        return self.folder / f"{file_name(prompt.text)[:80]}_{prompt.id[:6]}_{number}.mp4"

    def left(self, prompt: AnyPrompt, number: int) -> bool:
        """Whether the clip is still to be made."""
        if self.given is None:
            return True
        return prompt.text in self.given and not self.path(prompt, number).exists()


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """What this process samples, and how."""

    teacher: Teacher
    plan: SamplePlan
    how: Sampling
    batches: Sequence[_Batch]
    names: _Names


def sample(args: Namespace) -> None:
    """Sample MP4s."""
    from .ranks import joined

    speed = speed_of(args)
    with joined(args.sequence_parallel, args.device) as ranks:
        # What every process would say, the first one says.
        with nullcontext() if ranks.first else redirect_stderr(io.StringIO()):
            work = _prepared(args, ranks)
        # In memory before it is counted what there is left.
        vae = nullcontext() if args.tiny_vae else work.teacher.decoding(args.vae_speed)
        with Terminal(sys.stderr if ranks.first else io.StringIO()) as terminal, vae:
            _sample(args, work, speed, ranks, terminal)


def _prepared(args: Namespace, ranks: Ranks) -> _Work:
    from .export import load_student
    from .sampling_room import room_to_encode

    names = _names(args)
    teacher = teacher_of(args)
    student = None if args.student is None else load_student(args.student, teacher.model)
    plan = plan_of(args, teacher, student)
    with room_to_encode(teacher):
        how = sampling_of(args, teacher, student, plan)
        prompts = late_prompts_of(args, teacher, plan)
        batches = _batches(prompts, args.samples, args.batch, ranks, names)
    return _Work(teacher, plan, how, batches, names)


def _names(args: Namespace) -> _Names:
    from .evaluate.vbench_scores import video_names

    if args.names is None:
        return _Names(args.out)
    if args.prompts is None or args.prompt or args.world:
        raise AccVideoError(f"--names {args.names} has names for --prompts; give that file alone")
    return _Names(args.out, video_names(args.prompts, args.names))


def _batches(
    prompts: Sequence[AnyPrompt], samples: int, size: int, ranks: Ranks, names: _Names
) -> list[_Batch]:
    """The clips of this process's group, at most `size` at once, with their prompts encoded."""
    from .conditioning import encoded

    if size < 1:
        raise AccVideoError(f"--batch {size} is no number of clips; it must be at least 1")

    clips = [(number, prompt) for number in range(samples) for prompt in prompts]
    mine = [clip for clip in clips[ranks.group :: ranks.groups] if names.left(clip[1], clip[0])]
    distinct = {prompt.id: prompt for _, prompt in mine}
    ready = {prompt.id: prompt for prompt in encoded(distinct.values())}
    batches = []
    for number, same in groupby(mine, itemgetter(0)):
        chosen = [ready[prompt.id] for _, prompt in same]
        parts = (chosen[i : i + size] for i in range(0, len(chosen), size))
        batches += [_Batch(number, part) for part in parts]
    return batches


def _sample(
    args: Namespace, work: _Work, speed: Speed, ranks: Ranks, terminal: Terminal
) -> None:
    """Sample all clips; the first process of each group writes those of the group."""
    from .conditioning import Condition
    from .models.context_parallel import divided
    from .models.placement import MAIN_MEMORY, move
    from .pipelining import Finishing
    from .sampling import sample as sampled
    from .speed import check_speed, sped_up

    if not work.batches:  # more processes than clips
        return
    how, plan, spec = work.how, work.plan, work.teacher.model.latent_spec
    check_speed(speed, how.network)
    monitor = _Overall(terminal, ranks, len(work.batches))
    network = divided(how.network, spec.shape(plan.frames, plan.height, plan.width), ranks)
    finish = _Finish(args, work, _room(work, speed, ranks))
    finishing = partial(Finishing, finish, terminal.say if ranks.first else _say, finish.device)
    later: list[_Clip] = []
    with sped_up(network, speed, finish.device) as fast, finishing() as beside:
        asked = how.asked(fast, speed.cfg_batch)
        for batch in work.batches:
            condition = Condition.cat([prompt.condition for prompt in batch.prompts])
            latents = sampled(
                asked,
                condition.with_guidance(how.guidance),
                plan.noise(spec, batch.prompts, args.seed, batch.number),
                how.times,
                monitor,
                solver=how.solver,
                seed=args.seed,
            )
            monitor.done += 1
            if not ranks.first_of_group:
                continue
            for clip in zip(batch.prompts, repeat(batch.number), spec.crop(latents, plan.frames)):
                (beside.put if finish.beside else later.append)(clip)
    if later:
        move([network.module], MAIN_MEMORY)
        with finishing() as alone:
            for clip in later:
                alone.put(clip)


def _room(work: _Work, speed: Speed, ranks: Ranks) -> Room:
    """What the first batch, none of which is smaller, leaves of the memory."""
    from .conditioning import Condition
    from .sampling_room import Need, Room

    if ranks.sequence > 1:  # each process holds a part of what is counted
        return Room(None, None)
    how, batch = work.how, work.batches[0]
    condition = Condition.cat([prompt.condition for prompt in batch.prompts])
    condition = condition.with_guidance(how.guidance)
    asked, device = how.asked(how.network, speed.cfg_batch), work.teacher.compute_device
    return Need(asked, condition, work.plan, len(batch.prompts), speed, device).room()


class _Finish:
    """Decodes a clip's latents and writes it; gives the path, as a line for people."""

    def __init__(self, args: Namespace, work: _Work, room: Room) -> None:
        self.args, self.work, self.room = args, work, room
        self.device = work.teacher.compute_device
        self.upscale = args.upscale or max(1, 128 // work.plan.height)
        teacher = work.teacher
        self.tiny = None if args.tiny_vae is None else teacher.tiny_vae(args.tiny_vae)
        self.beside = self.tiny is not None or room.decodes_beside(teacher.vae, work.plan)

    def __call__(self, clip: _Clip) -> str:
        from .video import write_video

        prompt, number, latents = clip
        frames = self._decoded(latents[None])[0]
        path = self.work.names.path(prompt, number)
        return str(write_video(path, frames, self.args.fps, self.upscale))

    def _decoded(self, latents: Tensor) -> Tensor:
        """[1, C, T, H, W] -> [1, T, H, W, 3]."""
        if self.tiny is not None:
            return self.tiny.decode(latents)
        free = self.room.beside if self.beside else self.room.after
        return self.work.teacher.vae.decode_bytes(latents, free)


class _Overall:
    """The monitor of one batch after the other, as of one piece of work.

    The processes of a group stop together: each waits for the others at its next step.
    """

    def __init__(self, terminal: Terminal, ranks: Ranks, batches: int) -> None:
        self.terminal, self.batches = terminal, batches
        self.done = 0
        self.any_of_group = ranks.together()

    def __call__(self, progress: Progress) -> None:
        step, total = self.done * progress.total + progress.step, self.batches * progress.total
        held = Held(self.terminal)
        held(replace(progress, step=step, total=total))
        if self.any_of_group(held.stop is not None):
            raise held.stop or Cancelled


def _say(text: str) -> None:
    print(text, file=sys.stderr)

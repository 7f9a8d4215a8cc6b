"""What several commands make of their arguments: teacher, prompts, guidance, size."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from .errors import AccVideoError
from .monitor import silent
from .terminal import Terminal

if TYPE_CHECKING:
    from torch import Tensor

    from .conditioning import AnyPrompt, Micro, Prompt
    from .distill.recipes import Recipe
    from .distill.student import Student
    from .flow import Times
    from .guidance import Cfg, Guided
    from .models.loading import Teacher
    from .models.source import TeacherSource
    from .models.video_model import VideoModel
    from .sampling import SamplePlan
    from .speed import Speed
    from .trajectories.prompts import PromptEntry
    from .trajectories.store import TrajectoryDataset


def teacher_of(args: Namespace, dtype_name: str | None = None) -> Teacher:
    """The teacher asked for, in `dtype_name` where that is not for the user to choose."""
    source = source_of(args)
    teacher = (source if dtype_name is None else replace(source, dtype=dtype_name)).load()
    micro = micro_of(getattr(args, "micro", None))
    return replace(teacher, text_cache=getattr(args, "text_cache", None), micro=micro)


def micro_of(text: str | None) -> Micro:
    """The numbers of --micro, such as "7,127,0.02"; of None the official ones."""
    from .conditioning import Micro

    try:
        numbers = [float(number) for number in text.split(",")] if text else []
    except ValueError:
        numbers = [0.0] * 4
    if len(numbers) > 3:
        raise AccVideoError(
            f"--micro {text} is not up to three numbers with commas between; write frames per "
            "second, motion bucket and noise, such as 7,127,0.02"
        )
    return Micro(*numbers)


def source_of(args: Namespace) -> TeacherSource:
    """Where the teacher asked for lies and how it is loaded, without loading it."""
    from .models.source import LoraFile, TeacherSource

    given = (("both", args.lora), ("high", args.lora_high), ("low", args.lora_low))
    return TeacherSource(
        path=args.teacher,
        low_noise=args.low_noise,
        variant=args.variant,
        vae=args.vae,
        loras=tuple(LoraFile(*_lora(text), experts) for experts, texts in given for text in texts),
        lora_mode=args.lora_mode,
        device=args.device,
        dtype=getattr(args, "dtype", None),
        weights=args.weights,
        threads=args.threads,
        # What does not fit the device goes there block by block, and only while it computes.
        in_main_memory=getattr(args, "swap_blocks", 0) > 0,
    )


def _lora(text: str) -> tuple[Path, float]:
    """FILE or FILE=STRENGTH; a file's own name may have a = in it."""
    name, _, strength = text.rpartition("=")
    try:
        return (Path(name), float(strength)) if name else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def prompts_of(args: Namespace, teacher: Teacher, plan: SamplePlan | None = None) -> list[Prompt]:
    """The encoded prompts asked for; what was left out of them, or is cut, is said on stderr.

    `plan` has the videos' size, for prompts with images; None is the one that `args` ask for.
    """
    return cast("list[Prompt]", _encoded(args, teacher, plan, later=False))


def late_prompts_of(args: Namespace, teacher: Teacher, plan: SamplePlan) -> list[AnyPrompt]:
    """As `prompts_of`, but encoded when they are needed, for any number of them."""
    return _encoded(args, teacher, plan, later=True)


def _encoded(
    args: Namespace, teacher: Teacher, plan: SamplePlan | None, later: bool
) -> list[AnyPrompt]:
    from .trajectories.prompts import encode_entries, too_long_notes

    entries, notes = _entries_of(args, teacher.model.family.reads_text)
    limit = teacher.model.family.text_tokens
    if limit is not None:
        notes += too_long_notes([entry.text for entry in entries], limit, teacher.tokenizer)
    size = None
    if any(entry.image is not None for entry in entries):
        plan = plan or plan_of(args, teacher)
        size = plan.frames, plan.height, plan.width
    guidance = getattr(args, "guidance", None)
    # What is encoded at once calls no monitor, which would be how a Terminal stops it.
    with Terminal(sys.stderr) if later else nullcontext(silent) as monitor:
        encoded = encode_entries(teacher, entries, size, guidance, later, monitor)
    for note in (*notes, *encoded.notes):
        print(f"accvideo {args.command}: {note}", file=sys.stderr)
    return list(encoded.prompts)


def _entries_of(args: Namespace, captioned: bool) -> tuple[list[PromptEntry], list[str]]:
    """The prompts of --prompt, --prompts and --world, and notes on those left out.

    Images need captions where `captioned`.
    """
    from .evaluate import world
    from .latents import key_generator
    from .trajectories.prompts import read_prompts

    entries, notes = _plain(args.prompt), []
    if args.prompts is not None:
        read = read_prompts(args.prompts, args.column, captioned=captioned)
        entries, notes = [*entries, *read.entries], list(read.notes)
    elif args.column is not None:
        raise AccVideoError(f"--column {args.column} is a column of --prompts; give that file")
    if args.world > len(world.all_prompts()):
        raise AccVideoError(
            f"--world {args.world} is more than the {len(world.all_prompts())} prompts that the "
            "embedded teacher knows; use --samples for more clips of each"
        )
    if args.world > 0:
        drawn = world.sample_prompts(args.world, key_generator(0, args.command, "prompts"))
        entries += _plain(drawn)
    if not entries:
        raise AccVideoError(
            "no prompts were given; use --prompt TEXT, --prompts FILE, or --world N for the "
            "embedded teacher"
        )
    return entries, notes


def _plain(texts: Sequence[str]) -> list[PromptEntry]:
    from .trajectories.prompts import PromptEntry

    return [PromptEntry(text, None, 0) for text in dict.fromkeys(texts)]


def plan_of(args: Namespace, teacher: Teacher, student: Student | None = None) -> SamplePlan:
    """The size asked for; what is not given is the student's, or the embedded teacher's."""
    from .embedded import embedded_at
    from .sampling import SamplePlan

    sizes: dict[str, int] = {}
    if student is not None:
        info = student.info
        sizes = {"frames": info.frames, "height": info.height, "width": info.width}
    elif known := embedded_at(teacher.folder):
        sizes = {"frames": known.frames, "height": known.size, "width": known.size}
    asked = {name: getattr(args, name) for name in ("frames", "height", "width")}
    sizes |= {name: value for name, value in asked.items() if value is not None}
    missing = [f"--{name}" for name in asked if name not in sizes]
    if missing:
        raise AccVideoError(f"the size of the clips is not known; give {' '.join(missing)}")
    return SamplePlan(**sizes)


def kept_states(text: str) -> tuple[int, ...] | int:
    numbers = [whole_number(part) for part in text.split(",")]
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def numbers_of(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise AccVideoError(
            f"{text!r} are not numbers with commas between them; write them like 1,0.9,0.5,0"
        ) from None


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise AccVideoError(
            f"{text!r} is not a whole number; write numbers like 10 or 0,25,50"
        ) from None


def decoder_of(args: Namespace, dataset: TrajectoryDataset) -> Callable[[Tensor], Tensor] | None:
    """How to decode a dataset's states: by its teacher's VAE, or None without that teacher.

    Raises:
        AccVideoError: a teacher was named, and it is not the dataset's.
    """
    teacher = teacher_of(args)
    if teacher.model.fingerprint == dataset.info.teacher:
        spec, frames = dataset.info.latent_spec, dataset.info.frames
        return lambda latents: teacher.vae.decode(spec.crop(latents, frames))
    if args.teacher is None:
        return None
    raise AccVideoError(
        f"dataset {dataset.folder.name!r} was recorded from teacher {dataset.info.teacher} and "
        f"not from {teacher.model.source} ({teacher.model.fingerprint}); name its own teacher"
    )


def guidance_of(args: Namespace, teacher: Teacher) -> tuple[Prompt | None, Cfg]:
    """The negative prompt and the scale that the teacher is asked with; Cfg(1) is none."""
    from .guidance import Cfg

    cfg = teacher.model.family.cfg_of(args.cfg)
    if cfg is None or cfg.none:
        return None, Cfg(1.0)
    if args.negative is None:
        return teacher.encode_negative(), cfg
    return teacher.encode_prompts([args.negative])[0], cfg


@dataclass(frozen=True, slots=True)
class Sampling:
    """How videos are sampled: a student's own way, a preset's, or the teacher's."""

    network: VideoModel
    times: Times
    guidance: float | None = None
    """Embedded guidance; None is what the prompts carry."""
    solver: str = "euler"
    negative: Prompt | None = None
    cfg: Cfg | None = None
    """Classifier-free guidance away from `negative`; None is none."""

    def asked(self, network: VideoModel, batched: str = "auto") -> VideoModel | Guided:
        """What is asked for velocities: `network`, which is this one's or a faster form of it."""
        from .guidance import guided

        return guided(network, self.negative, self.cfg, batched)


def sampling_of(
    args: Namespace, teacher: Teacher, student: Student | None, plan: SamplePlan
) -> Sampling:
    """What --student, --preset, --steps, --shift, --cfg and --negative ask for together."""
    from .distill.student import student_grid
    from .presets import preset

    family = teacher.model.family
    any_steps = student is not None and student.info.any_steps
    for name, value in (("--steps", args.steps), ("--preset", args.preset)):
        if student is not None and value is not None and not (any_steps and name == "--steps"):
            raise AccVideoError(
                f"{name} {value} cannot be chosen with --student, which has its own "
                f"{len(student.key_times) - 1} key times; leave {name} out"
            )
    if student is not None:
        info, size = student.info, (plan.height, plan.width)
        times = info.key_times
        if args.steps:
            times = student_grid(family, args.steps, args.shift, size)
        return Sampling(student.model, times, info.guidance, info.solver)
    if args.preset is not None:
        chosen = preset(args.preset)
        if family.name not in chosen.families:
            raise AccVideoError(
                f"preset {chosen.name!r} is for {' and '.join(chosen.families)}, but the teacher "
                f"is a {family.name}; choose another preset"
            )
        return Sampling(teacher.model, chosen.times, chosen.guidance, chosen.solver)
    negative, cfg = guidance_of(args, teacher)
    times = family.time_grid(args.steps, args.shift, (plan.height, plan.width))
    return Sampling(teacher.model, times, negative=negative, cfg=cfg)


def speed_of(args: Namespace) -> Speed:
    """How the network is to compute, by the options of `argument_groups.speed`."""
    from .speed import Speed

    given = {
        "attention": args.attention,
        "sparse": getattr(args, "sparse", None),
        "compile": args.compile,
        "cuda_graphs": args.cuda_graphs,
        "fp8": getattr(args, "fp8", False),
        "swap_blocks": args.swap_blocks,
        "cfg_batch": (getattr(args, "cfg_batch", None) or "auto").replace("-", " "),
    }
    return Speed(**{name: value for name, value in given.items() if value is not None})


def exact_speed_of(args: Namespace) -> Speed | None:
    """The same for what is recorded or measured; None, and every byte as always, where nothing is
    asked for.

    Raises:
        AccVideoError: it would change what the teacher answers.
    """
    from .speed import check_exact

    if not (args.attention or args.compile or args.cuda_graphs or args.swap_blocks):
        return None
    speed = speed_of(args)
    check_exact(speed)
    return speed


def recipe_of(args: Namespace) -> Recipe:
    """The recipe that a command names, with its changes."""
    from .distill.recipe_file import changed_recipe, find_recipe

    return changed_recipe(find_recipe(args.recipe), args.set)

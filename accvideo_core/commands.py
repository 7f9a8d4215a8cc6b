"""What each command of the terminal does; `cli.py` holds their arguments."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import AccVideoError
from .terminal import Terminal

if TYPE_CHECKING:
    from .conditioning import Prompt
    from .distill.recipes import Recipe
    from .distill.student import Student
    from .models.loading import Teacher
    from .sampling import SamplePlan
    from .trajectories.store import TrajectoryDataset

STUDENT_FILE = "student.safetensors"


def record(args: Namespace) -> None:
    """Record trajectories."""
    from .trajectories.record import RecordSpec
    from .trajectories.record import record as work

    teacher = _teacher(args)
    plan = _plan(args, teacher)
    spec = RecordSpec(
        frames=plan.frames,
        height=plan.height,
        width=plan.width,
        samples_per_prompt=args.samples,
        seed=args.seed,
        steps=args.steps,
        kept=_kept(args.keep),
        batch_size=args.batch,
        dtype=args.store,
        guidance=args.guidance,
    )
    prompts = _prompts(args, teacher)
    with Terminal(sys.stderr) as terminal:
        dataset = work(teacher.model, prompts, spec, args.dataset, terminal)
    print(f"{len(dataset)} trajectories are in {args.dataset}")


def distill(args: Namespace) -> None:
    """Train a student, from the teacher or from a student."""
    from .distill.recipes import preset
    from .export import load_student

    recipe = changed_recipe(preset(args.recipe), args.set)
    teacher, dataset = _teacher(args), _dataset(args)
    start = None if args.student is None else load_student(args.student, teacher.model)
    _train(args, teacher, dataset, recipe, start)


def tune(args: Namespace) -> None:
    """Train a student further, on its own key times."""
    from .distill.recipes import preset
    from .export import load_student

    recipe = changed_recipe(preset(args.recipe), args.set)
    teacher, dataset = _teacher(args), _dataset(args)
    start = load_student(args.student, teacher.model)
    times = start.key_times
    recipe = replace(recipe, student_steps=len(times) - 1, key_times=times)
    _train(args, teacher, dataset, recipe, start)


def sample(args: Namespace) -> None:
    """Sample MP4s."""
    from .conditioning import Condition
    from .evaluate.publish import file_name
    from .export import load_student
    from .sampling import sample as work
    from .video import write_video

    teacher = _teacher(args)
    student = None if args.student is None else load_student(args.student, teacher.model)
    if student is not None and args.steps is not None:
        raise AccVideoError(
            f"--steps {args.steps} cannot be chosen with --student, which has its own "
            f"{len(student.key_times) - 1} key times; leave --steps out"
        )
    plan = _plan(args, teacher, student)
    times = student.key_times if student else teacher.model.family.time_grid(args.steps)
    prompts = _prompts(args, teacher)
    condition = Condition.cat([prompt.condition for prompt in prompts])
    condition = condition.with_guidance(student.info.guidance if student else None)
    upscale = args.upscale or max(1, 128 // plan.height)
    with Terminal(sys.stderr) as terminal:
        for number in range(args.samples):
            noise = plan.noise(teacher.model.latent_spec, prompts, args.seed, number)
            model = student or teacher.model
            latents = work(model, condition, noise, times, terminal, batch_size=args.batch)
            for prompt, latent in zip(prompts, latents, strict=True):
                name = f"{file_name(prompt.text)[:80]}_{prompt.id[:6]}_{number}.mp4"
                frames = teacher.vae.decode(latent[None])[0]
                terminal.say(str(write_video(args.out / name, frames, args.fps, upscale)))


def export(args: Namespace) -> None:
    """Write a run's last checkpoint, or a student file, for ComfyUI or diffusers."""
    from .distill.run import student_of_run
    from .export import export_student, load_student

    # Merging is in float32 whatever the weights are loaded in, and bfloat16 takes half the memory.
    wide = args.store in ("fp16", "fp32")
    teacher = _teacher(args, "float32" if wide else "bfloat16")
    is_run = args.source.is_dir() and not (args.source / "transformer").is_dir()
    student = (student_of_run if is_run else load_student)(args.source, teacher.model)
    result = export_student(
        student,
        args.out,
        layout=args.layout,
        what=args.what or ("full" if student.info.lora is None else "lora"),
        dtype=args.store,
        rank=args.rank,
        pipeline=teacher.folder if (teacher.folder / "model_index.json").is_file() else None,
    )
    print(f"student after {student.info.steps_trained} updates is in {args.out.parent}:")
    print(result.summary())


def inspect(args: Namespace) -> None:
    """Say what something is."""
    from .inspection import describe

    print(describe(args.path, args.verify))


def compare(args: Namespace) -> None:
    """Measure students against the teacher."""
    from .evaluate.compare import Contender
    from .evaluate.compare import compare as work
    from .evaluate.publish import publish
    from .export import load_student

    teacher = _teacher(args)
    students = []
    for text in args.student:
        name, _, file = text.rpartition("=")
        student = load_student(Path(file), teacher.model)
        students.append(Contender(name or Path(file).stem, student, student.key_times))
    steps = {one.steps for one in students} | {_number(x) for x in args.steps.split(",") if x}
    contenders = [*_teachers(teacher, steps), *students]
    with Terminal(sys.stderr) as terminal:
        report = work(
            teacher,
            contenders,
            prompts=_prompts(args, teacher),
            seed=args.seed,
            batch_size=args.batch,
            monitor=terminal,
            real_clips=args.real,
            samples_per_prompt=args.samples,
            plan=None if args.frames is None else _plan(args, teacher),
        )
    curves = {run.name: run / "metrics.jsonl" for run in args.curves}
    publish(report, args.out, curves=curves, fps=args.fps)
    print(report.table())
    print(f"report, pictures and clips are in {args.out}")


def demo(args: Namespace) -> None:
    """The whole line on the embedded teacher, through the other commands."""
    from .cli import main

    out: Path = args.out
    traj, adv = out / "runs" / "trajectory", out / "runs" / "adversarial"
    updates = [f"train_steps={args.updates}"]
    given = {"device": args.device, "dtype": args.dtype, "threads": args.threads}
    machine = [f"--{name}={value}" for name, value in given.items() if value is not None]
    students = (f"student={traj / STUDENT_FILE}", f"student+adv={adv / STUDENT_FILE}")
    lines = (
        ["record", out / "dataset", "--world", args.trajectories, "--keep", 2, "--batch", 16],
        ["distill", out / "dataset", traj, "--recipe", "tiny-trajectory-2", "--set", *updates],
        ["tune", out / "dataset", adv, "--student", traj / STUDENT_FILE, "--set", *updates],
        ["compare", out, "--world", args.clips, "--samples", 1]
        + [part for text in students for part in ("--student", text)]
        + [part for run in (traj, adv) for part in ("--curves", run)],
    )
    for line in lines:
        words = [str(word) for word in line] + machine
        print(f"$ accvideo {' '.join(words)}")
        code = main(words)
        if code:
            raise SystemExit(code)


def _train(
    args: Namespace,
    teacher: Teacher,
    dataset: TrajectoryDataset,
    recipe: Recipe,
    start: Student | None,
) -> None:
    from .distill.trainer import distill as work
    from .export import save_student

    with Terminal(sys.stderr) as terminal:
        result = work(teacher.model, dataset, recipe, args.run, start=start, monitor=terminal)
    path = save_student(result.student, args.out or args.run / STUDENT_FILE)
    last = result.losses[-50:]
    print(f"student after {len(result.losses)} updates is in {path}", end="")
    print(f" (loss {sum(last) / len(last):.4g})" if last else "")


def _teacher(args: Namespace, dtype_name: str | None = None) -> Teacher:
    """The teacher asked for, in `dtype_name` where that is not for the user to choose."""
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from .models.loading import load_teacher
    from .models.tiny import embedded_teacher_path

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # the terminal has one progress line, ours
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    default = "bfloat16" if device.startswith("cuda") else "float32"
    name = dtype_name or args.dtype or default
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise AccVideoError(f"--dtype {name} is unknown; use float32, bfloat16 or float16")
    teacher = load_teacher(args.teacher or embedded_teacher_path(), device=device, dtype=dtype)
    return _with_loras(teacher, args)


def _with_loras(teacher: Teacher, args: Namespace) -> Teacher:
    """The teacher with the LoRAs of --lora, --lora-high and --lora-low on it."""
    from .models.lora import apply_loras

    model = teacher.model
    for experts, given in (("both", args.lora), ("high", args.lora_high), ("low", args.lora_low)):
        if given:
            model = apply_loras(model, [_lora(text) for text in given], args.lora_mode, experts)
    return replace(teacher, model=model)


def _lora(text: str) -> tuple[Path, float]:
    """FILE or FILE=STRENGTH; a file's own name may have a = in it."""
    name, _, strength = text.rpartition("=")
    try:
        return (Path(name), float(strength)) if name else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def _teachers(teacher: Teacher, steps: set[int]) -> list[Any]:
    """The teacher at each of these numbers of steps, most first."""
    from .evaluate.compare import Contender

    family = teacher.model.family
    return [
        Contender(f"teacher@{count}", teacher.model, family.time_grid(count))
        for count in sorted(steps - {family.steps}, reverse=True)
    ]


def _dataset(args: Namespace) -> TrajectoryDataset:
    from .trajectories.store import TrajectoryDataset

    return TrajectoryDataset.open(args.dataset)


def changed_recipe(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """`recipe` with "lr=1e-4" or "lora.rank=16" or "lora=null" changed.

    Raises:
        AccVideoError: no such field, or a value that does not fit it.
    """
    from .distill.recipes import Recipe

    data: dict[str, Any] = recipe.as_dict()
    for text in changes:
        name, equals, value = text.partition("=")
        if not equals:
            raise AccVideoError(f"{text!r} has no value; write it like lr=1e-4")
        outer, _, inner = name.partition(".")
        target, key = (data.get(outer), inner) if inner else (data, name)
        if not isinstance(target, dict):
            raise AccVideoError(f"recipe has no field {name!r}; write it like lora.rank=16")
        target[key] = _value(value)
    try:
        return Recipe.from_dict(data)
    except TypeError as error:
        raise AccVideoError(f"{' '.join(changes)} does not fit the recipe ({error})") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _prompts(args: Namespace, teacher: Teacher) -> list[Prompt]:
    from .evaluate import world
    from .latents import key_generator

    texts = list(args.prompt)
    if args.prompts is not None:
        if not args.prompts.is_file():
            raise AccVideoError(f"there is no prompts file {args.prompts}; check the path")
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
        texts += [line.strip() for line in lines if line.strip()]
    if args.world > len(world.all_prompts()):
        raise AccVideoError(
            f"--world {args.world} is more than the {len(world.all_prompts())} prompts that the "
            "embedded teacher knows; use --samples for more clips of each"
        )
    if args.world > 0:
        texts += world.sample_prompts(args.world, key_generator(0, args.command, "prompts"))
    if not texts:
        raise AccVideoError(
            "no prompts were given; use --prompt TEXT, --prompts FILE, or --world N for the "
            "embedded teacher"
        )
    return teacher.encode_prompts(list(dict.fromkeys(texts)), getattr(args, "guidance", None))


def _plan(args: Namespace, teacher: Teacher, student: Student | None = None) -> SamplePlan:
    """The size asked for; what is not given is the student's, or the embedded teacher's."""
    from .evaluate import world
    from .models.tiny import embedded_teacher_path
    from .sampling import SamplePlan

    sizes: dict[str, int] = {}
    if student is not None:
        info = student.info
        sizes = {"frames": info.frames, "height": info.height, "width": info.width}
    elif teacher.folder.resolve() == embedded_teacher_path().resolve():
        sizes = {"frames": world.FRAMES, "height": world.SIZE, "width": world.SIZE}
    asked = {name: getattr(args, name) for name in ("frames", "height", "width")}
    sizes |= {name: value for name, value in asked.items() if value is not None}
    missing = [f"--{name}" for name in asked if name not in sizes]
    if missing:
        raise AccVideoError(f"the size of the clips is not known; give {' '.join(missing)}")
    return SamplePlan(**sizes)


def _kept(text: str) -> tuple[int, ...] | int:
    numbers = [_number(part) for part in text.split(",")]
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise AccVideoError(
            f"{text!r} is not a whole number; write numbers like 10 or 0,25,50"
        ) from None

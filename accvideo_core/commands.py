"""What each command of the terminal does; `cli.py` holds their arguments."""

from __future__ import annotations

import io
import sys
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    exact_speed_of,
    guidance_of,
    kept_states,
    late_prompts_of,
    numbers_of,
    plan_of,
    prompts_of,
    recipe_of,
    source_of,
    teacher_of,
    whole_number,
)
from .errors import AccVideoError
from .monitor import together
from .run_commands import about_runs, draw_runs
from .terminal import Terminal

if TYPE_CHECKING:
    from .conditioning import AnyPrompt, Prompt
    from .distill.recipes import Recipe
    from .distill.student import Student
    from .guidance import Guided
    from .models.loading import Teacher
    from .models.video_model import Family, VideoModel
    from .ranks import Ranks
    from .tensorboard import TensorBoard
    from .trajectories.record import Batch, RecordSpec
    from .trajectories.store import TrajectoryDataset

STUDENT_FILE = "student.safetensors"


def record(args: Namespace) -> None:
    """Record trajectories, here or with workers on a cluster."""
    from .speed import sped_up
    from .trajectories.record import prepare
    from .trajectories.record import record as work

    for name in ("workers", "lease"):
        if args.cluster is None and getattr(args, name) is not None:
            raise AccVideoError(f"--{name} {getattr(args, name)} needs --cluster; give both")
    if args.cluster is not None:
        _record_on_cluster(args)
        return
    speed = exact_speed_of(args)
    teacher, prompts, spec, negative = _recording(args)
    with Terminal(sys.stderr) as terminal:
        if args.swap_blocks:  # while the text encoders have the device to themselves
            prepare(teacher.model, prompts, spec, args.dataset, negative, terminal)
        with sped_up(teacher.model, speed, teacher.compute_device) as model:
            dataset = work(model, prompts, spec, args.dataset, terminal, negative)
    print(f"{len(dataset)} trajectories are in {args.dataset}")


def _record_on_cluster(args: Namespace) -> None:
    from .trajectories.cluster import Cluster, connected, record_on_cluster
    from .trajectories.crew import Patience

    speed = exact_speed_of(args)
    patience = Patience() if args.lease is None else Patience(lease_seconds=args.lease)
    cluster = Cluster(args.cluster, args.workers, args.device, args.threads or 1, patience)
    source = source_of(args).absolute()
    device = source.device and source.device.partition(":")[0]  # Ray says which GPU it is
    source = replace(source, device=device, threads=cluster.threads, speed=speed)
    with connected(cluster):  # first, because encoding takes long
        dataset, batches = _prepared(args)
        with Terminal(sys.stderr) as terminal:
            report = record_on_cluster(source, dataset, batches, cluster, terminal)
    print(f"{len(dataset)} trajectories are in {args.dataset}")
    for number, worker in enumerate(report.workers):
        print(f"  worker {number} {worker}")


def _prepared(args: Namespace) -> tuple[TrajectoryDataset, list[Batch]]:
    """The dataset with its prompts, and what to record. The teacher is let go of again, because the
    workers of this machine need its place.
    """
    import gc

    import torch

    from .trajectories.record import plan, prepare

    teacher, prompts, spec, negative = _recording(args)
    with Terminal(sys.stderr) as terminal:
        dataset = prepare(teacher.model, prompts, spec, args.dataset, negative, terminal)
    batches = plan(dataset, prompts, spec.samples_per_prompt)
    del teacher, prompts
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return dataset, batches


def _recording(args: Namespace) -> tuple[Teacher, list[AnyPrompt], RecordSpec, Prompt | None]:
    """The teacher, prompts, settings and negative prompt that `record` is asked for."""
    from .trajectories.record import RecordSpec

    teacher = teacher_of(args)
    plan = plan_of(args, teacher)
    negative, cfg = guidance_of(args, teacher)
    spec = RecordSpec(
        frames=plan.frames,
        height=plan.height,
        width=plan.width,
        samples_per_prompt=args.samples,
        seed=args.seed,
        steps=args.steps,
        kept="all" if args.keep == "all" else kept_states(args.keep),
        batch_size=args.batch,
        dtype=args.store,
        guidance=args.guidance,
        cfg=cfg,
        shift=args.shift,
        times=None if args.times is None else numbers_of(args.times),
    )
    return teacher, late_prompts_of(args, teacher, plan), spec, negative


def distill(args: Namespace) -> None:
    """Train a student, from the teacher or from a student."""
    from .export import load_student
    from .ranks import joined

    recipe, listener = recipe_of(args), _listener(args)
    with joined(args.sequence_parallel, args.device) as ranks:
        teacher, dataset = teacher_of(args), _dataset(args)
        start = None if args.student is None else load_student(args.student, teacher.model)
        _train(args, teacher, dataset, recipe, start, ranks, listener)


def tune(args: Namespace) -> None:
    """Train a student further, on its own key times."""
    from .export import load_student
    from .ranks import joined

    recipe, listener = recipe_of(args), _listener(args)
    with joined(args.sequence_parallel, args.device) as ranks:
        teacher, dataset = teacher_of(args), _dataset(args)
        start = load_student(args.student, teacher.model)
        times = start.key_times
        recipe = replace(recipe, student_steps=len(times) - 1, key_times=times)
        _train(args, teacher, dataset, recipe, start, ranks, listener)


def export(args: Namespace) -> None:
    """Write a run's last checkpoint, or a student file, for ComfyUI or diffusers."""
    from .distill.run import student_of_run
    from .export import export_student, load_student
    from .models.pipeline_folder import NETWORKS

    # Merging is in float32 whatever the weights are loaded in, and bfloat16 takes half the memory.
    wide = args.store in ("fp16", "fp32")
    teacher = teacher_of(args, "float32" if wide else "bfloat16")
    is_run = args.source.is_dir() and not any((args.source / n).is_dir() for n in NETWORKS)
    student = (student_of_run if is_run else load_student)(args.source, teacher.model)
    result = export_student(
        student,
        args.out,
        layout=args.layout,
        what=args.what or ("full" if student.info.lora is None else "lora"),
        dtype=args.store,
        rank=args.rank,
        pipeline=teacher.folder if teacher.has_text_encoders else None,
    )
    print(f"student after {student.info.steps_trained} updates is in {args.out.parent}:")
    print(result.summary())


def compare(args: Namespace) -> None:
    """Measure students against the teacher, or draw training runs on one page."""
    if about_runs(args):
        draw_runs(args)
        return
    (out,) = args.paths
    from .evaluate.compare import Contender
    from .evaluate.compare import compare as work
    from .evaluate.publish import publish
    from .export import load_student
    from .guidance import Guided, guided

    speed = exact_speed_of(args)
    teacher = teacher_of(args)
    asked_for = {whole_number(x) for x in args.steps.split(",") if x}
    students: list[Contender] = []
    for text in args.student:
        name, _, file = text.rpartition("=")
        student = load_student(Path(file), teacher.model)
        students += _students(name or Path(file).stem, student, asked_for)
    steps = {one.steps for one in students} | asked_for
    negative, cfg = guidance_of(args, teacher)
    asked = guided(teacher.model, negative, cfg)
    contenders = [*_teachers(asked, teacher.model.family, steps), *students]
    with Terminal(sys.stderr) as terminal:
        report = work(
            teacher,
            contenders,
            prompts=prompts_of(args, teacher),
            seed=args.seed,
            batch_size=args.batch,
            monitor=terminal,
            real_clips=args.real,
            samples_per_prompt=args.samples,
            plan=None if args.frames is None else plan_of(args, teacher),
            asked=asked if isinstance(asked, Guided) else None,
            speed=speed,
        )
    curves = {run.name: run / "metrics.jsonl" for run in args.curves}
    publish(report, out, curves=curves, fps=args.fps)
    print(report.table())
    print(f"report, pictures and clips are in {out}")


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
    ranks: Ranks,
    listener: TensorBoard | None,
) -> None:
    from .distill.trainer import distill as work
    from .export import save_student
    from .run_commands import print_plan
    from .trajectories.store import TrajectoryDataset

    if args.plan is not None:
        print_plan(args.plan, teacher, dataset, recipe, start)
        return
    validation = None if args.validation is None else TrajectoryDataset.open(args.validation)
    # Without a VAE looks measure latents; with one it is loaded at the first look.
    decode = None if teacher.vae_path is None else lambda latents: teacher.vae.decode(latents)
    listener = listener if ranks.first else None
    # The others' terminals show nothing, but listen for Ctrl-C, which comes to every process.
    shown = sys.stderr if ranks.first else io.StringIO()
    with Terminal(shown) as terminal, listener or nullcontext():
        # The terminal comes last, because it is the one that stops the run.
        monitor = terminal if listener is None else together(listener, terminal)
        result = work(
            teacher.model,
            dataset,
            recipe,
            args.run,
            start=start,
            validation=validation,
            decode=decode,
            monitor=monitor,
            ranks=ranks,
            on_plan=lambda plan: terminal.say(plan.table()),
        )
    weights = result.student.state_dict(keep=ranks.first)
    if not ranks.first:
        return
    path = save_student(result.student, args.out or args.run / STUDENT_FILE, weights)
    last, best = result.losses[-50:], result.best_step
    of = "" if best is None else f", the best by {recipe.best_by} after {best} of them,"
    print(f"student after {len(result.losses)} updates{of} is in {path}", end="")
    print(f" (loss {sum(last) / len(last):.4g})" if last else "")


def _listener(args: Namespace) -> TensorBoard | None:
    """Asked for before anything is loaded, so that a missing package is noticed at once."""
    from .tensorboard import TensorBoard

    return TensorBoard(args.run / "tensorboard") if args.tensorboard else None


def _teachers(asked: VideoModel | Guided, family: Family, steps: set[int]) -> list[Any]:
    """The teacher at each of these numbers of steps, most first."""
    from .evaluate.compare import Contender

    return [
        Contender(f"teacher@{count}", asked, family.time_grid(count))
        for count in sorted(steps - {family.steps}, reverse=True)
    ]


def _students(name: str, student: Student, steps: set[int]) -> list[Any]:
    """A student at its own times; and in these numbers of steps, where it takes any."""
    from .distill.student import student_grid
    from .evaluate.compare import Contender

    own, family = Contender(name, student, student.key_times), student.teacher.family
    others = sorted(steps - {own.steps}, reverse=True) if student.info.any_steps else []
    times = {count: student_grid(family, count) for count in others}
    return [own, *(Contender(f"{name}@{count}", student, times[count]) for count in others)]


def _dataset(args: Namespace) -> TrajectoryDataset:
    from .trajectories.store import TrajectoryDataset

    return TrajectoryDataset.open(args.dataset)

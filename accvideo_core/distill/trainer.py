"""The training loop. It does not know which objective it runs, nor who watches it.

    run folder:  config.json, metrics.jsonl, checkpoints/<step>.safetensors, and watch.py's files

All randomness follows from (recipe.seed, step), so a run that was cancelled or killed goes on from
its last checkpoint with the same bits as if nothing had happened (on CPU).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AccVideoError
from ..models.video_model import VideoModel
from ..monitor import Cancelled, Held, Monitor, Progress, silent
from ..ranks import ALONE, Ranks
from ..solvers import solver_named
from ..trajectories.stats import Decode
from ..trajectories.store import TrajectoryDataset
from .adversarial import check_features
from .batch import KeyBatch, KeyStates
from .checkpoint import kept, load_checkpoint, save_checkpoint
from .memory import check_savings, savings
from .memory_check import log_plan, planner_of, settle_memory
from .memory_plan import MemoryPlan
from .methods import METHODS
from .metrics import METRICS_FILE, Means, append_metrics, read_metrics
from .objective import Objective, Terms
from .optimiser import Average, Role, lr_factor
from .recipes import Recipe
from .run import open_run
from .setting import Setting
from .sharding import check_ranks, spread
from .student import Student, StudentInfo
from .watch import Watch
from .watch_words import broken

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """A finished student, and the loss of every update from the run's first to its last."""

    student: Student
    metrics_file: Path
    losses: list[float]
    best_step: int | None = None
    """Updates after which the student is the best one, where the recipe says by which figure."""


def distill(
    teacher: VideoModel,
    dataset: TrajectoryDataset,
    recipe: Recipe,
    run_dir: Path,
    *,
    start: Student | None = None,
    validation: TrajectoryDataset | None = None,
    decode: Decode | None = None,
    monitor: Monitor = silent,
    ranks: Ranks = ALONE,
    on_plan: Callable[[MemoryPlan], None] = log_plan,
    free_memory: int | None = None,
) -> TrainResult:
    """Train a student on `dataset` as `recipe` says, or go on where a run in `run_dir` stopped.

    Args:
        teacher: frozen; it recorded the dataset.
        run_dir: made when missing. The same folder with the same settings resumes.
        start: trained further instead of a fresh student; it stays as it is, a clone is trained.
        validation: whose clips are looked at while training; the default is `dataset`.
        decode: makes frames of latents, so that these looks see pictures; see `Watch`.
        monitor: called after every update with the stage "distill", and in a look with "look". When
            it raises, a checkpoint is written and the exception goes on to the caller. Of several
            processes each has its own, and all stop after the same update when one of them raises.
        ranks: the processes that train together, all of which call this. `teacher` and a LoRA
            `start` are sharded among them in place.
        on_plan: is told the memory plan of a run of one process, before anything is made.
        free_memory: bytes that it may take beside the teacher's weights; None asks the device.

    Raises:
        AccVideoError: dataset, recipe, start and folder do not fit each other, there is too little
            memory by the plan, or the loss is NaN.
    """
    # ComfyUI runs nodes in inference mode, where nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad():
        _check_teacher(teacher, dataset, start)
        check_features(recipe, teacher)
        check_savings(recipe, teacher)
        states, info = _learning(teacher, dataset, recipe, start)
        check_ranks(ranks, recipe, info, teacher, states.shape)
        if ranks.size == 1:
            planner = planner_of(teacher, info, states, recipe, start is None)
            settle_memory(planner, recipe, teacher, free_memory, on_plan)
        watch = _watch(info, dataset, validation, recipe, run_dir, decode, ranks)
        student = Student.create(teacher, info, recipe.seed, own=ranks.size == 1)
        open_run(run_dir, recipe, info, dataset, states.ids, start, write=ranks.first)
        with savings(student, recipe) as frozen:
            run = _Run(student, frozen, states, recipe, run_dir, watch, ranks, start)
            run.resume()
            run.train(monitor)
        metrics_file = run_dir / METRICS_FILE
        losses = [row["loss"] for row in read_metrics(metrics_file)]
        student = run.finished()
        return TrainResult(student, metrics_file, losses, watch and watch.best_step)


def memory_plan(
    teacher: VideoModel,
    dataset: TrajectoryDataset,
    recipe: Recipe,
    *,
    start: Student | None = None,
    device: torch.device | None = None,
) -> MemoryPlan:
    """The memory that `distill` with the same arguments needs, here or on another `device`."""
    _check_teacher(teacher, dataset, start)
    states, info = _learning(teacher, dataset, recipe, start)
    return planner_of(teacher, info, states, recipe, start is None, device)(recipe)


class _Run:
    """What a run holds in memory. `step` counts the updates done."""

    def __init__(
        self,
        student: Student,
        teacher: VideoModel,
        states: KeyStates,
        recipe: Recipe,
        folder: Path,
        watch: Watch | None,
        ranks: Ranks,
        start: Student | None,
    ) -> None:
        self.student, self.states, self.recipe, self.folder = student, states, recipe, folder
        self.watch, self.ranks = watch, ranks
        self.step = 0
        self.device = teacher.device
        self.preview_batch = states.batch(1, recipe.seed, "preview", self.device)
        teacher = spread(student, teacher, ranks, start)
        if start is not None:
            student.load_state_dict(start.state_dict())
        self.roles = {"student": Role(student.trainable(), recipe.lr, recipe.betas, recipe)}
        self.average = None if recipe.ema is None else Average(self.roles["student"], recipe.ema)
        self.objective = self.build(teacher)
        if self.objective.heads is not None:
            heads, head_lr = dict(self.objective.heads.named_parameters()), recipe.head_lr
            self.roles["heads"] = Role(heads, head_lr or recipe.lr, recipe.head_betas, recipe)
            self.roles["student"].others = [*heads.values()]

    def build(self, teacher: VideoModel) -> Objective:
        """What the recipe's method minimises."""
        recipe, states = self.recipe, self.states

        def real(count: int) -> KeyBatch:
            return states.batch(count, recipe.seed, "calibration", self.device)

        key_times = self.student.key_times
        setting = Setting(recipe, teacher, key_times, real, states, self.average, self.ranks)
        return METHODS[recipe.method].build(setting)

    def resume(self) -> None:
        """Take over the last checkpoint, if there is one."""
        found = load_checkpoint(self.folder, self.roles["student"].parameters)
        if not self.ranks.agree(0 if found is None else found[0]):
            raise AccVideoError(
                f"processes found different checkpoints of run {self.folder.name!r}; put its "
                "folder on a disk that all machines share"
            )
        if found is None:
            return
        self.step, parts = found
        for name, role in self.roles.items():
            role.load_state_dict(parts[name])
        if self.average is not None:
            self.average.load(parts["average"])
        self.objective.load_state_dict(parts.get("objective", {}))
        _log.info("run %s goes on after update %d", self.folder.name, self.step)

    def train(self, monitor: Monitor) -> None:
        """Updates until `train_steps`; checkpoints on the way, at the end and on cancelling."""
        recipe = self.recipe
        enough = self.look(monitor)
        while self.step < recipe.train_steps and not enough:
            started = time.perf_counter()
            row = self.update()
            row["seconds"] = time.perf_counter() - started
            if self.ranks.first:
                append_metrics(self.folder / METRICS_FILE, row)
            enough = self.look(monitor)
            last = enough or self.step == recipe.train_steps
            if last or self.step % recipe.checkpoint_every == 0:
                self.save()
            # Of several processes one cannot ask the student by itself.
            preview = self.preview if self.ranks.size == 1 else None
            held = Held(monitor)
            held(Progress("distill", self.step, recipe.train_steps, row, preview))
            self.stop_together(held)

    def look(self, monitor: Monitor) -> bool:
        """Look at the student where it is time to, as it would be finished now; whether to stop."""
        if self.watch is None or not self.watch.turn(self.step):
            return False
        held = Held(monitor)
        listener = monitor if self.ranks.size == 1 else held
        try:
            with self.average.in_place() if self.average else nullcontext():
                enough = self.watch.look(self.step, self.student, self.roles.values(), listener)
        except (AccVideoError, KeyboardInterrupt):
            # A broken student, or averaged weights half in place, must not push checkpoints out.
            raise
        except BaseException:
            self.save()
            raise
        self.stop_together(held)
        return enough

    def stop_together(self, held: Held) -> None:
        """Save and raise if the monitor of any process has raised."""
        if self.ranks.any(held.stop is not None):
            self.save()
            raise held.stop or Cancelled

    def update(self) -> dict[str, float]:
        """One update: every phase's losses on the key intervals, then a step of whom it trained.

        Of phases that train the same role, the last one's figures are kept.
        """
        recipe, count = self.recipe, self.preview_batch.intervals
        falling = range(count - 1, -1, -1)  # Algorithm 1: from noise to data, and again
        ks = falling if recipe.iteration == "sweep" else [falling[self.step % count]]
        factor = lr_factor(recipe, self.step)
        row = {"step": self.step + 1, "lr": self.roles["student"].lr * factor, "loss": 0.0}
        if len(ks) == 1:
            row |= {"k": ks[0], "t": self.states.t[ks[0]]}
        for phase in self.objective.phases:
            figures, trained = self.accumulate(phase.terms, self.batch(phase.draw), ks)
            figures = self.ranks.mean(figures)
            for name, role in trained.items():
                self.ranks.reduce(role.parameters.values(), whole=name == "heads")
            figures |= {f"{name}_grad_norm": role.clip() for name, role in trained.items()}
            self.check_finite(figures, ks)
            for role in trained.values():
                role.step(factor)
            row |= {**figures, "loss": row["loss"] + figures.get("loss", 0.0)}
        if self.average is not None:
            self.average.update(self.step)
        self.step += 1
        return row

    def batch(self, draw: str) -> KeyBatch:
        """This process's part of the update's batch that phases which share `draw` read."""
        key = f"{self.step}/{draw}" if draw else self.step
        size, seed = self.recipe.batch_size, self.recipe.seed
        batch = self.states.batch(size, seed, key, self.device, self.ranks.rows(size))
        return replace(batch, step=self.step)

    def accumulate(
        self, terms: Terms, batch: KeyBatch, ks: Sequence[int]
    ) -> tuple[dict[str, float], dict[str, Role]]:
        """Backpropagate the mean of `terms` over `ks`; its figures, and who was trained."""
        parts = self.ranks.parts(self.recipe.batch_size, self.recipe.accumulate)
        means = Means(ks, parts)
        trained: dict[str, Role] = {}
        for k in ks:
            for part in batch.split(parts):
                for term in terms(self.student, part, k):
                    name = "heads" if term.trains_heads else "student"
                    trained[name] = self.roles[name]
                    trained[name].backward(term.loss * (term.weight / (parts * len(ks))))
                    means.add(term.measured(), k)
        return means.as_dict(), trained

    def check_finite(self, figures: Mapping[str, float], ks: Sequence[int]) -> None:
        """Stop before a broken gradient reaches the weights."""
        names = [name for name, value in figures.items() if not math.isfinite(value)]
        if not names:
            return
        name, remedy = broken(names, self.recipe)
        raise AccVideoError(
            f"{name} became {figures[name]} at update {self.step + 1} "
            f"(k = {', '.join(map(str, ks))}); {remedy} ({kept(self.folder)})"
        )

    def preview(self) -> Tensor:
        """Clean latents [2, C, T, H, W]: recorded ones, and the student's from their noise, or from
        fresh noise where none is recorded.
        """
        batch, info = self.preview_batch, self.student.info
        noise = batch.latents[-1] if batch.steps else batch.z
        velocity = partial(self.student.velocity, cond=batch.cond)
        with torch.inference_mode(False), torch.no_grad():
            *_, made = solver_named(info.solver)(velocity, noise, info.key_times, self.recipe.seed)
            return torch.cat([batch.latents[0], made])

    def save(self) -> None:
        """Write a checkpoint of the state between two updates."""
        parts = {name: role.state_dict() for name, role in self.roles.items()}
        if self.average is not None:
            parts["average"] = self.average.values
        parts["objective"] = self.objective.state_dict()
        save_checkpoint(self.folder, self.step, parts, self.recipe.keep_checkpoints, self.ranks)

    def finished(self) -> Student:
        """The best student, or the last, with the averaged weights if the recipe asks for them."""
        best = None if self.watch is None else self.watch.best_student(self.student)
        if best is not None:
            return best
        if self.average is not None:
            self.student.load_state_dict(self.average.values)
        info = self.student.info
        self.student.info = replace(info, steps_trained=info.steps_trained + self.step)
        return self.student


def _learning(
    teacher: VideoModel, dataset: TrajectoryDataset, recipe: Recipe, start: Student | None
) -> tuple[KeyStates, StudentInfo]:
    """The states that updates read, and what the student is about to learn from them.

    `steps_trained` counts what it has learnt before.
    """
    method, known = METHODS[recipe.method], dataset.info
    key_times = method.key_times(recipe, teacher, known)
    states = KeyStates(dataset, method.reads(key_times), recipe.trajectories)
    info = StudentInfo(
        family=teacher.family.name,
        base=teacher.fingerprint,
        key_times=key_times,
        guidance=known.guidance,
        lora=recipe.lora if start is None else start.info.lora,
        latent_spec=teacher.latent_spec,
        frames=known.frames,
        height=known.height,
        width=known.width,
        recipe=recipe.as_dict(),
        steps_trained=0 if start is None else start.info.steps_trained,
        solver=method.solver,
    )
    return states, info


def _watch(
    info: StudentInfo,
    dataset: TrajectoryDataset,
    validation: TrajectoryDataset | None,
    recipe: Recipe,
    folder: Path,
    decode: Decode | None,
    ranks: Ranks,
) -> Watch | None:
    if recipe.validate_every:
        looked_at = dataset if validation is None else validation
        return Watch(info, looked_at, recipe, folder, decode, ranks)
    if validation is not None:
        raise AccVideoError(
            f"dataset {validation.folder.name!r} was given to look at, but recipe.validate_every "
            "is 0; set it, such as to 100"
        )
    return None


def _check_teacher(teacher: VideoModel, dataset: TrajectoryDataset, start: Student | None) -> None:
    info = dataset.info
    if info.teacher != teacher.fingerprint:
        raise AccVideoError(
            f"dataset {dataset.folder.name!r} was recorded with another teacher "
            f"({info.teacher_source}, {info.teacher}) than this one ({teacher.source}, "
            f"{teacher.fingerprint}); load that teacher, or record with this one"
        )
    if start is not None and start.info.base != teacher.fingerprint:
        raise AccVideoError(
            f"the student to start from was trained on another teacher ({start.info.base}) than "
            f"this one ({teacher.source}, {teacher.fingerprint}); load its own teacher"
        )

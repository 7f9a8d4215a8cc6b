"""Watching quality while it trains: looks at fixed clips, student beside teacher.

    validation.jsonl         one line of figures per look, only ever appended to
    samples/<step>.mp4       the clips, teacher on the left, student on the right
    samples/<step>.png       the same as a contact sheet
    best.safetensors         the best student so far, where the recipe says by which figure

What a look finds changes no update. All that a resumed run has to know of earlier looks it takes
from these files.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AccVideoError
from ..evaluate.metrics import latent_mse
from ..export import save_student
from ..files import append_lines
from ..monitor import Monitor, Progress, silent
from ..ranks import ALONE, Ranks
from ..sampling import sample
from ..student_file import load_student, read_student_info
from ..trajectories.stats import Decode
from ..trajectories.store import TrajectoryDataset
from .checkpoint import kept
from .metrics import METRICS_FILE, read_metrics
from .optimiser import Role
from .recipes import Recipe
from .run import BEST_FILE
from .student import Student, StudentInfo
from .watch_clips import FixedClip, Seen, digest, fixed_clips, pairs_of, relative, see
from .watch_pictures import write_look
from .watch_window import window, window_figures
from .watch_words import told

LOOKS_FILE = "validation.jsonl"
SAMPLES = "samples"
_NO_PAIRS = (
    "diversity is not told, because no two of the clips looked at are samples of one prompt; look "
    "at a dataset recorded with two samples of a prompt to have it"
)
Row = dict[str, Any]
_log = logging.getLogger(__name__)


class Watch:
    """Looks at a run's student at intervals, and keeps the best one."""

    def __init__(
        self,
        info: StudentInfo,
        dataset: TrajectoryDataset,
        recipe: Recipe,
        folder: Path,
        decode: Decode | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            info: of the student before its first update.
            dataset: whose first trajectories are looked at.
            folder: of the run; nothing is written yet.
            decode: makes frames [1, F, H, W, 3] of model-space latents [1, C, T, H, W]. Without it
                figures are those of latents, and there are no pictures.
            ranks: all sample, the first looks and writes, and all read what it has written.

        Raises:
            AccVideoError: the dataset does not fit, or its clips cannot tell `recipe.best_by`.
        """
        self.info, self.recipe, self.folder, self.decode = info, recipe, folder, decode
        self.ranks = ranks
        self.frames = dataset.info.frames
        self.clips = fixed_clips(dataset, recipe.validation_clips, info)
        self.pairs = pairs_of(self.clips)
        self._check_best_by()
        self.digest = digest(self.clips, decode is not None)
        self._teachers: list[Seen] = []
        self._short = self._blind = False

    @property
    def picture(self) -> Path | None:
        """The last contact sheet."""
        return max((self.folder / SAMPLES).glob("*.png"), default=None)

    @property
    def best_step(self) -> int | None:
        """Updates after which the student was best."""
        best = self._best(self.rows())
        return None if best is None else best["step"]

    def turn(self, step: int) -> bool:
        """Whether `step` updates are a place to look: the start, the end, every so many between."""
        return step % self.recipe.validate_every == 0 or step >= self.recipe.train_steps

    def look(
        self, step: int, student: Student, roles: Iterable[Role] = (), monitor: Monitor = silent
    ) -> bool:
        """Look at the student after `step` updates, unless that was done; whether to stop training.

        Args:
            roles: whose optimiser state may wait in main memory when a look needs its place.
            monitor: called after every sampling step with the stage "look", at last with what
                there is to say and the contact sheet; it may raise.

        Raises:
            AccVideoError: the clips are not finite, or the disk is full.
        """
        rows, started = self.rows(), time.perf_counter()
        notes: list[str] = []
        if not self._blind and all(row["step"] != step for row in rows):
            seen = self._with_room(lambda: self._see(step, student, monitor), roles)
            if seen is None:
                notes.append(self._give_up(step))
            else:
                row: Row = {"step": step}
                if self.ranks.first:
                    row = self._row(step, *seen, rows)
                notes += row.get("notes", ())
                row["seconds"] = time.perf_counter() - started
                self._keep(row, student, seen[0], rows)
                self.ranks.wait()
                rows = self.rows()
        stop = self._stop(step, rows)
        self._tell([*notes, stop] if stop else notes, monitor)
        return bool(stop)

    def rows(self) -> list[Row]:
        """The looks at these clips so far, by step."""
        rows: list[Row] = list(read_metrics(self.folder / LOOKS_FILE))
        return [row for row in rows if row.get("clips") == self.digest]

    def best_student(self, student: Student) -> Student | None:
        """The best student so far, where there is one; `student` is the run's own."""
        if self._best(self.rows()) is None:
            return None
        # A second set of full weights would not fit beside this one.
        return load_student(self.folder / BEST_FILE, student.as_teacher(), onto=student)

    def _best(self, rows: list[Row]) -> Row | None:
        """The look whose student is in the file."""
        path = self.folder / BEST_FILE
        if self.recipe.best_by is None or not path.exists():
            return None
        step = read_student_info(path).steps_trained - self.info.steps_trained
        known = (row for row in rows if self.recipe.best_by in row)
        return next((row for row in known if row["step"] == step), None)

    def _see(self, step: int, student: Student, monitor: Monitor) -> tuple[list[Seen], float]:
        """Every clip by the student, and the mean squared distance of its latents."""
        spec = self.info.latent_spec
        if not self._teachers and self.ranks.first:
            self._teachers = [see(x.result, self.frames, spec, self.decode) for x in self.clips]
        each = len(self.info.key_times)  # the steps, and decoding
        total, seen, distances = each * len(self.clips), [], []
        for number, clip in enumerate(self.clips):
            done = number * each

            def stepped(progress: Progress, done: int = done) -> None:
                monitor(Progress("look", done + progress.step, total))

            latents = self._sampled(step, clip, student, stepped)
            if not self.ranks.first:
                continue
            ends = (spec.crop(x, self.frames) for x in (latents, clip.result))
            distances.append(float(latent_mse(*ends)))
            seen.append(see(latents, self.frames, spec, self.decode))
            if number + 1 < len(self.clips):
                monitor(Progress("look", done + each, total))
        return seen, sum(distances) / max(1, len(distances))

    def _sampled(self, step: int, clip: FixedClip, student: Student, monitor: Monitor) -> Tensor:
        """The student's clean latents [1, C, T, H, W] from the clip's noise, on the CPU."""
        device = student.as_teacher().device
        noise, cond = clip.noise.to(device), clip.cond.to(device)
        try:
            times, solver = student.key_times, self.info.solver
            return sample(student, cond, noise, times, monitor, solver=solver).cpu()
        except AccVideoError as error:
            remedy = "load the teacher in bfloat16 or float32"
            if step > 0:
                lower = f"start a new run with a learning rate below {self.recipe.lr:g}"
                remedy = f"{lower}, or {remedy} ({kept(self.folder)})"
            raise AccVideoError(
                f"the student's clips hold NaN or infinite values after update {step}; {remedy}"
            ) from error

    def _row(self, step: int, seen: list[Seen], mse: float, rows: list[Row]) -> Row:
        """The figures of this look, and what there is to say about them."""
        metrics = read_metrics(self.folder / METRICS_FILE)
        reach = range(step - window(self.recipe) + 1, step + 1)
        row: Row = {"step": step, "clips": self.digest, "latent_mse": mse}
        row |= relative(seen, self._teachers, self.pairs)
        row |= window_figures([figures for figures in metrics if figures["step"] in reach])
        notes = [] if rows or self.pairs else [_NO_PAIRS]
        standing: list[str] = []
        if step > 0:  # the untrained student is what training is measured by
            first = next((other for other in rows if other["step"] == 0), {})
            before = [other for other in rows if other["step"] < step][-1:]
            stood = before[0].get("standing", ()) if before else ()
            said, standing = told(row, first, stood, self.recipe)
            notes += said
        return row | {"notes": notes, "standing": standing}

    def _keep(self, row: Row, student: Student, seen: list[Seen], rows: list[Row]) -> None:
        """Write everything about a look; its line comes last and says that the rest is there."""
        step, best = row["step"], self._best(rows)
        if self.decode is not None and self.ranks.first:
            teachers, students = ([x.picture for x in some] for some in (self._teachers, seen))
            texts = [clip.text for clip in self.clips]
            write_look(self.folder / SAMPLES, step, teachers, students, texts)
        # The untrained student is no candidate: it may be near the teacher in one figure by chance.
        if self.recipe.best_by is not None and step > 0:
            if self.ranks.any(_better(row, best, self.recipe.best_by)):
                trained = self.info.steps_trained + step
                info = replace(student.info, steps_trained=trained)
                weights = student.state_dict(keep=self.ranks.first)
                if self.ranks.first:
                    save_student(replace(student, info=info), self.folder / BEST_FILE, weights)
                best = row
            row["best_step"] = best and best["step"]
        if self.ranks.first:
            append_lines(self.folder / LOOKS_FILE, json.dumps(row) + "\n")

    def _stop(self, step: int, rows: list[Row]) -> str:
        """Why training should stop after `step` updates; empty when it should not."""
        best, patience, name = self._best(rows), self.recipe.patience, self.recipe.best_by
        if best is None or patience is None or name is None:
            return ""
        worse = [row for row in rows if best["step"] < row["step"] <= step]
        if len(worse) < patience:
            return ""
        return (
            f"training stopped at update {step}: {len(worse)} looks in a row were no better by "
            f"{name} than update {best['step']} ({name} {best[name]:.4g}), whose student is kept"
        )

    def _with_room(
        self, work: Callable[[], tuple[list[Seen], float]], roles: Iterable[Role]
    ) -> tuple[list[Seen], float] | None:
        """The result of `work`, with the optimisers' state out of its way if it runs out of memory.

        How much a look takes is known only by trying; once short, it makes room first.
        """
        if self.ranks.size > 1:  # one that tries again would be waited for in vain
            return work()
        try:
            if not self._short:
                return work()
        except torch.cuda.OutOfMemoryError:
            self._short = True
        finally:
            _release()
        try:
            with ExitStack() as aside:
                for role in roles:
                    aside.enter_context(role.aside())
                _release()
                return work()
        except torch.cuda.OutOfMemoryError:
            return None
        finally:
            _release()

    def _give_up(self, step: int) -> str:
        self._blind = True
        return (
            f"the look at update {step} ran out of memory, even with the optimiser's state out of "
            "the way, and there will be no more; go on with swap_blocks or smaller clips to have "
            "them again"
        )

    def _tell(self, notes: list[str], monitor: Monitor) -> None:
        # Who has a monitor reads notes there; for anybody else the log is all there is.
        level = logging.WARNING if monitor is silent else logging.INFO
        for note in notes:
            _log.log(level, "run %s: %s", self.folder.name, note)
        total = len(self.clips) * len(self.info.key_times)
        monitor(Progress("look", total, total, notes=tuple(notes), picture=self.picture))

    def _check_best_by(self) -> None:
        lacking = {
            "saturation": "" if self.decode else "latents without a decoder have no colours",
            "diversity": "" if self.pairs else "no two of them are samples of one prompt",
            "motion": "" if self.frames > 1 else "they have one frame",
        }.get(self.recipe.best_by or "")
        if lacking:
            raise AccVideoError(
                f"recipe.best_by is {self.recipe.best_by}, which the clips looked at cannot tell: "
                f"{lacking}; choose latent_mse"
            )


def _better(row: Row, best: Row | None, name: str) -> bool:
    """Whether a look is nearer to the teacher than the best one so far, by one figure."""
    if name not in row:
        return False
    return best is None or _distance(row, name) < _distance(best, name)


def _distance(row: Row, name: str) -> float:
    """From the teacher: latent_mse is one, the other figures are relative to the teacher's."""
    return row[name] if name == "latent_mse" else abs(row[name] - 1)


def _release() -> None:
    """Give the device's unused memory back: a look's blocks have other sizes than training's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()

"""How good are students of the embedded teacher? The full experiment behind docs/quality.md.

    python -m scripts.quality                       everything, hours on a laptop, minutes on a GPU
    python -m scripts.quality --stages record
    python -m scripts.quality --stages train compare --seeds 0 1 --threads 1    side by side with
    python -m scripts.quality --stages train compare --seeds 2   --threads 1
    python -m scripts.quality --stages report

For every training seed and every number of student steps m: a trajectory student (Eq. 6), and from
it, with equal updates and learning rates, either more of the same ("continued", the control) or
with the adversarial term (Eq. 6 + Eq. 7, "adversarial"). All are measured on prompts and noise that
training never saw. Every stage goes on where it was interrupted, in --work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from accvideo_core.conditioning import Prompt
from accvideo_core.distill.recipe_file import changed_recipe
from accvideo_core.distill.recipes import Recipe, preset
from accvideo_core.distill.student import Student
from accvideo_core.distill.trainer import distill
from accvideo_core.errors import AccVideoError
from accvideo_core.evaluate import world
from accvideo_core.evaluate.compare import Contender, compare
from accvideo_core.evaluate.pictures import contact_sheet, loss_curves
from accvideo_core.evaluate.report import Report
from accvideo_core.export import load_student, save_student
from accvideo_core.files import read_json, write_json
from accvideo_core.latents import key_generator
from accvideo_core.models.loading import Teacher, load_teacher
from accvideo_core.models.tiny import embedded_teacher_path
from accvideo_core.monitor import Cancelled
from accvideo_core.terminal import Terminal
from accvideo_core.trajectories.record import RecordSpec, record
from accvideo_core.trajectories.store import TrajectoryDataset
from scripts.quality_report import ARMS, render

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("record", "train", "compare", "report")
KEPT = (0, 10, 20, 25, 30, 40, 50)
"""Key states of m = 5, 2 and 1 in one dataset."""
PAIRED = ("fd_real", "fd_teacher", "sharpness", "detail", "diversity", "all")
DATA_SEED, EVAL_SEED = 0, 1


@dataclass(frozen=True, slots=True)
class Setting:
    """What decides the figures; it is stored beside them."""

    steps: tuple[int, ...] = (5, 2, 1)
    trajectories: int = 512
    updates: int = 400
    """Of the trajectory stage."""
    more_updates: int = 120
    """Of the continued and of the adversarial stage each."""
    batch: int = 16
    clips: int = 512
    real_clips: int = 1024
    changes: tuple[str, ...] = ()
    """FIELD=VALUE, changes to all recipes."""
    adversarial_changes: tuple[str, ...] = ()
    """FIELD=VALUE, changes to the adversarial recipe alone."""
    draws: int = 200

    def as_dict(self) -> dict[str, Any]:
        return {name: _plain(getattr(self, name)) for name in self.__slots__}

    def recipe(self, arm: str, m: int, seed: int) -> Recipe:
        """The recipe of one arm; "continued" is the adversarial one without its term."""
        first = arm == "trajectory"
        base = preset("tiny-trajectory" if first else "tiny-adversarial")
        changed = changed_recipe(base, self.changes)
        if arm == "adversarial":
            changed = changed_recipe(changed, self.adversarial_changes)
        return replace(
            changed,
            name=f"{arm}@{m}",
            student_steps=m,
            adversarial=arm == "adversarial",
            train_steps=self.updates if first else self.more_updates,
            batch_size=self.batch,
            seed=seed if first else seed + 1000,  # another order of batches than before
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen stages; 0 when done, 2 for a user's error, 130 when cancelled."""
    try:
        _run(_arguments(argv))
    except AccVideoError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    except (Cancelled, KeyboardInterrupt):
        print("cancelled; run the same command to go on", file=sys.stderr)
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    setting = Setting(
        steps=tuple(args.steps),
        trajectories=args.trajectories,
        updates=args.updates,
        more_updates=args.more_updates,
        batch=args.batch,
        clips=args.clips,
        changes=tuple(args.set),
        adversarial_changes=tuple(args.set_adversarial),
    )
    lab = Lab(setting, args.work, load_teacher(args.teacher, device=args.device))
    with Terminal(sys.stderr) as terminal:
        if "record" in args.stages:
            lab.record(terminal)
        for seed in args.seeds:
            if "train" in args.stages:
                lab.train(seed, terminal)
            if "compare" in args.stages:
                lab.compare(seed, terminal)
        if "report" in args.stages:
            lab.report(args.seeds, args.docs, args.note)
            terminal.say(f"wrote {args.docs / 'quality.md'}")


@dataclass(eq=False)
class Lab:
    """The teacher, the setting and the work folder."""

    setting: Setting
    work: Path
    teacher: Teacher

    def record(self, terminal: Terminal) -> TrajectoryDataset:
        """The teacher's trajectories, two of each prompt."""
        spec = RecordSpec(
            frames=world.FRAMES,
            height=world.SIZE,
            width=world.SIZE,
            samples_per_prompt=2,
            seed=DATA_SEED,
            kept=KEPT,
            batch_size=min(32, self.setting.trajectories // 2),
            dtype="float32",
        )
        prompts = self.prompts(self.setting.trajectories // 2, "train")
        return record(self.teacher.model, prompts, spec, self.work / "dataset", terminal)

    def train(self, seed: int, terminal: Terminal) -> None:
        """All arms of one training seed."""
        dataset = TrajectoryDataset.open(self.work / "dataset")
        for m in self.setting.steps:
            first: Student | None = None
            for arm in ARMS:
                terminal.say(f"seed {seed}, {arm}@{m}")
                recipe = self.setting.recipe(arm, m, seed)
                folder = self.run(seed, arm, m)
                start = None if arm == "trajectory" else first
                result = distill(
                    self.teacher.model, dataset, recipe, folder, start=start, monitor=terminal
                )
                save_student(result.student, folder / "student.safetensors")
                first = first or result.student

    def compare(self, seed: int, terminal: Terminal) -> None:
        """Figures of one training seed's students, with intervals, in <work>/seed<n>.json."""
        path = self.work / f"seed{seed}.json"
        made_of = {"setting": self.setting.as_dict(), "teacher": self.teacher.model.fingerprint}
        if path.exists() and made_of.items() <= read_json(path).items():
            return
        grid = self.teacher.model.family.time_grid
        contenders = [
            Contender(f"teacher@{m}", self.teacher.model, grid(m)) for m in self.setting.steps
        ]
        for m in self.setting.steps:
            for arm in ARMS:
                file = self.run(seed, arm, m) / "student.safetensors"
                student = load_student(file, self.teacher.model)
                contenders.append(Contender(f"{arm}@{m}", student, student.key_times))
        report = compare(
            self.teacher,
            contenders,
            prompts=self.prompts(self.setting.clips // 2, "compare"),
            seed=EVAL_SEED,
            batch_size=32,
            monitor=terminal,
            real_clips=self.setting.real_clips,
            samples_per_prompt=2,
            shown=6,
        )
        terminal.say(report.table())
        self.draw(seed, report)
        write_json(
            path,
            {
                **made_of,
                **report.as_dict(),
                "intervals": self.intervals(report),
                "differences": self.differences(report),
            },
        )

    def intervals(self, report: Report) -> dict[str, dict[str, float]]:
        """The Frechet distance of everybody with its bootstrap error."""
        found = {
            name: report.interval(name, "fd_real", self.setting.draws) for name in report.measured
        }
        return {name: {"value": x.value, "error": x.error} for name, x in found.items()}

    def differences(self, report: Report) -> list[dict[str, Any]]:
        """Paired: the few-step teacher against the student, and adversarial against continued."""
        pairs = [
            pair
            for m in self.setting.steps
            for pair in (
                (f"trajectory@{m}", f"teacher@{m}"),
                (f"adversarial@{m}", f"continued@{m}"),
            )
        ]
        rows = []
        for a, b in pairs:
            for figure in PAIRED:
                x = report.difference(a, b, figure, self.setting.draws)
                rows.append({"a": a, "b": b, "figure": figure, "value": x.value, "error": x.error})
        return rows

    def draw(self, seed: int, report: Report) -> None:
        """Contact sheets and curves of one seed, one each for each number of steps."""
        for m in self.setting.steps:
            names = [report.reference, f"teacher@{m}", *(f"{arm}@{m}" for arm in ARMS)]
            shown = {name: report.measured[name].shown for name in names}
            clips = {name: x for name, x in shown.items() if x is not None}
            sheet = contact_sheet(clips, report.prompts[:6], frames_per_clip=3)
            sheet.save(self.work / f"seed{seed}_steps{m}.png")
            curves = {f"{arm}@{m}": self.run(seed, arm, m) / "metrics.jsonl" for arm in ARMS}
            loss_curves(curves).save(self.work / f"seed{seed}_loss{m}.png")

    def report(self, seeds: Sequence[int], docs: Path, note: Path | None) -> None:
        """docs/quality.md and its pictures from the seeds' files."""
        results = {seed: read_json(self.work / f"seed{seed}.json") for seed in seeds}
        images = docs / "images"
        images.mkdir(parents=True, exist_ok=True)
        pictures = []
        for name in (f"{kind}{m}" for m in self.setting.steps for kind in ("steps", "loss")):
            target = images / f"quality_{name}.png"
            target.write_bytes((self.work / f"seed{seeds[0]}_{name}.png").read_bytes())
            pictures.append(f"images/{target.name}")
        extra = note.read_text(encoding="utf-8") if note else ""
        text = render(results, command=_command(self.setting), pictures=pictures, note=extra)
        (docs / "quality.md").write_text(text, encoding="utf-8")

    def run(self, seed: int, arm: str, m: int) -> Path:
        return self.work / "runs" / f"seed{seed}" / f"{arm}_{m}"

    def prompts(self, count: int, purpose: str) -> list[Prompt]:
        return self.teacher.encode_prompts(
            world.sample_prompts(count, key_generator("quality", purpose))
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _command(setting: Setting) -> str:
    """The command that gives these figures, without what is the default."""
    words = ["python -m scripts.quality"]
    default = Setting()
    flags = {"changes": "set", "adversarial_changes": "set-adversarial"}
    for name in setting.__slots__:
        value = getattr(setting, name)
        if value == getattr(default, name):
            continue
        flag = flags.get(name, name.replace("_", "-"))
        words.append(f"--{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(words)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    default = Setting()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="training seeds")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quality")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--teacher", type=Path, default=embedded_teacher_path())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="1 where several processes share the cores")
    parser.add_argument("--steps", nargs="+", type=int, default=list(default.steps))
    for name in ("trajectories", "updates", "more_updates", "batch", "clips"):
        flag, value = f"--{name.replace('_', '-')}", getattr(default, name)
        parser.add_argument(flag, type=int, default=value, help=f"({value})")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--set-adversarial", nargs="+", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--note", type=Path, help="markdown to put into the report, as it is")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

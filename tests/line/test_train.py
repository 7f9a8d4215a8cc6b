"""The training loop end to end: mathematics, exact resume, cancelling, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import analytic
import pytest
import tiny
import torch
from torch import Tensor, nn

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.distill.checkpoint import load_checkpoint
from accvideo_core.distill.metrics import read_metrics
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.run import student_of_run
from accvideo_core.distill.student import LoraSpec, Student
from accvideo_core.distill.trainer import TrainResult, distill
from accvideo_core.errors import AccVideoError
from accvideo_core.flow import find_times
from accvideo_core.models import VideoModel
from accvideo_core.monitor import Cancelled, Monitor, Progress
from accvideo_core.sampling import sample
from accvideo_core.trajectories.record import RecordSpec, record
from accvideo_core.trajectories.store import TrajectoryDataset

RECIPE = Recipe(
    student_steps=2,
    adversarial=True,
    lora=LoraSpec(rank=4),
    train_steps=12,
    batch_size=4,
    accumulate=2,
    lr=1e-2,
    head_lr=1e-2,
    schedule="cosine",
    ema=0.5,
    head_width=16,
    checkpoint_every=100,
)


def recorded(model: VideoModel, folder: Path, samples: int = 3, **spec: Any) -> TrajectoryDataset:
    prompts = [
        Prompt.of(f"clip {i}", tiny.condition(1, length=3 + i, seed=10 + i)) for i in range(2)
    ]
    chosen = {"steps": 4, "kept": 4, "batch_size": 6, "dtype": "float32", **spec}
    sizes = {"frames": 5, "height": 16, "width": 16, "samples_per_prompt": samples}
    return record(model, prompts, RecordSpec(**sizes, **chosen), folder)


@pytest.fixture(scope="module")
def teacher() -> VideoModel:
    return tiny.video_model()


@pytest.fixture(scope="module")
def dataset(teacher: VideoModel, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryDataset:
    return recorded(teacher, tmp_path_factory.mktemp("data") / "clips")


Run = Callable[..., TrainResult]


@pytest.fixture
def run(teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path) -> Run:
    def go(name: str = "run", recipe: Recipe = RECIPE, **more: Any) -> TrainResult:
        return distill(teacher, dataset, recipe, tmp_path / name, **more)

    return go


def cancel_at(step: int) -> Monitor:
    def monitor(progress: Progress) -> None:
        if progress.step == step:
            raise Cancelled

    return monitor


def assert_same(a: TrainResult, b: TrainResult) -> None:
    """The same weights and figures, bit for bit."""
    assert a.losses == b.losses
    mine, other = a.student.state_dict(), b.student.state_dict()
    assert all(torch.equal(x, other[name]) for name, x in mine.items())
    rows = [read_metrics(result.metrics_file) for result in (a, b)]
    for first, second in zip(*rows, strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}


class Correctable(analytic.GaussianFlow):
    """A Gaussian flow plus slope x + offset at every key time; both are zero in the teacher."""

    def __init__(self, times: tuple[float, ...]) -> None:
        super().__init__(0.5, 0.25)
        self.times = times
        self.slope = nn.Parameter(torch.zeros(len(times)))
        self.offset = nn.Parameter(torch.zeros(len(times)))

    def flow(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        here = [(t - time).abs() < 1e-5 for time in self.times]
        extra = [
            h * (self.slope[i] * x + self.offset[i]) for i, h in enumerate(here) if bool(h.any())
        ]
        return sum(extra, super().flow(x, t, cond))


def test_student_of_the_gaussian_flow_lands_on_its_exact_end_points(tmp_path: Path) -> None:
    """Two steps of the student against the closed form; the teacher's two steps are far off."""
    grid = analytic.ANALYTIC.time_grid(800)
    key_times = tuple(grid[i] for i in (0, 400, 800))
    teacher = analytic.analytic_model(Correctable(key_times[:2]))
    spec = RecordSpec(5, 16, 16, samples_per_prompt=2, steps=800, kept=2, dtype="float32")
    dataset = record(teacher, analytic.prompts(32), replace(spec, batch_size=32), tmp_path / "data")
    recipe = Recipe(
        student_steps=2,
        lora=None,
        train_steps=300,
        batch_size=16,
        lr=0.05,
        weight_decay=0.0,
        clip=None,
        schedule="cosine",
        checkpoint_every=1000,
    )
    student = distill(teacher, dataset, recipe, tmp_path / "run").student
    assert student.key_times == key_times
    noise = torch.randn(64, 2, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    exact = analytic.exact_gaussian_state(noise, 0.0)
    ours, theirs = (
        (sample(model, analytic.condition(), noise, key_times) - exact).abs().max()
        for model in (student, teacher)
    )
    assert ours < 0.01  # what 800 Euler steps of the recorder leave is .0016 |x_1|
    assert theirs > 0.2


def test_cancelled_and_resumed_equals_uninterrupted(run: Run) -> None:
    whole = run("whole")
    assert len(whole.losses) == 12 and len(set(whole.losses)) == 12
    for step in (5, 7):
        with pytest.raises(Cancelled):
            run("parts", monitor=cancel_at(step))
    seen: list[int] = []
    parts = run("parts", monitor=lambda progress: seen.append(progress.step))
    assert seen == list(range(8, 13))
    assert_same(parts, whole)
    assert_same(run("parts"), whole)  # a finished run comes back as it is


def test_killed_and_resumed_equals_uninterrupted(run: Run, tmp_path: Path) -> None:
    """A copy of the folder in the middle of the run is what a killed process leaves behind."""
    recipe = replace(RECIPE, checkpoint_every=3)

    def copy(progress: Progress) -> None:
        if progress.step == 8:
            shutil.copytree(tmp_path / "whole", tmp_path / "killed")
            with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
                file.write('{"step": 9, "lo')

    whole = run("whole", recipe, monitor=copy)
    saved = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["00000009.safetensors", "00000012.safetensors"]

    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "killed", damaged)
    last = damaged / "checkpoints" / "00000006.safetensors"
    last.write_bytes(last.read_bytes()[:-10])
    for name, first in (("killed", 7), ("damaged", 4)):
        seen: list[int] = []
        resumed = run(name, recipe, monitor=lambda p, seen=seen: seen.append(p.step))
        assert seen[0] == first
        assert_same(resumed, whole)
        lines = resumed.metrics_file.read_text().splitlines()
        assert len(lines) == 8 + 1 + 13 - first  # nothing was taken away


def test_inference_mode_changes_nothing(
    teacher: VideoModel, dataset: TrajectoryDataset, run: Run, tmp_path: Path
) -> None:
    plain = run("plain", replace(RECIPE, train_steps=3))
    with torch.inference_mode():
        previews: list[Tensor] = []

        def monitor(progress: Progress) -> None:
            assert progress.preview is not None
            previews.append(progress.preview())

        inside = run("inside", replace(RECIPE, train_steps=3), monitor=monitor)
        again = inside.student.clone()
    assert_same(inside, plain)
    assert previews[0].shape == (2, *dataset.info.shape) and not previews[0].requires_grad
    (taught, first), (same, second) = previews[:2]
    assert torch.equal(taught, same) and not torch.equal(first, second)
    run("from", replace(RECIPE, train_steps=1), start=again)


def test_teacher_and_starting_student_stay_as_they_are(teacher: VideoModel, run: Run) -> None:
    values = {name: p.clone() for name, p in teacher.module.named_parameters()}
    start = run("first", replace(RECIPE, adversarial=False, train_steps=4)).student
    before = start.state_dict()
    tuned = run("second", replace(RECIPE, train_steps=4), start=start).student
    assert all(torch.equal(x, before[name]) for name, x in start.state_dict().items())
    assert any(not torch.equal(x, before[name]) for name, x in tuned.state_dict().items())
    for name, p in teacher.module.named_parameters():
        assert torch.equal(p, values[name]) and p.grad is None and not p.requires_grad
    assert (start.info.steps_trained, tuned.info.steps_trained) == (4, 8)
    assert tuned.info.recipe["adversarial"] and not start.info.recipe["adversarial"]
    assert tuned.key_times == start.key_times and len(tuned.key_times) == 3


def test_a_step_of_one_key_time_trains_its_heads_alone(run: Run, tmp_path: Path) -> None:
    run(recipe=replace(RECIPE, train_steps=1))  # k = m - 1 = 1
    found = load_checkpoint(tmp_path / "run")
    assert found is not None
    moved = {n.split(".")[1] for n in found[1]["heads"] if n.startswith("exp_avg:")}
    values = {n.split(".")[1] for n in found[1]["heads"] if n.startswith("value:")}
    assert moved == {"k1_block3"} and values == {"k1_block3", "k0_block2"}


def test_metrics_hold_every_figure(run: Run, dataset: TrajectoryDataset) -> None:
    seen: list[Progress] = []
    result = run(recipe=replace(RECIPE, train_steps=4), monitor=seen.append)
    rows = [json.loads(line) for line in result.metrics_file.read_text().splitlines()]
    assert [dict(p.metrics) for p in seen] == rows
    assert [(p.stage, p.step, p.total) for p in seen] == [("distill", i, 4) for i in range(1, 5)]
    names = "step k t lr seconds loss trajectory generator discriminator real_accuracy "
    names += "fake_accuracy student_grad_norm heads_grad_norm"
    assert all(set(row) == set(names.split()) for row in rows)
    assert [row["k"] for row in rows] == [1, 0, 1, 0]
    assert rows[0]["t"] == dataset.info.time_grid[2] and rows[1]["t"] == 0.0
    for row in rows:
        assert row["loss"] == pytest.approx(row["trajectory"] + 0.1 * row["generator"])
    assert [row["loss"] for row in rows] == result.losses


def test_parts_of_a_batch_and_recomputed_activations_change_only_the_last_bits(run: Run) -> None:
    base = replace(RECIPE, train_steps=3, accumulate=1, ema=None, lr=1e-3)
    whole = run("whole", base)
    for name, change in {
        "parts": {"accumulate": 4},
        "recomputed": {"gradient_checkpointing": True},
    }.items():
        other = run(name, replace(base, **change))
        assert other.losses == pytest.approx(whole.losses, rel=1e-5)


def test_full_fine_tuning_learns(run: Run, teacher: VideoModel, dataset: TrajectoryDataset) -> None:
    recipe = replace(RECIPE, adversarial=False, lora=None, lr=3e-3, train_steps=20, clip=1.0)
    result = run(recipe=replace(recipe, ema=None, schedule="constant", batch_size=6))
    assert sum(result.losses[-2:]) < 0.8 * sum(result.losses[:2])
    assert result.student.info.lora is None


def test_averaged_weights_are_the_finished_ones(run: Run, tmp_path: Path) -> None:
    result = run(recipe=replace(RECIPE, train_steps=2))
    found = load_checkpoint(tmp_path / "run")
    assert found is not None
    average = found[1]["average"]
    raw = {n: x for n, x in found[1]["student"].items() if n.startswith("value:")}
    for name, x in result.student.state_dict().items():
        assert torch.equal(x, average[name])
    assert any(not torch.equal(raw[f"value:{name}"], x) for name, x in average.items())


def test_the_student_of_a_run_can_be_taken_from_its_folder(
    run: Run, teacher: VideoModel, tmp_path: Path
) -> None:
    first = run("first", replace(RECIPE, train_steps=2, lora=LoraSpec(rank=2))).student
    for ema in (0.5, None):
        result = run(f"ema {ema}", replace(RECIPE, train_steps=2, ema=ema), start=first)
        taken = student_of_run(tmp_path / f"ema {ema}", teacher)
        assert taken.info.as_metadata() == result.student.info.as_metadata()
        assert taken.info.lora == LoraSpec(rank=2) and taken.info.steps_trained == 4
        for name, x in result.student.state_dict().items():
            assert torch.equal(taken.state_dict()[name], x)
    with pytest.raises(AccVideoError, match="is no training run"):
        student_of_run(tmp_path, teacher)
    with pytest.raises(AccVideoError, match="trains a student of another teacher"):
        student_of_run(tmp_path / "first", tiny.video_model(seed=1))
    shutil.rmtree(tmp_path / "first" / "checkpoints")
    with pytest.raises(AccVideoError, match="has no checkpoint yet"):
        student_of_run(tmp_path / "first", teacher)


def test_more_steps_go_on_from_a_finished_run(run: Run) -> None:
    recipe = replace(RECIPE, schedule="constant", train_steps=4)
    whole = run("whole", recipe)
    run("longer", replace(recipe, train_steps=2))
    longer = run("longer", recipe)
    assert longer.losses == whole.losses
    run("cosine", replace(RECIPE, train_steps=1))
    with pytest.raises(AccVideoError, match="started with recipe.train_steps 1 and cannot go on"):
        run("cosine", replace(RECIPE, train_steps=2))


def test_another_recipe_or_dataset_is_refused(
    run: Run, teacher: VideoModel, tmp_path: Path
) -> None:
    run(recipe=replace(RECIPE, train_steps=1))
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(AccVideoError, match="recipe.lr 0.01 and cannot go on with 0.5"):
        run(recipe=replace(RECIPE, train_steps=1, lr=0.5))
    other = recorded(teacher, tmp_path / "other", samples=1)
    with pytest.raises(AccVideoError, match="was started with dataset.ids"):
        distill(teacher, other, replace(RECIPE, train_steps=1), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_broken_loss_stops_before_the_weights(run: Run, tmp_path: Path) -> None:
    recipe = replace(RECIPE, lr=1e30, checkpoint_every=1, adversarial=False, warmup=0)
    with pytest.raises(AccVideoError, match="became .* at update 2 .*learning rate below 1e"):
        run(recipe=recipe)
    found = load_checkpoint(tmp_path / "run")
    assert found is not None and found[0] == 1


def test_what_does_not_fit_is_refused_in_one_sentence(
    teacher: VideoModel, dataset: TrajectoryDataset, run: Run, tmp_path: Path
) -> None:
    other = tiny.video_model(seed=1)
    with pytest.raises(AccVideoError, match="was recorded with another teacher"):
        distill(other, dataset, RECIPE, tmp_path / "x")
    with pytest.raises(AccVideoError, match="3 student steps do not divide the 4"):
        run(recipe=replace(RECIPE, student_steps=3))
    with pytest.raises(AccVideoError, match="key time 0.5000 is not among .* record into another"):
        run(recipe=replace(RECIPE, key_times=(1.0, 0.5, 0.0)))
    empty = TrajectoryDataset.create(tmp_path / "empty", dataset.info)
    with pytest.raises(AccVideoError, match="'empty' holds no trajectories; record some first"):
        distill(teacher, empty, RECIPE, tmp_path / "x")
    start = Student.create(
        other,
        replace(run("ok", replace(RECIPE, train_steps=1)).student.info, base=other.fingerprint),
    )
    with pytest.raises(AccVideoError, match="to start from was trained on another teacher"):
        run("x", start=start)
    assert not (tmp_path / "x").exists()


def test_key_states_are_those_of_the_records(teacher: VideoModel, tmp_path: Path) -> None:
    """Read batch by batch or held in memory: the same numbers, from data to noise."""
    from accvideo_core.distill import batch as batches

    dataset = recorded(teacher, tmp_path / "clips", steps=4, kept=(0, 2, 4))
    grid = dataset.info.time_grid
    states = batches.KeyStates(dataset, (grid[0], grid[2], grid[4]))
    key_batch = states.batch(6, seed=0, step=0, device=torch.device("cpu"))
    records = [dataset.read(id).latents for id in dataset.ids()]
    row = find_times(dataset.info.times, [0.0])[0]
    ends = {r[row].sum().item() for r in records}
    assert {x.sum().item() for x in key_batch.latents[0]} == ends  # 6 of 6: each once
    starts = {r[0].sum().item() for r in records}
    assert {x.sum().item() for x in key_batch.latents[2]} == starts
    assert not {z.sum().item() for z in key_batch.z} & starts
    states._keep, states._held = False, {}
    again = states.batch(6, seed=0, step=0, device=torch.device("cpu"))
    assert torch.equal(again.latents, key_batch.latents) and not states._held
    other = states.batch(6, seed=0, step=1, device=torch.device("cpu"))
    assert not torch.equal(other.z, key_batch.z)

"""Training in two processes (gloo, CPU) against one: the same losses, gradients and weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from accvideo_core.cli import main
from accvideo_core.commands import STUDENT_FILE
from accvideo_core.conditioning import Prompt
from accvideo_core.distill.checkpoint import load_checkpoint
from accvideo_core.distill.metrics import read_metrics
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.run import student_of_run
from accvideo_core.distill.sharded_tensors import local, whole
from accvideo_core.distill.sharding import spread
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.distill.trainer import distill
from accvideo_core.distill.watch import LOOKS_FILE
from accvideo_core.files import read_safetensors
from accvideo_core.monitor import Cancelled, Progress
from accvideo_core.ranks import ALONE, Ranks
from accvideo_core.trajectories.record import RecordSpec, record
from accvideo_core.trajectories.store import TrajectoryDataset
from tests import tiny, tiny_hunyuan_i2v
from tests.divisible import divisible
from tests.processes import Pair

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)

LORA = Recipe(
    student_steps=2,
    adversarial=True,
    lora=LoraSpec(rank=4),
    rollout="queued",
    train_steps=5,
    batch_size=4,
    accumulate=2,
    lr=1e-3,
    head_lr=1e-3,
    ema=0.5,
    head_width=16,
    checkpoint_every=3,
    gradient_checkpointing=True,
    validate_every=5,
    validation_clips=2,
    best_by="latent_mse",
)
# Adam divides by the gradient's size: where a gradient is all rounding, so is the update, and
# weights differ by a part of the learning rate.
FULL = replace(LORA, lora=None, lr=2e-5, gradient_checkpointing=False, rollout="direct")
RECIPES = {"lora": LORA, "full": FULL}
SHORT = replace(
    FULL, adversarial=False, train_steps=2, checkpoint_every=1, validate_every=0, best_by=None
)
CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("pair")) as processes:
        yield processes


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 trajectories of texts of two lengths."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    prompts = [
        Prompt.of(f"clip {i}", tiny.condition(1, length=3 + i, seed=10 + i)) for i in range(2)
    ]
    spec = RecordSpec(5, 16, 16, samples_per_prompt=3, steps=4, kept=4, dtype="float32")
    record(tiny.video_model(), prompts, replace(spec, batch_size=6), folder)
    return folder


def train(
    ranks: Ranks, data: Path, recipe: Recipe, run: Path, stop: int | None = None
) -> dict[str, Any]:
    """What a process has after training (or after the first's monitor has raised at `stop`)."""
    teacher = tiny.video_model()

    def monitor(progress: Progress) -> None:
        if progress.step == stop and ranks.first:
            raise Cancelled

    try:
        result = distill(
            teacher, TrajectoryDataset.open(data), recipe, run, monitor=monitor, ranks=ranks
        )
    except Cancelled:
        return {"stopped": True}
    held = sum(local(p).numel() for p in teacher.module.parameters())
    weights = {name: x.numpy() for name, x in result.student.state_dict().items()}
    return {"losses": result.losses, "weights": weights, "held": held}


@pytest.fixture(scope="module")
def alone(
    dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """A recipe's run in one process, trained once; "run" is a folder that nothing may change."""
    folder = tmp_path_factory.mktemp("alone")
    known: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name not in known:
            path = folder / name
            known[name] = {**train(ALONE, dataset, RECIPES[name], path), "run": path}
        return known[name]

    return run


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses and weights to 1e-6, of weights that have changed by far more."""
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert found["weights"].keys() == expected["weights"].keys()
    differences = [abs(x - expected["weights"][name]).max() for name, x in found["weights"].items()]
    assert max(differences) < 1e-6


def assert_same_state(run: Path, other: Path, step: int) -> None:
    """The last checkpoints: weights, moments, averages and waiting fakes."""
    (done, parts), (there, others) = (load_checkpoint(folder) or (0, {}) for folder in (run, other))
    assert done == there == step
    assert parts.keys() == others.keys() >= {"student", "heads", "average"}
    for part, state in parts.items():
        assert state.keys() == others[part].keys()
        assert all((x - others[part][name]).abs().max() < 1e-5 for name, x in state.items())


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_as_one(
    pair: Pair, dataset: Path, alone: Callable[[str], dict[str, Any]], name: str, tmp_path: Path
) -> None:
    expected = alone(name)
    results = pair(train, dataset, RECIPES[name], tmp_path)
    for result in results:
        assert_same(result, expected)
        # The rest is what belongs to no block, or does not divide by two.
        assert result["held"] < 0.51 * expected["held"]
    rows, alone_rows = (
        read_metrics(run / "metrics.jsonl") for run in (tmp_path, expected["run"])
    )
    for row, other in zip(rows, alone_rows, strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**other, "seconds": 0}, abs=2e-6)
    assert_same_state(tmp_path, expected["run"], 5)
    looks, others = (read_metrics(run / LOOKS_FILE) for run in (tmp_path, expected["run"]))
    assert [(look["step"], look.get("best_step")) for look in looks] == [(0, None), (5, 5)]
    for look, other in zip(looks, others, strict=True):
        assert look["latent_mse"] == pytest.approx(other["latent_mse"], abs=1e-6)
    student = student_of_run(tmp_path, tiny.video_model())
    final = {name: x.numpy() for name, x in student.state_dict().items()}
    assert_same({**results[0], "weights": final}, expected)


# Going on in other numbers of processes -----------------------------------------------------------


def cut(run: Path, step: int, folder: Path) -> Path:
    """What a process killed after `step` updates leaves: a copy without the later checkpoints."""
    shutil.copytree(run, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.stem) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_goes_on_in_more_or_fewer_processes(
    pair: Pair, dataset: Path, alone: Callable[[str], dict[str, Any]], name: str, tmp_path: Path
) -> None:
    expected = alone(name)
    grown = cut(expected["run"], 3, tmp_path / "grown")
    for result in pair(train, dataset, RECIPES[name], grown):
        assert_same(result, expected)
    shrunk = cut(grown, 5, tmp_path / "shrunk")
    longer = replace(RECIPES[name], train_steps=6)
    known = train(ALONE, dataset, longer, cut(expected["run"], 5, tmp_path / "longer"))
    found = train(ALONE, dataset, longer, shrunk)
    assert len(found["losses"]) == 6
    assert_same(found, known)


def test_a_torn_sharded_checkpoint_is_passed_over(
    pair: Pair, dataset: Path, tmp_path: Path
) -> None:
    expected = pair(train, dataset, SHORT, tmp_path)[0]
    last = tmp_path / "checkpoints" / "00000002"
    assert sorted(path.name for path in last.parent.iterdir()) == ["00000001", last.name]
    shards = sorted(last.glob("*.safetensors"))
    assert len(shards) == 2
    assert {path.suffix for path in last.iterdir()} == {".safetensors", ".json"}
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    assert (load_checkpoint(tmp_path) or (0,))[0] == 1
    for result in pair(train, dataset, SHORT, tmp_path):
        assert result["losses"] == expected["losses"]
        assert all((x == expected["weights"][n]).all() for n, x in result["weights"].items())
    assert (load_checkpoint(tmp_path) or (0,))[0] == 2


def test_a_cancel_of_the_first_stops_both_after_the_same_update(
    pair: Pair, dataset: Path, tmp_path: Path
) -> None:
    recipe = replace(SHORT, lora=LoraSpec(rank=4), checkpoint_every=100)
    assert pair(train, dataset, recipe, tmp_path / "run", 1) == [{"stopped": True}] * 2
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert (load_checkpoint(tmp_path / "run") or (0,))[0] == 1
    expected = train(ALONE, dataset, recipe, tmp_path / "alone")
    for result in pair(train, dataset, recipe, tmp_path / "run"):
        assert_same(result, expected)


# Dividing tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_processes_that_divide_tokens_train_as_one(
    pair: Pair, dataset: Path, alone: Callable[[str], dict[str, Any]], name: str, tmp_path: Path
) -> None:
    expected, recipe = alone(name), replace(RECIPES[name], train_steps=3, best_by=None)
    recipe = replace(recipe, validate_every=0)
    for result in pair(train, dataset, recipe, tmp_path / "run", sequence=2):
        assert result["losses"] == pytest.approx(expected["losses"][:3], abs=1e-6)
    assert_same_state(tmp_path / "run", cut(expected["run"], 3, tmp_path / "cut"), 3)


def answers(ranks: Ranks, name: str, lora: bool, checkpointing: bool) -> dict[str, Any]:
    """Velocity, features, and the gradients through both, of a student and its teacher; with
    (random) adapters in float64, where rounding cannot hide a difference.
    """
    model, x, cond = divisible(name, 1)  # also among the tokens of the first process
    model.module.double()
    x = x.double()
    size, spec = LoraSpec(rank=2) if lora else None, model.latent_spec
    info = StudentInfo(name, "", (1.0, 0.5, 0.0), None, size, spec, 5, 16, 16)
    student = Student.create(model, info, own=ranks.size == 1)
    generator = torch.Generator().manual_seed(5)
    for p in student.trainable().values():
        if lora:
            torch.nn.init.normal_(p, std=0.2, generator=generator)
    if lora:
        student.model.module.double()
    if checkpointing:
        student.model.module.enable_gradient_checkpointing()  # type: ignore[operator]
    teacher = spread(student, model, ranks)
    v = student.velocity(x, 0.6, cond)
    features = teacher.features(x - 0.4 * v, 0.6, cond, [0, model.num_blocks - 1])
    sum(f.square().mean() for f in [v, *features]).backward()  # type: ignore[union-attr]
    trained = student.trainable()
    ranks.reduce(trained.values(), whole=False)
    gradients = {name: whole(p.grad) for name, p in trained.items() if p.grad is not None}
    found = {"v": v, "first": features[0], "last": features[1], **gradients}
    return {name: x.detach().numpy() for name, x in found.items()}


WAYS = [
    *((name, True, False) for name in ("hunyuan_video", *tiny_hunyuan_i2v.KINDS)),
    *((name, True, False) for name in ("wan_i2v", "wan22_i2v", "wan22_ti2v")),
    *((name, True, True) for name in ("hunyuan_video", "wan_t2v")),
    *((name, False, False) for name in ("hunyuan_video", "wan_t2v")),
]


@pytest.mark.parametrize(("name", "lora", "checkpointing"), WAYS)
def test_divided_tokens_give_the_same_answers_and_gradients(
    pair: Pair, name: str, lora: bool, checkpointing: bool
) -> None:
    expected = answers(ALONE, name, lora, checkpointing)
    assert len(expected) > 20
    for found in pair(answers, name, lora, checkpointing, sequence=2):
        assert found.keys() == expected.keys()
        for key, x in expected.items():
            assert abs(found[key] - x).max() < (1e-12 if lora else 5e-6), key


def test_machines_of_one_gpu_keep_whole_weights(pair: Pair) -> None:
    expected = answers(ALONE, "wan_t2v", True, True)
    for found in pair(answers, "wan_t2v", True, True, local_size=1):
        assert all(abs(found[key] - x).max() < 1e-12 for key, x in expected.items())


# From the terminal --------------------------------------------------------------------------------


def test_torchrun_trains_as_the_command_alone_does(tmp_path: Path, root: Path) -> None:
    teacher = str(tiny.save_random_pipeline(tmp_path / "teacher"))
    size = ["--frames", "5", "--height", "16", "--width", "16", "--steps", "4", "--keep", "4"]
    prompt = ["--prompt", "a red circle", "--samples", "3"]
    assert main(["record", str(tmp_path / "clips"), "--teacher", teacher, *prompt, *size]) == 0
    changes = {"train_steps": 2, "batch_size": 2, "lora.rank": 2, "head_width": 16}
    settings = [f"--set={name}={value}" for name, value in changes.items()]

    def arguments(run: str) -> list[str]:
        folders = ["distill", str(tmp_path / "clips"), str(tmp_path / run), "--teacher", teacher]
        return [*folders, "--recipe", "tiny-adversarial-2", *settings]

    assert main(arguments("alone")) == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "accvideo_core.cli", *arguments("two")]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=240, env=os.environ | CPU
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("student after 2 updates") == 1
    rows, expected = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("two", "alone"))
    losses = [row["loss"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-6)
    two, one = (read_safetensors(tmp_path / run / STUDENT_FILE)[0] for run in ("two", "alone"))
    assert two.keys() == one.keys()
    assert all((x - one[name]).abs().max() < 1e-6 for name, x in two.items())

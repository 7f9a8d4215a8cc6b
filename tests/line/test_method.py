"""Every switch of the method in the real training loop: gradients, order of steps, resume."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accvideo_core.conditioning import Prompt
from accvideo_core.distill.adversarial import Adversarial
from accvideo_core.distill.batch import KeyBatch, KeyStates
from accvideo_core.distill.checkpoint import load_checkpoint
from accvideo_core.distill.memory import checkpointed
from accvideo_core.distill.metrics import read_metrics
from accvideo_core.distill.optimiser import Role
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.student import LoraSpec, Student
from accvideo_core.distill.trainer import TrainResult, _learning, _Run, distill
from accvideo_core.errors import AccVideoError
from accvideo_core.models import VideoModel
from accvideo_core.monitor import Progress
from accvideo_core.ranks import ALONE
from accvideo_core.trajectories.record import RecordSpec, record
from accvideo_core.trajectories.store import TrajectoryDataset

RECIPE = Recipe(
    student_steps=2,
    adversarial=True,
    lora=LoraSpec(rank=2),
    train_steps=4,
    batch_size=4,
    lr=1e-2,
    head_lr=1e-2,
    head_width=16,
)


@pytest.fixture(scope="module")
def teacher() -> VideoModel:
    return tiny.video_model()


@pytest.fixture(scope="module")
def dataset(teacher: VideoModel, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryDataset:
    prompts = [
        Prompt.of(f"clip {i}", tiny.condition(1, length=3 + i, seed=10 + i)) for i in range(2)
    ]
    spec = RecordSpec(
        5, 16, 16, samples_per_prompt=3, steps=4, kept=4, batch_size=6, dtype="float32"
    )
    return record(teacher, prompts, spec, tmp_path_factory.mktemp("method") / "clips")


def prepared(
    teacher: VideoModel, dataset: TrajectoryDataset, recipe: Recipe, folder: Path
) -> _Run:
    """A run before its first update, whose adapters are no longer zero."""
    states, info = _learning(teacher, dataset, recipe, None)
    student = Student.create(teacher, info, recipe.seed)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in student.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return _Run(student, teacher, states, recipe, folder, None, ALONE, None)


# Gradients -----------------------------------------------------------------------------------


def separate(model: VideoModel) -> VideoModel:
    """The same network with weights of its own, which keeps every activation."""
    module = copy.deepcopy(model.module)
    module.disable_gradient_checkpointing()  # pyright: ignore
    return replace(model, module=module)


def by_hand(
    run: _Run, batch: KeyBatch, ks: list[int]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of student and heads by three networks and a plain loop; nothing is shared."""
    assert isinstance(run.objective, Adversarial)
    network, of_fake, of_real = (
        separate(model) for model in (run.student.model, run.student.teacher, run.student.teacher)
    )
    heads = copy.deepcopy(run.objective.heads)
    weights = [p for p in network.module.parameters() if p.requires_grad]
    l, t, cond = batch.latents, batch.t, batch.cond  # noqa: E741
    loss_student = loss_heads = torch.zeros(())
    for k in ks:
        target = (l[k] - l[k + 1]) / (t[k] - t[k + 1])
        regression = (network.velocity(l[k + 1], t[k + 1], cond) - target).square().mean()
        x = batch.z
        for j in range(len(t) - 2, k, -1):
            with torch.no_grad():
                x = x + (t[j] - t[j + 1]) * network.velocity(x, t[j + 1], cond)
        x = x + (t[k] - t[k + 1]) * network.velocity(x, t[k + 1], cond)
        (head,) = heads.of(k)
        fake = of_fake.features(x, t[k], cond, heads.blocks[k])[0]
        real = of_real.features(l[k], t[k], cond, heads.blocks[k])[0].detach()
        loss_student = loss_student + regression + 0.1 * F.softplus(-head(fake)).mean()
        judged = F.softplus(-head(real)).mean() + F.softplus(head(fake.detach())).mean()
        loss_heads = loss_heads + judged
    share = 1 / len(ks)
    student = torch.autograd.grad(share * loss_student, weights, retain_graph=True)
    judges = torch.autograd.grad(
        share * loss_heads, list(heads.parameters()), allow_unused=True
    )
    return list(student), list(judges)


def assert_close(found: Mapping[str, nn.Parameter], expected: list[Tensor | None]) -> None:
    """To 1e-5 of every weight's largest gradient."""
    largest = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    for (name, p), gradient in zip(found.items(), expected, strict=True):
        if gradient is None:
            assert p.grad is None, name
            continue
        assert p.grad is not None and gradient.abs().max() > 0, name
        # Attention is blind to what is added to all keys: that gradient is nothing but rounding.
        size = largest if name.endswith("to_k.bias") else float(gradient.abs().max())
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-5 * size, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [LoraSpec(rank=2), None], ids=["lora", "full"])
@pytest.mark.parametrize("iteration", ["interval", "sweep"])
def test_gradients_of_an_update_equal_those_of_three_separate_networks(
    teacher: VideoModel,
    dataset: TrajectoryDataset,
    tmp_path: Path,
    checkpointing: bool,
    lora: LoraSpec | None,
    iteration: str,
) -> None:
    recipe = replace(
        RECIPE, iteration=iteration, lora=lora, accumulate=2, gradient_checkpointing=checkpointing
    )
    run = prepared(teacher, dataset, recipe, tmp_path)
    batch = run.batch("")
    for ks in [[1, 0]] if iteration == "sweep" else [[1], [0]]:
        student, heads = by_hand(run, batch, ks)
        with ExitStack() as stack:
            for model in (run.student.model, teacher) if checkpointing else ():
                stack.enter_context(checkpointed(model))
            for phase in run.objective.phases:
                run.accumulate(phase.terms, batch, ks)
        assert_close(run.roles["student"].parameters, student)
        assert_close(run.roles["heads"].parameters, heads)
        for role in run.roles.values():
            role.optimizer.zero_grad()
    assert all(p.grad is None for p in teacher.module.parameters())


# The order of steps --------------------------------------------------------------------------


def steps_of(
    run: _Run, updates: int, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, tuple[float, ...]]]:
    """(role, what the student's first weight was before it) of every optimiser step."""
    names = {id(role): name for name, role in run.roles.items()}
    weight = next(iter(run.roles["student"].parameters.values()))
    taken: list[tuple[str, tuple[float, ...]]] = []
    step = Role.step

    def spy(role: Role, factor: float) -> None:
        taken.append((names[id(role)], tuple(weight.flatten().tolist())))
        step(role, factor)

    monkeypatch.setattr(Role, "step", spy)
    for _ in range(updates):
        run.update()
    return taken


@pytest.mark.parametrize(
    ("change", "order"),
    [
        ({}, "student heads"),
        ({"updates": "separate"}, "student student heads"),
        ({"head_updates": 3}, "heads heads student heads"),
        ({"updates": "separate", "head_updates": 2}, "heads student student heads"),
        ({"iteration": "sweep"}, "student heads"),
        ({"adversarial": False, "head_updates": 3}, "student"),
    ],
    ids=str,
)
def test_optimiser_steps_of_an_update(
    teacher: VideoModel,
    dataset: TrajectoryDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    order: str,
) -> None:
    run = prepared(teacher, dataset, replace(RECIPE, **change), tmp_path)
    taken = steps_of(run, 2, monkeypatch)
    assert [name for name, _ in taken] == 2 * order.split()
    # Each of the student's steps starts from where the one before it led.
    begun = [weight for name, weight in taken if name == "student"]
    assert len(set(begun)) == len(begun)


def test_separate_updates_judge_fakes_of_the_guided_student(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    """Algorithm 1: L_traj moves the student first, and its fakes are then rolled anew."""
    recipe = replace(RECIPE, updates="separate", adv_weight=0.0, weight_decay=0.0, clip=None)
    run = prepared(teacher, dataset, recipe, tmp_path)
    twin = prepared(teacher, dataset, replace(recipe, adversarial=False), tmp_path)
    batch = run.batch("")
    twin.update()
    row = run.update()
    assert isinstance(run.objective, Adversarial)
    # k = m - 1: one step from noise, by the student that one step of L_traj has moved.
    fresh = prepared(teacher, dataset, recipe, tmp_path)
    assert isinstance(fresh.objective, Adversarial)
    for student, same in ((twin.student, True), (fresh.student, False)):
        term = next(fresh.objective.game(student, batch, 1))
        assert (term.loss.item() == pytest.approx(row["generator"], rel=1e-5)) == same


def test_further_head_updates_read_batches_of_their_own(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    run = prepared(teacher, dataset, replace(RECIPE, head_updates=3), tmp_path)
    noises = {run.batch(phase.draw).z.sum().item() for phase in run.objective.phases}
    assert len(noises) == 3
    assert run.batch("").z.sum() == run.states.batch(4, 0, 0, torch.device("cpu")).z.sum()


# What a row of the metrics holds ---------------------------------------------------------------


def test_a_sweeps_figures_are_named_by_key_time(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    sweep = prepared(teacher, dataset, replace(RECIPE, iteration="sweep", accumulate=2), tmp_path)
    row = sweep.update()
    each = ("trajectory", "generator", "discriminator", "real_accuracy", "fake_accuracy")
    assert set(row) == {
        *("step", "lr", "loss", "student_grad_norm", "heads_grad_norm", *each),
        *(f"{name}_k{k}" for name in each for k in (0, 1)),
    }
    for name in each:
        assert row[name] == pytest.approx((row[f"{name}_k0"] + row[f"{name}_k1"]) / 2)
    assert row["loss"] == pytest.approx(row["trajectory"] + 0.1 * row["generator"])
    # The figures of one key time are those of an update on it alone.
    alone = prepared(teacher, dataset, RECIPE, tmp_path).update()
    assert alone["k"] == 1 and not any("_k" in name for name in alone)
    for name in each:
        assert alone[name] == pytest.approx(row[f"{name}_k1"], rel=1e-5)


# A run with every switch -----------------------------------------------------------------------

ALL = replace(
    RECIPE,
    accumulate=2,
    rollout="queued",
    updates="separate",
    head_updates=2,
    heads="shared",
    head_kind="spatial_temporal",
    head_conditioning=True,
    r1="features",
    r1_weight=1.0,
    feature_blocks=(1, 3),
    clean_time_shift=12.0,
    trajectories=5,
    gan_loss="hinge",
    ema=0.5,
    checkpoint_every=3,
)


def assert_same(a: TrainResult, b: TrainResult) -> None:
    mine, other = a.student.state_dict(), b.student.state_dict()
    assert all(torch.equal(x, other[name]) for name, x in mine.items())
    rows = [read_metrics(result.metrics_file) for result in (a, b)]
    assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]


@pytest.mark.parametrize("iteration", ["interval", "sweep"])
def test_killed_with_full_queues_and_resumed_equals_uninterrupted(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path, iteration: str
) -> None:
    """m = 2, so fakes wait after every odd update; a checkpoint falls on one."""
    recipe = replace(ALL, iteration=iteration)

    def kill(progress: Progress) -> None:
        if progress.step == 3:
            shutil.copytree(tmp_path / "whole", tmp_path / "killed")

    whole = distill(teacher, dataset, recipe, tmp_path / "whole", monitor=kill)
    assert len(set(whole.losses)) == recipe.train_steps
    found = load_checkpoint(tmp_path / "killed")
    assert found is not None and found[0] == 3
    if iteration == "interval":
        waiting = found[1]["objective"]
        assert waiting["x"].shape == (4, *dataset.info.shape)
        assert waiting["level"].tolist() == [1] * 4 and waiting["born"].tolist() == [2] * 4
    else:  # the last key time of a sweep takes all that waits
        assert "objective" not in found[1]
    seen: list[int] = []
    resumed = distill(
        teacher, dataset, recipe, tmp_path / "killed", monitor=lambda p: seen.append(p.step)
    )
    assert seen == [4]
    assert_same(resumed, whole)


def test_queued_and_direct_rollouts_differ_once_the_student_has_moved(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    rows = {}
    for rollout in ("direct", "queued"):
        run = prepared(teacher, dataset, replace(RECIPE, rollout=rollout), tmp_path)
        rows[rollout] = [run.update() for _ in range(2)]
    assert rows["queued"][0] == rows["direct"][0]
    assert rows["queued"][1]["trajectory"] == rows["direct"][1]["trajectory"]
    assert rows["queued"][1]["generator"] != rows["direct"][1]["generator"]


# Refusals --------------------------------------------------------------------------------------


def test_the_first_trajectories_by_id(teacher: VideoModel, dataset: TrajectoryDataset) -> None:
    times = RECIPE.times(dataset.info.time_grid)
    assert KeyStates(dataset, times, 4).ids == dataset.ids()[:4]
    assert KeyStates(dataset, times).ids == dataset.ids()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trajectories": 7}, "trajectories is 7, but dataset 'clips' holds 6; ask for fewer"),
        ({"feature_blocks": (0, 4)}, "holds 4, but this network's blocks are 0 to 3"),
        ({"lora": LoraSpec(rank=33)}, "rank 33 is more than the width 32"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_before_the_run_exists(
    teacher: VideoModel,
    dataset: TrajectoryDataset,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(AccVideoError, match=message):
        distill(teacher, dataset, replace(RECIPE, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()

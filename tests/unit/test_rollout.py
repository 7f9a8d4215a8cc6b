"""Algorithm 1's queues against the direct rollout of the same noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import analytic
import pytest
import torch
from torch import Tensor, nn

from accvideo_core.conditioning import Condition
from accvideo_core.distill.batch import KeyBatch, KeyStates
from accvideo_core.distill.checkpoint import load_checkpoint, save_checkpoint
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.rollout import (
    DirectRollout,
    QueuedRollout,
    Rollout,
    build_rollout,
    euler,
    generate,
    roll,
)
from accvideo_core.distill.student import Student, StudentInfo
from accvideo_core.models import VideoModel
from accvideo_core.trajectories.record import RecordSpec, record

STEPS = 3
CPU = torch.device("cpu")


class Prompted(nn.Module):
    """A student v = slope x + the prompt's number, with one slope for all key times."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))
        self.asked: list[float] = []

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.asked.append(round(float(t[0]), 4))
        assert cond.pooled is not None
        return self.slope * x + cond.pooled[:, 0].reshape(-1, 1, 1, 1, 1)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> KeyStates:
    spec = RecordSpec(
        5, 16, 16, samples_per_prompt=2, steps=STEPS, kept=STEPS, batch_size=16, dtype="float32"
    )
    folder = tmp_path_factory.mktemp("rollout") / "data"
    dataset = record(analytic.gaussian_model(), analytic.prompts(8, offsets=True), spec, folder)
    return KeyStates(dataset, dataset.info.time_grid)


@pytest.fixture
def student(states: KeyStates) -> Student:
    teacher = analytic.gaussian_model()
    info = StudentInfo(
        family="analytic",
        base=teacher.fingerprint,
        key_times=states.t[::-1],
        guidance=None,
        lora=None,
        latent_spec=analytic.SPEC,
        frames=5,
        height=16,
        width=16,
    )
    return Student(VideoModel(Prompted(), analytic.ANALYTIC, analytic.SPEC), info, teacher)


def drawn(states: KeyStates, step: int, size: int = 4) -> KeyBatch:
    return replace(states.batch(size, 0, step, CPU), step=step)


def interval(step: int) -> int:
    """The k whose turn it is."""
    return STEPS - 1 - step % STEPS


def waiting(queue: QueuedRollout) -> list[int]:
    return [len(q) for q in queue.queues]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_fakes_of_a_frozen_student_are_those_of_a_direct_rollout(
    states: KeyStates, student: Student, parts: int
) -> None:
    """Three rollouts of three updates each: same latents, prompts and real ones, bit for bit."""
    queue = QueuedRollout(states, limit=8)
    for step in range(3 * STEPS):
        k, batch = interval(step), drawn(states, step)
        started = drawn(states, step - step % STEPS)
        for part, begun in zip(batch.split(parts), started.split(parts), strict=True):
            fakes = queue(student, part, k)
            direct = DirectRollout()(student, begun, k)
            assert torch.equal(fakes.latents, direct.latents)
            assert fakes.batch.records == begun.records
            assert torch.equal(fakes.batch.latents, begun.latents)
            assert torch.equal(fakes.batch.cond.text, begun.cond.text)
            assert torch.equal(fakes.batch.z, (begun if k == STEPS - 1 else part).z)
        expected = [0] * (STEPS + 1)
        expected[k] = 4 if k else 0
        assert waiting(queue) == expected


@pytest.mark.parametrize("parts", [1, 2])
def test_a_sweep_rolls_its_own_noise_through_the_queues(
    states: KeyStates, student: Student, parts: int
) -> None:
    queue = QueuedRollout(states, limit=8)
    for step in range(2):
        batch = drawn(states, step)
        for k in range(STEPS - 1, -1, -1):
            for part in batch.split(parts):
                fakes = queue(student, part, k)
                assert torch.equal(fakes.latents, generate(student, part, k))
                assert fakes.batch.records == part.records


def test_an_update_costs_one_step_and_the_direct_rollout_up_to_m(
    states: KeyStates, student: Student
) -> None:
    asked: list[float] = student.model.module.asked  # pyright: ignore
    rollouts: list[Rollout] = [QueuedRollout(states, limit=8), DirectRollout()]
    for rollout, calls in zip(rollouts, ([1, 1, 1], [1, 2, 3]), strict=True):
        for step in range(STEPS):
            asked.clear()
            rollout(student, drawn(states, step), interval(step))
            assert len(asked) == calls[step]
            assert asked[-1] == round(states.t[interval(step) + 1], 4)


def test_the_gradient_goes_through_the_last_step_alone(states: KeyStates, student: Student) -> None:
    queue = QueuedRollout(states, limit=8)
    x = drawn(states, 0).z
    for step in range(STEPS):
        k, batch = interval(step), drawn(states, step)
        fakes = queue(student, batch, k)
        (gradient,) = torch.autograd.grad(fakes.latents.sum(), student.trainable()["slope"])
        by_hand = (states.t[k] - states.t[k + 1]) * x.sum()
        torch.testing.assert_close(gradient, by_hand)
        x = fakes.latents.detach()


def test_later_steps_are_the_student_of_their_own_update(
    states: KeyStates, student: Student
) -> None:
    queue, slope = QueuedRollout(states, limit=8), student.trainable()["slope"]
    begun = drawn(states, 0)
    x = begun.z
    for step, value in enumerate((0.3, -0.4, 0.9)):
        with torch.no_grad():
            slope.fill_(value)
        x = euler(student, x, begun, interval(step)).detach()
        fakes = queue(student, drawn(states, step), interval(step))
        assert torch.equal(fakes.latents, x)


def test_looking_at_fakes_leaves_them_waiting(states: KeyStates, student: Student) -> None:
    queue, alone = QueuedRollout(states, limit=8), QueuedRollout(states, limit=8)
    for step in range(2 * STEPS):
        k, batch = interval(step), drawn(states, step)
        looked = [queue(student, part, k, advance=False).latents for part in batch.split(2)]
        fakes = queue(student, batch, k)
        assert torch.equal(torch.cat(looked), fakes.latents)
        assert torch.equal(alone(student, batch, k).latents, fakes.latents)
        assert waiting(queue) == waiting(alone)


def test_looking_at_rolled_fakes_leaves_nothing(states: KeyStates, student: Student) -> None:
    """Further batches of the heads do not mix with the fakes on their way."""
    queue, batch = QueuedRollout(states, limit=8), drawn(states, 0)
    for k in range(STEPS):
        fakes = queue(student, batch, k, advance=False)
        assert torch.equal(fakes.latents, generate(student, batch, k))
        assert not any(waiting(queue))


def test_queues_are_bounded_and_lose_the_oldest(states: KeyStates, student: Student) -> None:
    queue = QueuedRollout(states, limit=6)
    batches = [drawn(states, step) for step in (10, 11, 12)]
    for batch in batches:  # three times the same key interval: more comes in than goes out
        queue(student, batch, STEPS - 1)
    assert waiting(queue) == [0, 0, 6, 0]
    fakes = queue(student, drawn(states, 12), STEPS - 2)
    assert fakes.batch.records == batches[1].records[2:] + batches[2].records[:2]


@pytest.mark.parametrize(("late", "kept"), [(STEPS - 1, True), (STEPS, False)])
def test_fakes_of_an_earlier_student_are_dropped(
    states: KeyStates, student: Student, late: int, kept: bool
) -> None:
    """Noise drawn m updates ago belongs to a rollout that is over; fresh noise replaces it."""
    queue = QueuedRollout(states, limit=8)
    old, new = drawn(states, 5), drawn(states, 5 + late)
    queue(student, old, STEPS - 1)
    fakes = queue(student, new, STEPS - 2)
    source = old if kept else new
    assert fakes.batch.records == source.records
    assert torch.equal(fakes.latents, generate(student, source, STEPS - 2))
    assert waiting(queue) == [0, 4, 0, 0]


def test_an_empty_queue_rolls_the_batchs_own_noise(states: KeyStates, student: Student) -> None:
    batch = drawn(states, 0)
    fakes = QueuedRollout(states, limit=8)(student, batch, 0)
    assert torch.equal(fakes.latents, generate(student, batch, 0)) and fakes.batch is batch
    assert torch.equal(roll(student, batch, STEPS), batch.z)


def test_the_queues_survive_a_checkpoint(
    states: KeyStates, student: Student, tmp_path: Path
) -> None:
    queue = QueuedRollout(states, limit=8)
    for step in range(2):
        queue(student, drawn(states, step), interval(step))
    queue(student, drawn(states, 1, size=2), STEPS - 1)
    assert waiting(queue) == [0, 4, 2, 0]
    save_checkpoint(tmp_path, 2, {"objective": queue.state_dict()}, keep=1)
    found = load_checkpoint(tmp_path)
    assert found is not None
    other = QueuedRollout(states, limit=8)
    other(student, drawn(states, 7), STEPS - 1)
    other.load_state_dict(found[1]["objective"])
    assert waiting(other) == waiting(queue)
    for k, size in ((0, 4), (1, 2)):
        one, two = (q(student, drawn(states, 2, size), k) for q in (queue, other))
        assert torch.equal(one.latents, two.latents)
        assert one.batch.records == two.batch.records
    assert QueuedRollout(states, limit=8).state_dict() == {}
    other.load_state_dict({})
    assert not any(waiting(other))


def test_the_recipe_chooses(states: KeyStates) -> None:
    assert isinstance(build_rollout(Recipe(), states), DirectRollout)
    queued = build_rollout(Recipe(rollout="queued", batch_size=4), states)
    assert isinstance(queued, QueuedRollout) and queued.queues[0].maxlen == 8

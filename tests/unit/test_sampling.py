"""The sampler against closed-form solutions, and its manners: cancel, preview, bad input."""

from __future__ import annotations

import pytest
import torch

from accvideo_core.conditioning import Condition
from accvideo_core.errors import AccVideoError
from accvideo_core.flow import euler_states, time_grid
from accvideo_core.latents import seeded_noise
from accvideo_core.monitor import Cancelled, Progress
from accvideo_core.sampling import SamplePlan, sample
from tests import analytic

KEYS = time_grid(5, 3.0)


def noise(batch: int = 4) -> torch.Tensor:
    return seeded_noise((batch, 2, 2, 2, 2), "sampling").double()


@pytest.mark.parametrize(
    ("model", "exact"),
    [
        (analytic.gaussian_model(), analytic.exact_gaussian_state),
        (analytic.mixture_model(), analytic.exact_mixture_state),
    ],
    ids=["gaussian", "mixture"],
)
def test_exact_states_solve_the_flow(model, exact):
    # The reference itself: its time derivative is the model's velocity.
    x_1, h = noise(), 1e-5
    for t in KEYS[1:-1]:
        slope = (exact(x_1, t + h) - exact(x_1, t - h)) / (2 * h)
        v = model.velocity(exact(x_1, t), t, analytic.condition(4))
        assert torch.allclose(slope, v, atol=1e-5)


def test_gaussian_end_points_and_key_states_converge():
    model, cond, x_1 = analytic.gaussian_model(), analytic.condition(4), noise()

    def key_states(steps: int) -> list[torch.Tensor]:
        grid = time_grid(steps, 3.0)
        states = euler_states(lambda x, t: model.velocity(x, t, cond), x_1, grid)
        return list(states)[:: steps // 5]

    coarse, fine = key_states(200), key_states(400)
    for t, x, better in zip(KEYS, coarse, fine, strict=True):
        exact = analytic.exact_gaussian_state(x_1, t)
        assert torch.allclose(better, exact, atol=1e-2)
        # Richardson: without its first-order error, Euler's method is far nearer still.
        assert torch.allclose(2 * better - x, exact, atol=5e-4)
    assert torch.equal(sample(model, cond, x_1, time_grid(400, 3.0)), fine[-1])


def test_mixture_end_points_are_the_modes_and_key_states_converge():
    model, cond, x_1 = analytic.mixture_model(), analytic.condition(4), noise()
    fine = time_grid(2000, 3.0)
    states = list(euler_states(lambda x, t: model.velocity(x, t, cond), x_1, fine))
    for i, t in enumerate(KEYS[:-1]):
        assert torch.allclose(states[400 * i], analytic.exact_mixture_state(x_1, t), atol=5e-3)
    assert torch.allclose(sample(model, cond, x_1, fine), torch.sign(x_1), atol=1e-4)


def test_one_step_of_the_mixture_is_the_mean():
    # At t = 1 the velocity knows nothing of x_0: v = x_1 - 0, so one step lands on the mean, 0.
    x = sample(analytic.mixture_model(), analytic.condition(4), noise(), (1.0, 0.0))
    assert x.abs().max() < 1e-12


def test_parts_of_a_batch_and_the_whole_agree():
    model, x_1 = analytic.gaussian_model(), noise(5)
    cond = Condition.cat([analytic.condition(offset=float(i)) for i in range(5)])
    whole = sample(model, cond, x_1, KEYS)
    for size in (1, 2, 5, 9):
        assert torch.allclose(sample(model, cond, x_1, KEYS, batch_size=size), whole, atol=1e-12)


def test_one_prompt_serves_all_samples():
    model, x_1 = analytic.gaussian_model(), noise(3)
    one = analytic.condition(offset=2.0)
    many = Condition.cat([one] * 3)
    assert torch.equal(sample(model, one, x_1, KEYS), sample(model, many, x_1, KEYS))


def test_every_step_reports_and_previews_the_clean_sample():
    model, cond, x_1 = analytic.gaussian_model(), analytic.condition(4), noise()
    seen: list[Progress] = []
    sample(model, cond, x_1, KEYS, seen.append, batch_size=2)
    assert [(p.stage, p.step, p.total) for p in seen] == [("sample", i, 10) for i in range(1, 11)]
    first = seen[0].preview
    assert first is not None
    # At t = 1 the clean sample that the Gaussian flow points at is the mean.
    assert torch.allclose(first(), torch.full((2, 2, 2, 2, 2), 0.5, dtype=torch.float64))


class CountingModel:
    def __init__(self) -> None:
        self.calls = 0

    def velocity(self, x_t, t, cond):
        self.calls += 1
        return torch.zeros_like(x_t)


@pytest.mark.parametrize("stop", [1, 3])
def test_cancel_stops_before_the_next_step(stop: int):
    model = CountingModel()

    def monitor(progress: Progress) -> None:
        if progress.step == stop:
            raise Cancelled

    with pytest.raises(Cancelled):
        sample(model, analytic.condition(4), noise(), time_grid(50), monitor)
    assert model.calls == stop


def test_inference_mode_gives_plain_tensors_without_graph():
    class Trainable(CountingModel):
        weight = torch.ones((), requires_grad=True)

        def velocity(self, x_t, t, cond):
            return x_t * self.weight

    x_1 = noise().float()
    with torch.inference_mode():
        x = sample(Trainable(), analytic.condition(4), x_1, KEYS)
    assert not x.is_inference() and not x.requires_grad
    assert not sample(Trainable(), analytic.condition(4), x_1, KEYS).requires_grad


def test_noise_is_left_alone_and_low_precision_is_integrated_in_float32():
    x_1 = noise().bfloat16()
    before = x_1.clone()
    x = sample(analytic.gaussian_model(), analytic.condition(4), x_1, KEYS)
    assert torch.equal(x_1, before) and x.dtype == torch.float32


def test_plan_gives_every_prompt_its_own_noise():
    plan, prompts = SamplePlan(5, 16, 16), analytic.prompts(3)
    x = plan.noise(analytic.SPEC, prompts, seed=7, sample=1)
    assert x.shape == (3, 2, 2, 2, 2)
    assert torch.equal(x[2], seeded_noise((2, 2, 2, 2), 7, prompts[2].id, 1))
    with pytest.raises(AccVideoError, match="6 frames do not fit"):
        SamplePlan(6, 16, 16).noise(analytic.SPEC, prompts, seed=7)
    with pytest.raises(AccVideoError, match="no prompts"):
        plan.noise(analytic.SPEC, [], seed=7)


class BrokenModel(CountingModel):
    def velocity(self, x_t, t, cond):
        return x_t / 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": torch.ones(2, 2, 2)}, r"noise has shape \(2, 2, 2\)"),
        ({"noise": noise(0)}, r"noise has shape \(0, 2, 2, 2, 2\)"),
        ({"noise": noise() * float("nan")}, "noise holds NaN"),
        ({"condition": analytic.condition(3)}, "3 prompts for 4 noise samples"),
        ({"times": (0.0, 1.0)}, "must fall strictly"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"model": BrokenModel()}, "sampling gave NaN or infinite"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    good = {
        "model": CountingModel(),
        "condition": analytic.condition(4),
        "noise": noise(),
        "times": KEYS,
    }
    with pytest.raises(AccVideoError, match=message):
        sample(**{**good, **arguments})

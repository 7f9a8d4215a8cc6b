"""Time grids and Euler steps against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from accvideo_core import flow
from accvideo_core.errors import AccVideoError
from accvideo_core.latents import key_generator
from tests import analytic


def test_hunyuan_grid_has_accvideos_key_times():
    grid = flow.time_grid(50, shift=7.0)
    keys = [grid[i] for i in flow.key_indices(50, 5)]
    assert keys == pytest.approx([1, 0.9655, 0.9130, 0.8235, 0.6364, 0], abs=5e-5)
    assert len(grid) == 51 and grid[0] == 1.0 and grid[-1] == 0.0


def test_every_nth_time_of_a_fine_grid_is_the_coarse_grid():
    fine, coarse = flow.time_grid(50, 7.0), flow.time_grid(5, 7.0)
    assert [fine[i] for i in flow.key_indices(50, 5)] == pytest.approx(coarse, abs=1e-15)


def test_shift_one_leaves_the_uniform_grid():
    assert flow.time_grid(4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_shift_is_inverted_by_its_reciprocal():
    for u in (0.0, 0.1, 0.5, 0.99, 1.0):
        assert flow.shift_time(flow.shift_time(u, 7.0), 1 / 7.0) == pytest.approx(u, abs=1e-15)


def test_interpolation_velocity_and_prediction_are_one_straight_line():
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(2, 3, 1, 4, 4, generator=generator, dtype=torch.float64)
    eps = torch.randn(2, 3, 1, 4, 4, generator=generator, dtype=torch.float64)
    v = eps - x_0
    x_t = flow.interpolate(x_0, eps, 0.7)
    assert torch.allclose(flow.euler_step(x_t, v, 0.7, 0.2), flow.interpolate(x_0, eps, 0.2))
    assert torch.allclose(flow.predict_x0(x_t, v, 0.7), x_0)
    per_sample = flow.interpolate(x_0, eps, torch.tensor([0.7, 0.0], dtype=torch.float64))
    assert torch.allclose(per_sample[0], x_t[0]) and torch.equal(per_sample[1], x_0[1])


def test_euler_step_integrates_low_precision_in_float32():
    x = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    stepped = flow.euler_step(x, x, 0.5, 0.499)
    assert stepped.dtype == torch.float32
    assert stepped.item() == pytest.approx(0.999, abs=1e-6)  # bfloat16 would stay at 1


@pytest.mark.parametrize("steps", [8, 50])
def test_euler_states_match_the_discrete_solution_of_a_linear_flow(steps: int):
    # dx/dt = x: every Euler step multiplies by 1 + dt.
    grid = flow.time_grid(steps)
    x_1 = torch.ones(1, dtype=torch.float64)
    states = list(flow.euler_states(lambda x, t: x, x_1, grid))
    assert len(states) == steps + 1
    for i, x in enumerate(states):
        assert x.item() == pytest.approx((1 - 1 / steps) ** i, rel=1e-12)


def test_euler_converges_at_first_order_to_the_gaussian_solution():
    model = analytic.gaussian_model()
    x_1 = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(1, 2, 1, 2, 2)
    exact = analytic.exact_gaussian_state(x_1, 0.0)
    cond = analytic.condition()

    def error(steps: int) -> float:
        *_, x = flow.euler_states(
            lambda x, t: model.velocity(x, t, cond), x_1, flow.time_grid(steps, 3.0)
        )
        return (x - exact).abs().max().item()

    errors = [error(n) for n in (50, 100, 200, 400)]
    assert errors[-1] < 0.01
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert orders == pytest.approx([1, 1, 1], abs=0.1)


def test_edm_and_vp_enter_flow_coordinates():
    generator = torch.Generator().manual_seed(1)
    x_0, eps = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    for sigma in (0.002, 1.0, 700.0):
        x_t, t = flow.edm_to_flow(x_0 + sigma * eps, sigma)
        assert torch.allclose(x_t, flow.interpolate(x_0, eps, t))
    for angle in (0.0, 0.3, math.pi / 2):
        alpha, s = math.cos(angle), math.sin(angle)
        x_t, t = flow.vp_to_flow(alpha * x_0 + s * eps, alpha, s)
        assert torch.allclose(x_t, flow.interpolate(x_0, eps, t))


def test_zero_terminal_snr_is_pure_noise():
    eps = torch.ones(3)
    x_t, t = flow.vp_to_flow(eps, 0.0, 1.0)
    assert t == 1.0 and torch.equal(x_t, eps)


@pytest.mark.parametrize("t", [1.0, 0.999, 0.5, 0.01])
def test_flow_velocity_from_a_variance_preserving_network(t: float):
    x_0, eps = torch.randn(2, 3, 4, 1, 1, 1, dtype=torch.float64, generator=key_generator("vp"))
    alpha, s = flow.vp_levels(torch.full((3,), t, dtype=torch.float64))
    assert torch.allclose(alpha**2 + s**2, torch.ones(3, dtype=torch.float64))
    a, b = float(alpha[0]), float(s[0])
    x_t, time = flow.vp_to_flow(a * x_0 + b * eps, a, b)
    assert time == pytest.approx(t) and torch.allclose(x_t, flow.interpolate(x_0, eps, t))
    v = flow.flow_from_vp_v(x_t, a * eps - b * x_0, torch.full((3,), t, dtype=torch.float64))
    assert torch.allclose(v, eps - x_0)


def test_find_times_by_value_not_by_position():
    grid = flow.time_grid(50, 7.0)
    assert flow.find_times(grid, flow.time_grid(5, 7.0)) == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow.time_grid(0), "steps is 0"),
        (lambda: flow.time_grid(5, -1.0), "shift is -1.0"),
        (lambda: flow.key_indices(50, 3), r"3 student steps do not divide the 50 .*\[1, 2, 5, 10"),
        (lambda: flow.validate_times([1.0]), "must fall strictly"),
        (lambda: flow.validate_times([1.0, 1.0, 0.0]), "must fall strictly"),
        (lambda: flow.validate_times([1.1, 0.0]), "must fall strictly"),
        (lambda: flow.validate_times([1.0, float("nan"), 0.0]), "must fall strictly"),
        (lambda: flow.find_times([1.0, 0.5, 0.0], [0.7]), "key time 0.7000 is not among"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(AccVideoError, match=message):
        call()

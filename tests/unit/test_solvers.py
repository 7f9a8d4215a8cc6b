"""Solvers against closed forms and against the arithmetic of other samplers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from accvideo_core.conditioning import Condition
from accvideo_core.errors import AccVideoError
from accvideo_core.flow import time_grid
from accvideo_core.latents import seeded_noise
from accvideo_core.monitor import Progress
from accvideo_core.presets import PRESETS, preset
from accvideo_core.sampling import sample
from accvideo_core.solvers import SOLVERS, renoise_states, unipc_states
from tests import analytic

MEAN, STD = 0.5, 0.25


def noise(batch: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return seeded_noise((batch, 2, 2, 2, 2), "solvers").to(dtype)


def gaussian(x: Tensor, t: float) -> Tensor:
    return analytic.gaussian_model(MEAN, STD, x.dtype).velocity(x, t, analytic.condition(len(x)))


def consistency(x: Tensor, t: float) -> Tensor:
    """The velocity that points from x at the end of its own exact trajectory."""
    spread = math.sqrt(((1 - t) * STD) ** 2 + t**2)
    return (x - (MEAN + STD / spread * (x - (1 - t) * MEAN))) / t


@pytest.mark.parametrize("one", PRESETS.values(), ids=list(PRESETS))
def test_every_preset_lands_on_a_single_point(one):
    # All data is 0.3, so v = (x - 0.3) / t is exact and no solver has anything to lose.
    class Point:
        times: list[float] = []

        def velocity(self, x_t, t, cond):
            self.times.append(t)
            return (x_t - 0.3) / t

    model = Point()
    x = sample(model, analytic.condition(4), noise(), one.times, solver=one.solver)
    assert (x - 0.3).abs().max() < 1e-9
    assert tuple(model.times) == one.times[:-1]  # Asked at these times, and at no others.


def flow_match_discrete(velocity: Callable[[Tensor, float], Tensor], x: Tensor) -> Tensor:
    """aejion/AccVideo, FlowMatchDiscreteScheduler: 5 steps, shift 7, Euler, float32."""
    sigmas = torch.linspace(1, 0, 6)
    sigmas = (7.0 * sigmas) / (1 + (7.0 - 1) * sigmas)
    timesteps = (sigmas[:-1] * 1000).float()
    for i, t in enumerate(timesteps):
        x = x.float() + velocity(x, float(t) / 1000).float() * (sigmas[i + 1] - sigmas[i])
    return x


def test_accvideo_preset_equals_the_official_scheduler():
    x_1 = noise(dtype=torch.float32)
    model = analytic.gaussian_model(MEAN, STD, torch.float32)
    ours = sample(model, analytic.condition(4), x_1, preset("accvideo-hunyuan-5").times)
    assert torch.allclose(ours, flow_match_discrete(gaussian, x_1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["accvideo-hunyuan-5", "accvideo-wan-i2v-10", "lightx2v-wan21-4"])
def test_euler_equals_diffusers_with_explicit_sigmas(name: str):
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    times, x = preset(name).times, noise(dtype=torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=list(times[:-1]))
    *_, ours = SOLVERS["euler"](gaussian, x, times, 0)
    for t in scheduler.timesteps:
        x = scheduler.step(gaussian(x, float(t) / 1000), t, x, return_dict=False)[0]
    assert torch.allclose(ours, x, rtol=0, atol=1e-6)


def test_unipc_equals_diffusers_with_explicit_sigmas():
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    times, x = preset("accvideo-wan-t2v-10-unipc").times, noise(dtype=torch.float32)
    *_, ours = unipc_states(gaussian, x, times)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(sigmas=np.array(times[:-1]))
    assert scheduler.sigmas.tolist() == pytest.approx(times, abs=1e-6)
    for t, label in zip(times, scheduler.timesteps, strict=False):
        x = scheduler.step(gaussian(x, t), label, x, return_dict=False)[0]
    assert torch.allclose(ours, x, rtol=0, atol=1e-6)


def unipc_by_hand(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times) -> Tensor:
    """UniPC-2 with B2(h) = e^h - 1 (arXiv 2302.04867, Algorithms 1 and 2), written out.

    In lambda = log((1 - t) / t), with m the clean sample that v points at, d = e^{-h} - 1:
    x' = t'/t x - (1 - t') d (m + half of the slope of m), corrected once m' is known.
    """

    def lam(t: float) -> float:
        return math.log((1 - t) / t) if t > 0 else math.inf

    older = last = None  # (lambda, m) of the two steps before; (x, t) of the last one.
    for t, t_next in pairwise(times):
        m = x - t * velocity(x, t)
        if last is not None:
            x0, t0, m0 = last
            h = lam(t) - lam(t0)
            d = math.expm1(-h)
            base = t / t0 * x0 - (1 - t) * d * m0
            if older is None:
                x = base - (1 - t) * d * 0.5 * (m - m0)
            else:
                r = (older[0] - lam(t0)) / h
                phi = d / -h - 1
                first, second = phi / d, (phi / -h - 0.5) * 2 / d
                # Coefficients c of the slopes D at (r, 1): sum c = first, sum c r = second.
                c_old = (first - second) / (1 - r)
                c_new = first - c_old
                x = base - (1 - t) * d * (c_old * (older[1] - m0) / r + c_new * (m - m0))
            older = (lam(t0), m0)
        last = (x, t, m)
        h = lam(t_next) - lam(t)
        d = math.expm1(-h)
        slope = 0.0
        if older is not None and t_next > times[-1]:
            slope = 0.5 * (older[1] - m) / ((older[0] - lam(t)) / h)
        x = t_next / t * x - (1 - t_next) * d * (m + slope)
    return x


@pytest.mark.parametrize("name", ["accvideo-wan-t2v-10-unipc", "accvideo-wan-i2v-10-unipc"])
def test_unipc_is_the_papers_algorithm(name: str):
    times = preset(name).times
    *_, ours = unipc_states(gaussian, noise(), times)
    assert torch.allclose(ours, unipc_by_hand(gaussian, noise(), times), rtol=0, atol=1e-9)


def test_unipc_converges_faster_than_eulers_method():
    x_1 = noise()
    exact = analytic.exact_gaussian_state(x_1, 0.0, MEAN, STD)

    def error(solver: str, steps: int) -> float:
        *_, x = SOLVERS[solver](gaussian, x_1, time_grid(steps, 3.0), 0)
        return float((x - exact).abs().max())

    assert error("euler", 40) / error("euler", 80) == pytest.approx(2, rel=0.1)
    assert error("unipc", 40) / error("unipc", 80) > 3.5  # Of order 2 at least.
    assert error("unipc", 80) < error("euler", 80) / 10


def test_renoise_mixes_the_clean_sample_with_fresh_unit_noise():
    # ComfyUI's lcm on a flow model: x = sigma' noise + (1 - sigma') denoised.
    x_1, times = noise(256), preset("rcm-wan-4").times
    states = list(renoise_states(gaussian, x_1, times, seed=3))
    fresh = [x_1]
    for (x, x_next), (t, t_next) in zip(pairwise(states), pairwise(times), strict=True):
        denoised = x - t * gaussian(x, t)
        if t_next:
            fresh.append((x_next - (1 - t_next) * denoised) / t_next)
        else:
            assert torch.allclose(x_next, denoised)
    drawn = torch.stack([eps.flatten() for eps in fresh])
    assert drawn.std(dim=1).sub(1).abs().max() < 0.05
    assert (torch.corrcoef(drawn) - torch.eye(4)).abs().max() < 0.06


def test_renoise_with_a_perfect_consistency_model_gives_the_data():
    *_, x = renoise_states(consistency, noise(512), preset("fastwan-3").times)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(x.std()) == pytest.approx(STD, abs=0.01)


def test_renoise_does_not_depend_on_the_batch():
    model, times = analytic.gaussian_model(MEAN, STD), preset("fastwan-3").times
    x_1 = noise(5)
    cond = Condition.cat([analytic.condition(offset=float(i)) for i in range(5)])
    whole = sample(model, cond, x_1, times, solver="renoise", seed=7)
    for size in (1, 2, 3):
        parts = sample(model, cond, x_1, times, batch_size=size, solver="renoise", seed=7)
        assert torch.allclose(parts, whole, atol=1e-12)
    order = [3, 0, 4]
    some = sample(model, cond.select(order), x_1[order], times, solver="renoise", seed=7)
    assert torch.allclose(some, whole[order], atol=1e-12)
    other = sample(model, cond, x_1, times, solver="renoise", seed=8)
    assert (other - whole).abs().max() > 0.01


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_step_previews_what_the_velocity_points_at(solver: str):
    seen: list[Progress] = []
    times = (1.0, 0.8, 0.4, 0.0)
    model, cond = analytic.gaussian_model(MEAN, STD), analytic.condition(4)
    x = sample(model, cond, noise(), times, seen.append, solver=solver)
    assert [p.step for p in seen] == [1, 2, 3]
    previews = [p.preview() for p in seen if p.preview is not None]
    assert torch.allclose(previews[0], torch.full_like(x, MEAN))
    assert torch.allclose(previews[2], x, atol=0.05)


def test_a_first_time_below_one_starts_at_that_much_noise():
    class Still:
        def velocity(self, x_t, t, cond):
            return torch.zeros_like(x_t)

    x = sample(Still(), analytic.condition(4), noise(), (0.9, 0.5))
    assert torch.allclose(x, 0.9 * noise())


@pytest.mark.parametrize("solver", SOLVERS)
def test_low_precision_is_solved_in_float32(solver: str):
    x_1 = noise().bfloat16()
    before = x_1.clone()
    states = list(SOLVERS[solver](lambda x, t: x.bfloat16(), x_1, (1.0, 0.5, 0.0), 0))
    assert torch.equal(x_1, before) and states[-1].dtype == torch.float32


def test_unknown_solver_is_one_sentence():
    with pytest.raises(AccVideoError, match="'heun' is unknown; choose one of: euler, renoise, u"):
        sample(analytic.gaussian_model(), analytic.condition(), noise(1), (1.0, 0.0), solver="heun")

"""Our times, solvers and presets against the official schedulers, over one fixed velocity field."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from accvideo_core.conditioning import Condition
from accvideo_core.flow import Times, key_indices, time_grid
from accvideo_core.models import FAMILIES
from accvideo_core.presets import preset
from accvideo_core.sampling import sample
from accvideo_core.solvers import solver_named
from scripts.parity.regenerate import Tensors, load_reference, velocity

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-6


def reference(name: str) -> Tensors:
    return load_reference(DATA / f"sampler_{name}.safetensors")[0]


class Field:
    """The velocity field as a model that is asked at `times`, whatever the solver calls them."""

    def __init__(self, asked: dict[float, float]) -> None:
        self.asked = asked

    def velocity(self, x_t: Tensor, t: float | Tensor, cond: Condition | None = None) -> Tensor:
        return velocity(x_t, self.asked[float(t)])


def field(times: Times, timesteps: Tensor) -> Field:
    """Asked as the official code asks: some schedulers drop the fraction of their timesteps."""
    return Field(dict(zip(times, (timesteps.double() / 1000).tolist(), strict=False)))


def gap(times: Times, sigmas: Tensor) -> float:
    """Largest difference between our times and the official sigmas."""
    assert len(times) == len(sigmas)
    return float((torch.tensor(times, dtype=torch.float64) - sigmas).abs().max())


def test_hunyuan_videos_times_are_accvideos():
    theirs = reference("accvideo")
    times = time_grid(5, 7.0)
    assert gap(times, theirs["sigmas"]) <= TOLERANCE
    assert gap(times[:-1], theirs["timesteps"] / 1000) <= TOLERANCE
    grid = time_grid(50, 7.0)
    assert gap(tuple(grid[i] for i in key_indices(50, 5)), theirs["sigmas"]) <= TOLERANCE
    assert gap(preset("accvideo-hunyuan-5").times, theirs["sigmas"]) <= TOLERANCE


def test_our_sampler_takes_accvideos_steps():
    theirs = reference("accvideo")
    times = time_grid(5, 7.0)
    model = field(times, torch.tensor(times[:-1]) * 1000)
    states = list(solver_named("euler")(model.velocity, theirs["states"][0], times, 0))
    assert (torch.stack(states) - theirs["states"]).abs().max() <= TOLERANCE
    condition = Condition(torch.zeros(1, 1, 1))
    ours = sample(model, condition, theirs["states"][0], times)
    assert (ours - theirs["states"][-1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_our_presets_are_accvideos_for_wan(kind: str, solver: str):
    theirs = reference(f"accvideo_wan_{kind}_{solver}")
    chosen = preset(f"accvideo-wan-{kind}-10" + ("-unipc" if solver == "unipc" else ""))
    assert chosen.solver == solver
    assert gap(chosen.times, theirs["sigmas"]) <= TOLERANCE
    check_states(chosen.times, theirs, solver)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_wans_grid_and_solver_are_the_official_ones(kind: str):
    # The grid is that of Wan's DPM++; its UniPC starts at .999 before the shift.
    times = FAMILIES[f"wan_{kind}"].time_grid(size=(480, 832) if kind == "i2v" else (720, 1280))
    assert gap(times, reference(f"wan_{kind}_dpm")["sigmas"]) <= TOLERANCE
    theirs = reference(f"wan_{kind}_unipc")
    assert gap(times, theirs["sigmas"]) < 4e-4
    check_states(tuple(theirs["sigmas"].tolist()), theirs, "unipc")


def check_states(times: Times, theirs: Tensors, solver: str) -> None:
    model = field(times, theirs["timesteps"])
    states = list(solver_named(solver)(model.velocity, theirs["states"][0], times, 0))
    error = (torch.stack(states) - theirs["states"]).abs().max() / theirs["states"].abs().max()
    assert error <= TOLERANCE, float(error)

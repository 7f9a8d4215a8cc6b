"""The methods by which a student can be distilled, in one table.

The trainer asks the table and never a name: which states of the dataset an update reads, what the
student's key times are, how the objective is built, and how the student wants to be sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import AccVideoError
from ..flow import Times
from ..models.video_model import VideoModel
from ..trajectories.info import DatasetInfo
from .adversarial import CALIBRATION_SAMPLES, build_adversarial
from .consistency import build_consistency
from .ladd import build_ladd
from .objective import Objective
from .recipes import Recipe
from .rollout import DirectRollout, build_rollout
from .setting import Setting
from .sf_v import build_sf_v
from .student import student_grid
from .trajectory import TrajectoryGuidance
from .ufogen import build_ufogen


@dataclass(frozen=True, slots=True)
class Method:
    """One way to distil."""

    build: Callable[[Setting], Objective]
    key_times: Callable[[Recipe, VideoModel, DatasetInfo], Times]
    """The student's m + 1 falling times."""
    reads: Callable[[Times], Times]
    """The student's key times -> those whose recorded states an update reads."""
    solver: str
    """How students are sampled between their key times: a name in `solvers.SOLVERS`."""


def _accvideo(setting: Setting) -> Objective:
    recipe, states = setting.recipe, setting.states
    if not recipe.adversarial:
        return TrajectoryGuidance()
    real = setting.real(CALIBRATION_SAMPLES)
    rollout = DirectRollout() if states is None else build_rollout(recipe, states, setting.ranks)
    return build_adversarial(recipe, setting.teacher, real, rollout)


def _recorded_times(recipe: Recipe, _teacher: VideoModel, info: DatasetInfo) -> Times:
    """Of the grid that the teacher was recorded on."""
    return recipe.times(info.time_grid)


def _own_times(recipe: Recipe, teacher: VideoModel, info: DatasetInfo) -> Times:
    """Of the family, whatever the data come from."""
    size = (info.height, info.width)
    times = recipe.key_times or student_grid(teacher.family, recipe.student_steps, size=size)
    if times[-1] != 0:
        raise AccVideoError(
            f"recipe.key_times end at {times[-1]}, but {recipe.title} trains students that arrive "
            "at clean latents; let them end at 0"
        )
    return times


def _all(times: Times) -> Times:
    return times


def _data(_times: Times) -> Times:
    return (0.0,)


def _from_data(build: Callable[[Setting], Objective]) -> Method:
    """A method that learns from clean latents and predicts them."""
    return Method(build, _own_times, _data, solver="renoise")


METHODS: dict[str, Method] = {
    "accvideo": Method(_accvideo, _recorded_times, _all, solver="euler"),
    "sf_v": _from_data(build_sf_v),
    "ladd": _from_data(build_ladd),
    "ufogen": _from_data(build_ufogen),
    "consistency": _from_data(build_consistency),
}
"""By `Recipe.method`."""

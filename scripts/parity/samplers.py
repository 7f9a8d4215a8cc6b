"""The official schedulers' times and states, over a fixed velocity field.

Shapes: K states, of one sample each [1, C, T, H, W].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from accvideo_core.latents import seeded_noise

from .official import single
from .regenerate import Tensors, velocity

SHAPE = (1, 4, 2, 3, 3)
TIMESTEPS = 1000.0

Reference = tuple[Tensors, dict[str, Any]]


def accvideo_hunyuan(root: Path) -> Reference:
    """AccVideo for HunyuanVideo: FlowMatchDiscreteScheduler, 5 steps, shift 7."""
    folder = root / "models/hunyuan/diffusion/schedulers"
    code: Any = single("accvideo_discrete", folder / "scheduling_flow_match_discrete.py")
    scheduler = code.FlowMatchDiscreteScheduler(shift=7.0, reverse=True, solver="euler")
    scheduler.set_timesteps(5)
    return _states(scheduler, seed=31), {"steps": 5, "shift": 7.0, "seed": 31}


def accvideo_wan_euler(root: Path, steps: int, every: int, shift: float) -> Reference:
    """AccVideo for Wan, solver "euler": every fifth or fourth sigma of a longer grid.

    `few_step` in `models/wan/text2video.py` and `image2video.py`. The scheduler shifts the ends of
    its grid when it is made and the whole grid again when it is set, so that these are not the
    times of the solver "unipc", which the README's commands choose.
    """
    code: Any = single("accvideo_euler", root / "models/wan/utils/fm_euler.py")
    scheduler = code.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False
    )
    scheduler.set_timesteps(steps)
    chosen = list(range(0, steps + 1, every))
    scheduler.sigmas = scheduler.sigmas[chosen]
    scheduler.timesteps = scheduler.timesteps[chosen[:-1]]
    info = {"steps": steps, "every": every, "shift": shift, "seed": 32}
    return _states(scheduler, seed=32), info


def wan_unipc(file: Path, steps: int, shift: float, first_shift: float = 1.0) -> Reference:
    """Wan's default, FlowUniPCMultistepScheduler, and AccVideo's copy of it.

    `first_shift` is the one that the scheduler is made with: AccVideo's `text2video.py` gives the
    shift there, everybody else when the timesteps are set.
    """
    code: Any = single(f"unipc_{file.parents[2].name}", file)
    scheduler = code.FlowUniPCMultistepScheduler(
        num_train_timesteps=1000, shift=first_shift, use_dynamic_shifting=False
    )
    scheduler.set_timesteps(steps, shift=shift)
    return _states(scheduler, seed=33), {"steps": steps, "shift": shift, "seed": 33}


def wan_sigmas(root: Path, steps: int, shift: float) -> Reference:
    """The grid of Wan's other solver, DPM++."""
    code: Any = single("wan_dpm", root / "wan/utils/fm_solvers.py")
    sigmas = torch.from_numpy(code.get_sampling_sigmas(steps, shift))
    return {"sigmas": torch.cat([sigmas, sigmas.new_zeros(1)]).float()}, {"shift": shift}


def _states(scheduler: Any, seed: int) -> Tensors:
    """Sigmas [K], timesteps [K - 1] and states [K, 1, C, T, H, W] of a whole solution."""
    x = seeded_noise(SHAPE, "parity", seed, "input", "x_1")
    states = [x]
    for timestep in scheduler.timesteps:
        v = velocity(x, float(timestep) / TIMESTEPS)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
        states.append(x)
    return {
        "sigmas": scheduler.sigmas.float(),
        "timesteps": scheduler.timesteps.float(),
        "states": torch.stack(states),
    }

"""Presets: how the public few-step students are sampled, each with its source.

A student must be asked at the times it was trained for. Times follow here from the rule of the
official code; `docs/few_step_students.md` has the same table for readers. Students of our own carry
their times in their header and need no preset.

Times are flow times (1 noise, 0 data), which ComfyUI calls sigmas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import AccVideoError
from .flow import Times, key_indices, shift_time, time_grid, validate_times
from .solvers import solver_named

TOLERANCE = 1e-3
"""Largest difference between two times that a student does not notice."""


@dataclass(frozen=True, slots=True)
class Preset:
    """How one public student is sampled."""

    name: str
    title: str
    families: tuple[str, ...]
    """Names of the model families whose weights it is for."""
    times: Times
    shift: float | None
    """Shift behind `times`, or None where they come from another rule."""
    solver: str
    comfy_sampler: str
    """The stock ComfyUI sampler that takes these times as SIGMAS."""
    source: str
    """Repository and path that say so."""
    guidance: float | None = None
    """Embedded guidance, or None for a family without."""
    cfg: float = 1.0
    """Classifier-free guidance; 1 is none."""
    strength: float = 1.0
    """Strength of the LoRA, for students that come as one."""
    notes: str = ""

    def __post_init__(self) -> None:
        validate_times(self.times)
        solver_named(self.solver)

    @property
    def steps(self) -> int:
        return len(self.times) - 1


def misfit(times: Sequence[float], wanted: Sequence[float]) -> str | None:
    """One sentence on how the schedule `times` misses the student's `wanted`, None if it fits."""
    own = f"use the student's own ({', '.join(f'{t:.4f}' for t in wanted)}), or its video is burnt"
    if len(times) != len(wanted):
        steps, right = len(times) - 1, len(wanted) - 1
        return f"the schedule's number of steps is {steps}, but the student's is {right}; {own}"
    gap, t, right = max((abs(t - w), t, w) for t, w in zip(times, wanted, strict=True))
    if gap <= TOLERANCE:
        return None
    return f"the schedule has a time {t:.4f} where the student was trained for {right:.4f}; {own}"


def preset(name: str) -> Preset:
    """The preset of that name."""
    if name not in PRESETS:
        raise AccVideoError(f"preset {name!r} is unknown; choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]


def presets_for(family: str | None = None) -> tuple[str, ...]:
    """The presets for a family, or all, in the table's order."""
    return tuple(p.name for p in PRESETS.values() if family is None or family in p.families)


def _nearest(labels: Sequence[int], shift: float) -> Times:
    """DMD's rule: of the shifted grid of 1000 steps, the times nearest to `labels` / 1000."""
    grid = time_grid(1000, shift)
    return (*(min(grid, key=lambda t: abs(1000 * t - label)) for label in labels), 0.0)


def _every(stride: int, steps: int, shift: float) -> Times:
    """AccVideo's rule for Wan and Euler: every `stride`-th time of its scheduler's own grid.

    The scheduler shifts twice: the smallest of its 1000 times, and then all `steps` times from 1
    down to that one; 0 is added after them.
    """
    last = shift_time(0.001, shift)
    uniform = [1 - (1 - last) * i / (steps - 1) for i in range(steps)]
    grid = [*(shift_time(u, shift) for u in uniform), 0.0]
    return tuple(grid[i] for i in key_indices(steps, steps // stride))


def _falling(first: float, steps: int, shift: float) -> Times:
    """Wan's rule for UniPC: `steps` equal steps from `first` to 0, shifted."""
    return tuple(shift_time(first * (1 - i / steps), shift) for i in range(steps + 1))


def _trigflow(sigma_max: float, steps: int) -> Times:
    """rCM's rule: from sigma_max through TrigFlow angles, t = sin / (sin + cos)."""
    angles = (math.atan(sigma_max), 1.5, 1.4, 1.0)[:steps]
    return (*(math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles), 0.0)


_ACCVIDEO_UNIPC = (
    "The sampler of its README. ComfyUI's form of UniPC is another: near, not equal. The "
    "official code asks the network at the whole part of these times times 1000."
)
_FASTWAN_NOTE = "The official code tells the network 1000, 757 and 522: these times, rounded."
_RCM_NOTE = "The first state is the noise times the first time, as ComfyUI has it by itself."

_TABLE: tuple[Preset, ...] = (
    Preset(
        name="accvideo-hunyuan-5",
        title="AccVideo HunyuanVideo, 5 steps",
        families=("hunyuan_video",),
        times=time_grid(5, 7.0),
        shift=7.0,
        guidance=6.0,
        solver="euler",
        comfy_sampler="euler",
        source="github.com/aejion/AccVideo: README.md, "
        "models/hunyuan/diffusion/schedulers/scheduling_flow_match_discrete.py",
    ),
    Preset(
        name="accvideo-wan-t2v-10",
        title="AccVideo Wan T2V, 10 steps, Euler",
        families=("wan_t2v",),
        times=_every(5, 50, 5.0),
        shift=5.0,
        solver="euler",
        comfy_sampler="euler",
        source="github.com/aejion/AccVideo: models/wan/text2video.py (euler, few_step), "
        "models/wan/utils/fm_euler.py",
        notes="Every 5th of the official 50 steps.",
    ),
    Preset(
        name="accvideo-wan-t2v-10-unipc",
        title="AccVideo Wan T2V, 10 steps, UniPC",
        families=("wan_t2v",),
        times=_falling(shift_time(0.999, 5.0), 10, 5.0),
        shift=5.0,
        solver="unipc",
        comfy_sampler="uni_pc_bh2",
        source="github.com/aejion/AccVideo: README.md, models/wan/text2video.py (unipc), "
        "models/wan/utils/fm_solvers_unipc.py",
        notes=_ACCVIDEO_UNIPC,
    ),
    Preset(
        name="accvideo-wan-i2v-10",
        title="AccVideo Wan I2V 480p, 10 steps, Euler",
        families=("wan_i2v",),
        times=_every(4, 40, 3.0),
        shift=3.0,
        solver="euler",
        comfy_sampler="euler",
        source="github.com/aejion/AccVideo: models/wan/image2video.py (euler, few_step), "
        "models/wan/utils/fm_euler.py, sample_wanx_i2v.py (shift)",
        notes="Every 4th of the official 40 steps.",
    ),
    Preset(
        name="accvideo-wan-i2v-10-unipc",
        title="AccVideo Wan I2V 480p, 10 steps, UniPC",
        families=("wan_i2v",),
        times=_falling(0.999, 10, 3.0),
        shift=3.0,
        solver="unipc",
        comfy_sampler="uni_pc_bh2",
        source="github.com/aejion/AccVideo: README.md, models/wan/image2video.py (unipc), "
        "sample_wanx_i2v.py (shift)",
        notes=_ACCVIDEO_UNIPC,
    ),
    Preset(
        name="lightx2v-wan21-4",
        title="LightX2V Wan 2.1, 4 steps",
        families=("wan_t2v", "wan_i2v"),
        times=time_grid(4, 5.0),
        shift=5.0,
        solver="euler",
        comfy_sampler="euler",
        source="github.com/ModelTC/LightX2V: configs/distill/wan21/, "
        "lightx2v/models/schedulers/wan/step_distill/scheduler.py",
        notes="Until November 2025 the official code drew fresh noise at these times (renoise, "
        "ComfyUI's lcm); today it takes Euler steps.",
    ),
    Preset(
        name="lightning-wan22-4",
        title="Lightning Wan 2.2 A14B, 4 steps",
        families=("wan22_t2v", "wan22_i2v"),
        times=time_grid(4, 5.0),
        shift=5.0,
        solver="euler",
        comfy_sampler="euler",
        source="github.com/ModelTC/Wan2.2-Lightning: wan/configs/wan_t2v_A14B.py, "
        "wan/configs/wan_i2v_A14B.py, wan/utils/fm_solvers_euler.py, generate.py; "
        "github.com/ModelTC/LightX2V: configs/distill/wan22/",
        notes="One LoRA for each expert. Two steps for the high-noise expert and two for the "
        "low-noise one, whose boundary (0.875 T2V, 0.9 I2V) lies between them.",
    ),
    Preset(
        name="fastwan-3",
        title="FastWan, 3 steps",
        families=("wan_t2v", "wan22_ti2v"),
        times=_nearest((1000, 757, 522), 8.0),
        shift=8.0,
        solver="renoise",
        comfy_sampler="lcm",
        source="github.com/hao-ai-lab/FastVideo: fastvideo/configs/pipelines/wan.py, "
        "fastvideo/pipelines/stages/denoising.py (DmdDenoisingStage)",
        notes=_FASTWAN_NOTE,
    ),
    Preset(
        name="causvid-wan-3",
        title="CausVid Wan 1.3B bidirectional, 3 steps",
        families=("wan_t2v",),
        times=_nearest((1000, 757, 522), 8.0),
        shift=8.0,
        solver="renoise",
        comfy_sampler="lcm",
        source="github.com/tianweiy/CausVid: configs/wan_bidirectional_dmd_from_scratch.yaml, "
        "causvid/models/wan/bidirectional_inference.py, causvid/models/wan/wan_wrapper.py",
        notes=_FASTWAN_NOTE,
    ),
    Preset(
        name="causvid-lora-12",
        title="CausVid LoRA for Wan 14B, 12 steps",
        families=("wan_t2v",),
        times=_falling(0.999, 12, 7.0),
        shift=7.0,
        solver="unipc",
        comfy_sampler="uni_pc_bh2",
        strength=0.3,
        source="github.com/deepbeepmeep/Wan2GP: docs/LORAS.md, models/wan/any2video.py (unipc)",
        notes="The community's recipe: strength 0.5 to 0.7 for 8 steps, 0.8 to 1 for 4.",
    ),
    *(
        Preset(
            name=f"rcm-wan-{steps}",
            title=f"rCM Wan 2.1, {steps} step{'s' * (steps > 1)}",
            families=("wan_t2v",),
            times=_trigflow(80.0, steps),
            shift=None,
            solver="renoise",
            comfy_sampler="lcm",
            source="github.com/NVlabs/rcm: rcm/inference/wan2pt1_t2v_rcm_infer.py",
            notes=_RCM_NOTE,
        )
        for steps in (4, 3, 2, 1)
    ),
    Preset(
        name="rcm-wan22-i2v-4",
        title="rCM Wan 2.2 I2V A14B, 4 steps",
        families=("wan22_i2v",),
        times=_trigflow(200.0, 4),
        shift=None,
        solver="renoise",
        comfy_sampler="lcm",
        source="github.com/NVlabs/rcm: rcm/inference/wan2pt2_i2v_rcm_infer.py",
        notes=f"{_RCM_NOTE} Its --ode option takes Euler steps instead: sharper, less robust.",
    ),
)

PRESETS: dict[str, Preset] = {one.name: one for one in _TABLE}

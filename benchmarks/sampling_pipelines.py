"""One clip from the prompt to frames: ours, and diffusers' own pipelines over the same folder.

Both sides load the same weights, start from the same noise, take the same steps and end with the
same frames. The pipelines encode the prompt every time and give the network as many text tokens as
they were released with, most of them padding; ours keeps the encoded prompt and cuts the padding.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accvideo_core.conditioning import Prompt
from accvideo_core.flow import Times, time_grid
from accvideo_core.guidance import Cfg, guided
from accvideo_core.models.loading import load_teacher
from accvideo_core.sampling import sample
from accvideo_core.speed import Speed, sped_up
from benchmarks.loading import ROOT, status
from benchmarks.sampling_cases import NEGATIVE, PROMPT, Case, cases

CFG = {"hunyuan_video": 1.0, "wan_t2v": 5.0}
"""Each family is sampled as it was released."""
Clip = Callable[[], Tensor]
"""Makes the frames [T, H, W, 3] in [0, 1]."""


class OurClip:
    """Ours, loaded, with the prompt encoded."""

    def __init__(
        self, case: Case, folder: Path, steps: int, compiler: str | None = None
    ) -> None:
        """`compiler` is a backend of torch.compile."""
        self.case, self.teacher = case, load_teacher(folder)
        self.compiler = compiler
        self.times, self.cfg = times_of(case, steps), Cfg(CFG[case.family])
        self.prompt, self.negative = self.encode()

    def encode(self) -> tuple[Prompt, Prompt | None]:
        negative = None if self.cfg.none else self.teacher.encode_prompts([NEGATIVE])[0]
        return self.teacher.encode_prompts([PROMPT])[0], negative

    def __call__(self) -> Tensor:
        speed, backend = Speed(compile=self.compiler is not None), self.compiler or "inductor"
        with sped_up(self.teacher.model, speed, backend=backend) as model:
            asked = guided(model, self.negative, self.cfg)
            latents = sample(asked, self.prompt.condition, self.case.noise(), self.times)
        return self.teacher.vae.decode(latents)[0]


def diffusers_clip(case: Case, folder: Path, steps: int) -> Clip:
    """diffusers' pipeline as it ships, loaded."""
    return {"hunyuan_video": _hunyuan_clip, "wan_t2v": _wan_clip}[case.family](case, folder, steps)


def _hunyuan_clip(case: Case, folder: Path, steps: int) -> Clip:
    from diffusers import HunyuanVideoPipeline

    pipeline: Any = HunyuanVideoPipeline.from_pretrained(folder)
    uniform = np.linspace(1.0, 0.0, steps + 1)[:-1]
    return _clip(pipeline, case, sigmas=uniform)


def _wan_clip(case: Case, folder: Path, steps: int) -> Clip:
    from diffusers import WanPipeline

    pipeline: Any = WanPipeline.from_pretrained(folder)
    scale = CFG[case.family]
    given = {"num_inference_steps": steps, "negative_prompt": NEGATIVE, "guidance_scale": scale}
    return _clip(pipeline, case, **given)


def _clip(pipeline: Any, case: Case, **given: Any) -> Clip:
    pipeline.set_progress_bar_config(disable=True)
    plan = case.plan
    size = {"num_frames": plan.frames, "height": plan.height, "width": plan.width}

    def clip() -> Tensor:
        made = pipeline(prompt=PROMPT, **size, latents=case.noise(), output_type="pt", **given)
        frames: Tensor = made.frames[0]
        return frames.permute(0, 2, 3, 1)

    return clip


def times_of(case: Case, steps: int) -> Times:
    """The times that diffusers' pipeline takes."""
    if case.family == "hunyuan_video":
        return time_grid(steps, 7.0)
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(steps)
    return tuple(float(sigma) for sigma in scheduler.sigmas)


SIDES: dict[str, Callable[[Case, Path, int], Clip]] = {
    "ours": OurClip,
    "diffusers": diffusers_clip,
}


def peak(side: str, family: str, folder: Path, quick: bool) -> int:
    """Highest resident memory in bytes of a fresh process that loads a pipeline and makes a clip,
    beyond what it had before.
    """
    command = [sys.executable, "-m", "benchmarks.sampling_pipelines", side, family, str(folder)]
    # Freed memory goes back to the system at once, so that the peak is one of what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    given = json.dumps({"quick": quick, "threads": torch.get_num_threads()})
    done = subprocess.run(
        [*command, given], capture_output=True, text=True, cwd=ROOT, env=env, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{side} could not be measured:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def child(side: str, family: str, folder: Path, quick: bool, threads: int) -> int:
    """What `peak` says, in this process, which does nothing else."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    # First-time work of libraries is not the side's own.
    with tempfile.TemporaryDirectory() as name:
        tiny = cases(quick=True)[family]
        SIDES[side](tiny, tiny.save(Path(name) / "tiny"), 1)()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the highest so far
    before = status("VmRSS")
    SIDES[side](cases(quick)[family], folder, 2)()
    return status("VmHWM") - before


if __name__ == "__main__":
    print(child(sys.argv[1], sys.argv[2], Path(sys.argv[3]), **json.loads(sys.argv[4])))

"""The procedural world for image to video: the first frame announces how the shape will move.

The clips are those of ``world``, in 8 frames, with lit edges of the picture: a shape moves to the
one edge that is lit; all four mean growing, none shrinking, top and bottom bouncing. So the first
frame tells shape, colour, background, place, size and motion. It does not tell the pace, nor what
the shape hides at first. The pace is there to be lost: it differs up to threefold, and a denoiser
that must decide it in one step answers with the mean of all paces, which is a smear.

Shapes: B clips, T = 8 frames, H = W = 32 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import world
from .world import ClipSpec

FRAMES = 8
SIZE = world.SIZE
FPS = 7  # at which SVD's micro-conditioning stands by default
EDGE = 2  # pixels
SLOWEST = 0.35  # a clip ends after this share of the motion, or later
SLOWEST_BOUNCE = 0.75  # a hop that has not ended looks like moving up

STILL = "still"
MOTIONS = (*world.MOTIONS, STILL)
"""What a judge may see; nothing announces "still", which only a bad clip is."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {**world.ATTRIBUTES, "motion": MOTIONS}

_LIGHT = (0.10, 0.95, 0.95)  # no shape has this colour
_LEFT, _RIGHT, _TOP, _BOTTOM = range(4)
_LIT: dict[str, tuple[int, ...]] = {
    "moving left": (_LEFT,),
    "moving right": (_RIGHT,),
    "moving up": (_TOP,),
    "moving down": (_BOTTOM,),
    "growing": (_LEFT, _RIGHT, _TOP, _BOTTOM),
    "shrinking": (),
    "bouncing": (_TOP, _BOTTOM),
}


def render(
    specs: Sequence[ClipSpec],
    generator: torch.Generator,
    announced: Sequence[str] | None = None,
) -> Tensor:
    """Draw one clip per spec; the edges announce its motion.

    Args:
        specs: B clips to draw.
        generator: the only source of randomness; equal state gives equal clips.
        announced: B motions that the edges tell instead of the specs' own, for a judge that must
            look at what moves and not at what was announced.

    Returns:
        float32 [B, 3, 8, 32, 32] in [-1, 1].
    """
    slowest = torch.tensor(
        [[SLOWEST_BOUNCE if spec.motion == "bouncing" else SLOWEST] for spec in specs]
    )
    pace = slowest + (1 - slowest) * torch.rand(len(specs), 1, generator=generator)
    video = world.render(specs, generator, pace * torch.linspace(0, 1, FRAMES))
    told = [spec.motion for spec in specs] if announced is None else announced
    lit = torch.stack([_edges(motion) for motion in told])[:, None, None]  # [B, 1, 1, H, W]
    light = torch.tensor(_LIGHT).view(1, 3, 1, 1, 1) * 2 - 1
    return torch.where(lit, light, video)


def _edges(motion: str) -> Tensor:
    """Which pixels are lit, bool [H, W]."""
    bars = torch.zeros(4, SIZE, SIZE, dtype=torch.bool)
    bars[_LEFT, :, :EDGE] = True
    bars[_RIGHT, :, -EDGE:] = True
    bars[_TOP, :EDGE] = True
    bars[_BOTTOM, -EDGE:] = True
    return bars[list(_LIT[motion])].any(0)

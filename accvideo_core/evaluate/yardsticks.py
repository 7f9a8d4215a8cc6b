"""The yardsticks of real videos: what each one measures, of frames alone or of two videos' frames.

A yardstick of one video looks at `span` consecutive frames at a time, so that videos of any length
are measured while they are decoded.

Shapes: N windows, S frames of a window, T frames, H, W pixels, 3 colours in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..errors import AccVideoError
from ..trajectories.stats import saturation
from . import metrics

if TYPE_CHECKING:
    from .lpips import Lpips

_GRID = 16


@dataclass(frozen=True, slots=True)
class ClipYardstick:
    """A figure of one video."""

    text: str
    span: int
    measure: Callable[[Tensor], Tensor]
    """Windows [N, S, H, W, 3] -> [N]."""


@dataclass(frozen=True, slots=True)
class PairYardstick:
    """A figure of two videos of one size, frame by frame."""

    text: str
    measure: Callable[[Tensor, Tensor], Tensor]
    """Frames [T, H, W, 3] of both -> [T]."""
    key: str = "1"
    """Changes when the figure does: with its definition, or with the weights it rests on."""
    smallest: int = 1
    """Pixels that height and width need."""


def flicker(windows: Tensor) -> Tensor:
    """How far brightness jumps out of line, [N] of windows of 3 frames.

    The luma of a frame, averaged over a grid of 16 x 16 fields, less the mean of what it was one
    frame before and is one frame after; the mean of its absolute value. Fades and slow motion go in
    a straight line from frame to frame and count little; brightness that changes by d to and fro
    counts d.
    """
    fields = F.adaptive_avg_pool2d(metrics.luma(windows), _GRID)
    before, now, after = fields.unbind(dim=1)
    return (now - (before + after) / 2).abs().flatten(1).mean(dim=1)


CLIP_YARDSTICKS: dict[str, ClipYardstick] = {
    "sharpness": ClipYardstick(
        "brightness step of the strongest 5 % of edges of a frame", 1, metrics.edge_sharpness
    ),
    "motion": ClipYardstick(
        "motion energy: mean change from frame to frame", 2, metrics.motion_energy
    ),
    "saturation": ClipYardstick("mean saturation of HSV", 1, saturation),
    "flicker": ClipYardstick(
        "mean deviation of local brightness from that of the frames before and after", 3, flicker
    ),
}


def pair_yardsticks(lpips: Lpips | None = None) -> tuple[dict[str, PairYardstick], list[str]]:
    """PSNR, SSIM where torchmetrics is, LPIPS where its weights are; and what is said of others."""
    found = {"PSNR": PairYardstick("peak signal-to-noise ratio of a frame in dB", metrics.psnr)}
    notes = []
    try:
        found["SSIM"] = PairYardstick(
            "structural similarity of a frame's RGB (Gaussian window of 11, sigma 1.5)",
            ssim_measure(),
            smallest=11,
        )
    except AccVideoError as error:
        notes.append(str(error))
    if lpips is not None:
        found["LPIPS"] = PairYardstick(
            f"learned perceptual distance of a frame (v0.1, {lpips.network})",
            lpips,
            key=lpips.digest,
            smallest=lpips.smallest,
        )
    return found, notes


def ssim_measure() -> Callable[[Tensor, Tensor], Tensor]:
    """SSIM of frames [T, H, W, 3] as [T], by torchmetrics (Wang et al. 2004).

    Raises:
        AccVideoError: torchmetrics is not there, or cannot be imported.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except (ImportError, RuntimeError) as error:
        # It imports torchvision where there is one, and one for another torch raises RuntimeError.
        reason = "is not installed" if "torchmetrics" in str(error) else f"fails ({error})"
        raise AccVideoError(
            f"SSIM needs the package torchmetrics, which {reason}; pip install torchmetrics"
        ) from error

    def measure(a: Tensor, b: Tensor) -> Tensor:
        planes = a.movedim(-1, 1), b.movedim(-1, 1)
        found = structural_similarity_index_measure(*planes, data_range=1.0, reduction="none")
        assert isinstance(found, Tensor)
        return found.reshape(-1)  # a single frame's has no axis

    return measure

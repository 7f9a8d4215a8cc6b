"""FVD, the Frechet video distance (Unterthiner et al. 2018), by the I3D network in a file.

The protocol is StyleGAN-V's (Skorokhodov et al. 2022, `src/metrics/frechet_video_distance.py`),
which most papers since then follow: I3D of Kinetics-400 as the TorchScript file
`i3d_torchscript.pt`, 16 consecutive frames of a video, handed over as 0 ... 255 in
[1, 3, 16, H, W] with `rescale=True, resize=True, return_features=True`, so that the file itself
brings them to 224 x 224 (without keeping their shape) and to [-1, 1], and answers with 400
features before the softmax. Where StyleGAN-V draws the first frame at random, it is the video's
first here: the figure is the same each time.

Shapes: T frames, H, W pixels, 3 colours in [0, 1]; N videos, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AccVideoError
from .clips import Clip, UnusableClip, file_digest
from .metrics import frechet_distance

FRAMES = 16
FEW = 256
"""Videos below which the estimate is mostly its bias; papers take 2048."""

_WHERE = (
    "give the TorchScript file i3d_torchscript.pt that StyleGAN-V's FVD names "
    "(github.com/universome/stylegan-v)"
)


class Detector:
    """I3D: 16 frames to features.

    TorchScript is a program, if one of tensors alone: take the file from where it is published.
    """

    def __init__(self, path: Path, device: str | torch.device = "cpu"):
        if not path.is_file():
            raise AccVideoError(f"there is no file {path} for FVD; {_WHERE}")
        self.digest, self.path, self.device = file_digest(path), path, device
        try:
            self._network: Any = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise AccVideoError(f"{path} is no TorchScript that can be read; {_WHERE}") from error

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """Features [D] of frames [T, H, W, 3]."""
        pixels = (frames.to(self.device).float() * 255).round().movedim(-1, 0)[None]
        try:
            found = self._network(pixels, rescale=True, resize=True, return_features=True)
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise AccVideoError(
                f"{self.path} does not take frames as I3D does for FVD "
                f"({str(error).strip().splitlines()[-1]}); {_WHERE}"
            ) from error
        return found.float().flatten().cpu()

    def features(self, clip: Clip) -> Tensor:
        """Features [D] of a video's first 16 frames.

        Raises:
            UnusableClip: it has fewer.
        """
        frames: list[Tensor] = []
        with clip.opened() as (chunks, _):
            for chunk in chunks:
                frames.append(chunk)
                if sum(map(len, frames)) >= FRAMES:
                    break
        first = torch.cat(frames)[:FRAMES]
        if len(first) < FRAMES:
            raise UnusableClip(
                f"{clip.name} has {len(first)} frames, but FVD looks at {FRAMES}; "
                "leave it out or make it longer"
            )
        return self(first)


def fvd(reference: Tensor, judged: Tensor) -> float | None:
    """FVD of features [N, D] and [M, D]; None where one of them is a single video's."""
    if min(len(reference), len(judged)) < 2:
        return None
    return frechet_distance(reference, judged)

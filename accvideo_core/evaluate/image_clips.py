"""Real clips of the image-to-video world, each from a number of its own, and as video files.

Shapes: N clips, frames [N, 8, 32, 32, 3] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..latents import key_generator
from ..video import write_lossless
from . import image_world, world


def clips(numbers: Iterable[int], *key: object) -> tuple[list[world.ClipSpec], Tensor]:
    """What clips show, and their frames; each follows from its number and `key` alone."""
    specs, frames = [], []
    for number in numbers:
        generator = key_generator("image world", *key, number)
        (spec,) = world.sample_specs(1, generator)
        specs.append(spec)
        frames.append(image_world.render([spec], generator)[0])
    video = ((torch.stack(frames) + 1) / 2).clamp(0, 1)
    return specs, video.permute(0, 2, 3, 4, 1).contiguous()


def write_videos(folder: Path, count: int, *key: object) -> list[Path]:
    """Video files of clips 0 ... `count` - 1 with their captions; what is there already stays.

    Without loss, because H.264 would blur the colours of 32 x 32 pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.mkv" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            (spec,), frames = clips([number], *key)
            path.with_suffix(".txt").write_text(world.prompt(spec) + "\n", encoding="utf-8")
            write_lossless(path, frames[0], image_world.FPS)
    return paths

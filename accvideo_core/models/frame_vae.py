"""VAEs that encode frames one by one and decode neighbours together: Stable Video Diffusion's.

Shapes: B batch, C channels, T frames, H, W pixels; h, w latent size.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

BY_FRAMES = frozenset({"AutoencoderKLTemporalDecoder"})
"""diffusers' classes. They have no latent frames: each frame has a latent of its own. Their
activations do not fit float16 (diffusers' force_upcast)."""
FRAMES_AT_ONCE = 14
"""Neighbours that are decoded together, as in the release's own script: they are smoothed along
time, so that the number shows at the seams."""
OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
_log = logging.getLogger(__name__)


def encode_frames(module: Any, video: Tensor) -> Tensor:
    """video [B, 3, T, H, W] in [-1, 1] -> the latents' mode [B, C, T, h, w], not scaled."""
    frames = video.transpose(1, 2).flatten(0, 1)
    parts = [module.encode(frame, return_dict=False)[0].mode() for frame in frames.split(1)]
    return torch.cat(parts).unflatten(0, (len(video), -1)).transpose(1, 2)


def decode_frames(module: Any, z: Tensor, at_once: int = FRAMES_AT_ONCE) -> Tensor:
    """z [B, C, T, h, w], not scaled -> video [B, 3, T, H, W] around [-1, 1].

    Where the device's memory is too small for `at_once` frames, fewer are decoded together.
    """
    at_once = min(at_once, z.shape[2])
    while True:
        try:
            parts = [_decode(module, part) for part in z.split(at_once, dim=2)]
            return torch.cat(parts, dim=2)
        except OUT_OF_MEMORY:
            if at_once == 1:
                raise
        at_once = (at_once + 1) // 2
        _log.warning("too little memory to decode; trying %d frames together", at_once)


def _decode(module: Any, z: Tensor) -> Tensor:
    count = z.shape[2]
    frames = z.transpose(1, 2).flatten(0, 1)
    video = module.decode(frames, num_frames=count, return_dict=False)[0]
    return video.unflatten(0, (len(z), count)).transpose(1, 2)

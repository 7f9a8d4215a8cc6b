"""What two processes can divide: networks whose tokens they share, asked with uneven texts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from accvideo_core.conditioning import Condition
from accvideo_core.models import VideoModel
from tests import tiny, tiny_hunyuan_i2v, tiny_wan


def divisible(name: str, length: int) -> tuple[VideoModel, Tensor, Condition]:
    """A family's model, latents [2, ...] and a condition whose first text has `length` tokens."""
    if name == "hunyuan_video":
        model, x, cond = tiny.video_model(), tiny.latents(), tiny.condition()
    elif name in tiny_hunyuan_i2v.KINDS:
        model, x = tiny_hunyuan_i2v.video_model(name), tiny_hunyuan_i2v.latents()
        cond = tiny_hunyuan_i2v.condition()
        x = torch.cat([x, x[:, :, :1]], dim=2)  # half of the tokens are not those of one frame
    else:
        model, x = tiny_wan.video_model(name), tiny_wan.latents(name)
        cond = tiny_wan.condition(name)
    mask = torch.ones(cond.text.shape[:2], dtype=torch.bool)
    mask[0, length:] = False
    return model, x, replace(cond, mask=mask)

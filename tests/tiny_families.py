"""One very small random network of every family, with latents and a condition to ask it about."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accvideo_core.conditioning import Condition
from accvideo_core.models import VideoModel
from tests import tiny, tiny_cogvideox, tiny_hunyuan_i2v, tiny_svd, tiny_wan

NAMES = (
    "hunyuan_video",
    *tiny_hunyuan_i2v.KINDS,
    *tiny_wan.FAMILY_NAMES,
    *tiny_cogvideox.KINDS,
    "svd",
)


@dataclass(frozen=True, eq=False)
class Case:
    model: VideoModel
    x: torch.Tensor
    condition: Condition

    def velocities(self, model: VideoModel) -> torch.Tensor:
        """On both sides of every family's boundary between experts."""
        return torch.cat([model.velocity(self.x, t, self.condition) for t in (0.95, 0.4)])


def case(name: str, seed: int = 0) -> Case:
    if name == "hunyuan_video":
        return Case(tiny.video_model(seed), tiny.latents(), tiny.condition())
    if name in tiny_hunyuan_i2v.KINDS:
        model = tiny_hunyuan_i2v.video_model(name, seed)
        return Case(model, tiny_hunyuan_i2v.latents(), tiny_hunyuan_i2v.condition())
    if name in tiny_wan.FAMILY_NAMES:
        x, condition = tiny_wan.latents(name), tiny_wan.condition(name)
        return Case(tiny_wan.video_model(name, seed), x, condition)
    if name == "svd":
        return Case(tiny_svd.video_model(seed), tiny_svd.latents(), tiny_svd.condition())
    model = tiny_cogvideox.video_model(name, seed)
    return Case(model, tiny_cogvideox.latents(), tiny_cogvideox.condition())

"""Networks of the released sizes, and the clips that they are measured with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from accvideo_core.conditioning import Condition
from accvideo_core.latents import seeded_noise


@dataclass(frozen=True)
class Released:
    """A network by its configuration, and a clip."""

    name: str
    family: str
    config: dict[str, Any]
    frames: int
    height: int
    width: int
    text: tuple[int, int]
    """Tokens of the prompt and their width."""
    pooled: int | None = None

    def condition(self) -> Condition:
        """A prompt of random numbers."""
        return Condition(
            text=seeded_noise((1, *self.text), "text"),
            mask=torch.ones(1, self.text[0], dtype=torch.bool),
            pooled=None if self.pooled is None else seeded_noise((1, self.pooled), "pooled"),
        )


HUNYUAN_VIDEO = Released("HunyuanVideo 13B", "hunyuan_video", {}, 93, 544, 960, (256, 4096), 768)
WAN = Released("Wan 14B", "wan_t2v", {}, 81, 480, 832, (512, 4096))
"""diffusers' default configurations are the released ones."""

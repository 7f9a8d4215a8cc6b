"""Clips whose texture is partly faded, with everything else untouched.

The decoder and the classifier both meet them in training: a decoder that has seen only perfect
textures rounds a half-grey cell to the nearest full level and would hide what few-step sampling
loses; a classifier that has seen only perfect textures would not measure it.

Shapes: B clips [B, 3, 17, 32, 32] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from accvideo_core.evaluate import world


def blended(
    specs: Sequence[world.ClipSpec],
    towards: Sequence[str],
    fade: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Render ``specs``, each mixed by ``fade`` [B] in [0, 1] with itself on another background."""
    state = generator.get_state()
    video = world.render(specs, generator)
    twin = torch.Generator()
    twin.set_state(state)
    others = [replace(spec, background=name) for spec, name in zip(specs, towards, strict=True)]
    return torch.lerp(video, world.render(others, twin), fade.view(-1, 1, 1, 1, 1))

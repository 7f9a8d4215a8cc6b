"""The discriminator's projection heads: which there are, and which of them judge a key time.

AccVideo (Sec. 4.3, Eq. 8): D(l, t'_k) = H_k(v_theta(l, t'_k)), with m separate "timestep-aware"
heads H_k over a frozen teacher's features. Here H_k is one head, or a spatial and a temporal one,
for every feature block that key time k looks at.

Shapes: B batch, T latent frames, h, w token grid, D token width, P patch logits of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..conditioning import Condition
from ..latents import key_generator
from .head import FeatureScale, Head, SpatialHead, TemporalHead
from .projection import condition_vector
from .recipes import Recipe

Blocks = Sequence[Sequence[int]]
_KINDS: dict[str, dict[str, type[Head]]] = {
    "spatial": {"": SpatialHead},
    "spatial_temporal": {"": SpatialHead, "_temporal": TemporalHead},
    "temporal": {"_temporal": TemporalHead},
}
"""Heads of one feature block, by the ending of their names."""


class Heads(nn.Module):
    """H_0 ... H_{m-1}; only the heads of one k take part in a step."""

    def __init__(
        self,
        blocks: Blocks,
        features: Mapping[int, int],
        recipe: Recipe,
        prompt: int | None = None,
    ) -> None:
        """
        Args:
            blocks: the feature blocks of key time k = 0 (data), 1, ... m - 1.
            features: width D of every block's features.
            recipe: its head_* fields choose the heads. The weights follow from its seed alone; the
                global generator is left alone.
            prompt: width of the vector that heads are conditioned on; None for no condition.
        """
        super().__init__()
        self.blocks = tuple(tuple(per_time) for per_time in blocks)
        self.conditioned = prompt is not None
        self._kinds = _KINDS[recipe.head_kind]
        self._shared = recipe.heads == "shared"
        with torch.random.fork_rng(devices=[]):
            self.heads = nn.ModuleDict(
                {
                    name: kind(features[block], recipe.head_width, prompt)
                    for k, per_time in enumerate(self.blocks)
                    for block in per_time
                    for name, kind in self._named(k, block)
                }
            )
        for name, p in self.named_parameters():
            if p.dim() > 1:
                bound = 1 / math.sqrt(p[0].numel())
                nn.init.uniform_(p, -bound, bound, generator=key_generator(recipe.seed, name))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(
        self, k: int, features: Sequence[Tensor], cond: Condition, t: Tensor | None = None
    ) -> list[Tensor]:
        """Patch logits [B, P] of every head of H_k.

        `features` [B, T, h, w, D], any T, h and w, are in the order of `blocks[k]`; `t` [B] is
        their time, where the heads are told.
        """
        prompt = condition_vector(cond, t) if self.conditioned else None
        seen = self.inputs(features)
        return [head(x, prompt) for head, x in zip(self.of(k), seen, strict=True)]

    def inputs(self, features: Sequence[Tensor]) -> list[Tensor]:
        """What each head of `of` looks at."""
        return [x for x in features for _ in self._kinds]

    def of(self, k: int) -> list[Head]:
        """H_k: the heads of each of `blocks[k]`."""
        return [
            cast(Head, self.heads[name])
            for block in self.blocks[k]
            for name, _ in self._named(k, block)
        ]

    def calibrate(self, features: Iterable[tuple[int, Sequence[Tensor]]]) -> None:
        """Set the scale of every head's inputs by (k, real features of `blocks[k]`), one by one.

        A shared head goes by all the key times that it serves.
        """
        scales: dict[Head, FeatureScale] = {}
        for k, found in features:
            for head, x in zip(self.of(k), self.inputs(found), strict=True):
                scales.setdefault(head, FeatureScale(head.mean)).add(x)
        for head, scale in scales.items():
            head.calibrate(scale)

    def _named(self, k: int, block: int) -> list[tuple[str, type[Head]]]:
        place = f"block{block}" if self._shared else f"k{k}_block{block}"
        return [(place + ending, kind) for ending, kind in self._kinds.items()]


def over_heads(loss: Callable[..., Tensor], *logits: Sequence[Tensor]) -> Tensor:
    """The mean over heads of `loss` of their logits: heads of many patches weigh no more."""
    return torch.stack([loss(*each) for each in zip(*logits, strict=True)]).mean()

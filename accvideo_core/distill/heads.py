"""The discriminator's projection heads: one small 2-D CNN per key time and feature block.

AccVideo (Sec. 4.3, Eq. 8): D(l, t'_k) = H_k(v_theta(l, t'_k)), with m separate "timestep-aware"
heads H_k over a frozen teacher's features, each "a 2D convolutional neural network". The paper
gives no layers; these follow the public relatives: Conv 4x4 stride 2, GroupNorm, LeakyReLU(0.2),
a residual 3x3 block, and a 1x1 convolution to one logit per patch.

Shapes: B batch, T latent frames, h, w token grid, D token width, P patch logits of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..latents import key_generator

Blocks = Sequence[Sequence[int]]
Shape = tuple[int, int, int]
_MOST_GROUPS = 32
_LEAST_CHANNELS = 16
_SLOPE = 0.2


class Head(nn.Module):
    """One projection head: features [B, T, h, w, D] -> patch logits [B, P].

    Frames are folded into the batch: the transformer has already mixed time into every token.

    Channels are first standardised with the fixed `mean` and `std` of real features, because a
    frozen transformer's channels differ by orders of magnitude and fine detail lies in the small
    ones. Unlike a norm per token, this keeps how strong a feature is, and its gradient.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        *grid, features = shape
        # A grid of one row or column has nothing to halve.
        kernel, stride = (4, 2) if min(grid) >= 2 else (3, 1)
        groups = _groups(width)
        self.enter = nn.Conv2d(features, width, kernel, stride, padding=1)
        self.enter_norm = nn.GroupNorm(groups, width)
        self.residual = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.residual_norm = nn.GroupNorm(groups, width)
        self.logits = nn.Conv2d(width, 1, kernel_size=1)
        # Not persistent: they follow from the dataset and the seed.
        self.register_buffer("mean", torch.zeros(features), persistent=False)
        self.register_buffer("std", torch.ones(features), persistent=False)

    @torch.no_grad()
    def calibrate(self, features: Sequence[Tensor]) -> None:
        """Take mean and deviation of every channel from real features, each [B, T, h, w, D]."""
        tokens = torch.cat([x.float().flatten(0, -2) for x in features])
        std, mean = torch.std_mean(tokens, dim=0, correction=0)
        # A channel that hardly moves is noise; it is not blown up to the size of the others.
        self.std.copy_(std.clamp_min(0.01 * float(std.median()) + 1e-6))
        self.mean.copy_(mean)

    def forward(self, features: Tensor) -> Tensor:
        x = (features.float() - self.mean) / self.std
        x = x.flatten(0, 1).permute(0, 3, 1, 2)  # (B T) D h w
        x = F.leaky_relu(self.enter_norm(self.enter(x)), _SLOPE)
        x = x + F.leaky_relu(self.residual_norm(self.residual(x)), _SLOPE)
        return self.logits(x).reshape(features.shape[0], -1)


class TimestepHeads(nn.Module):
    """A head for every (key time k, feature block); only those of one k take part in a step."""

    def __init__(self, blocks: Blocks, shapes: Mapping[int, Shape], width: int, seed: int) -> None:
        """
        Args:
            blocks: the feature blocks of key time k = 0 (data), 1, ... m - 1.
            shapes: (h, w, D) of every block's features.
            width: channels of the heads.
            seed: the weights follow from it alone; the global generator is left alone.
        """
        super().__init__()
        self.blocks = tuple(tuple(per_time) for per_time in blocks)
        with torch.random.fork_rng(devices=[]):
            self.heads = nn.ModuleDict(
                {
                    _name(k, block): Head(shapes[block], width)
                    for k, per_time in enumerate(self.blocks)
                    for block in per_time
                }
            )
        for name, p in self.named_parameters():
            if p.dim() > 1:
                bound = 1 / math.sqrt(p[0].numel())
                nn.init.uniform_(p, -bound, bound, generator=key_generator(seed, name))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, k: int, features: Sequence[Tensor]) -> Tensor:
        """Patch logits [B, P] of H_k; `features` [B, T, h, w, D] in the order of `blocks[k]`."""
        pairs = zip(self.of(k), features, strict=True)
        return torch.cat([head(x) for head, x in pairs], dim=1)

    def of(self, k: int) -> list[Head]:
        """H_k: one head for each of `blocks[k]`."""
        return [cast(Head, self.heads[_name(k, block)]) for block in self.blocks[k]]


def _groups(width: int) -> int:
    """Groups of a GroupNorm: 32 at the usual widths, fewer for narrow heads.

    A group of few channels on a grid of few patches would subtract most of what it is shown.
    """
    most = min(_MOST_GROUPS, max(1, width // _LEAST_CHANNELS))
    return max(groups for groups in range(1, most + 1) if width % groups == 0)


def _name(k: int, block: int) -> str:
    return f"k{k}_block{block}"

"""One projection head of the discriminator: a small CNN from features to a logit per patch.

AccVideo (Sec. 4.3) says "a 2D convolutional neural network" and gives no layers; these follow the
public relatives: Conv 4x4 stride 2, GroupNorm, LeakyReLU(0.2), a residual 3x3 block, and a 1x1
convolution to one logit per patch. The temporal head is the same in one dimension (SF-V, Sec. 3.3),
at stride 1, because latent frames are few.

A head knows the width of the features and nothing of their grid: clips of any size go through the
same weights.

Shapes: B batch, T latent frames, h, w token grid, D token width, P patch logits of one sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .projection import Projection

_MOST_GROUPS = 32
_LEAST_CHANNELS = 16
_SLOPE = 0.2


class Head(nn.Module):
    """Features [B, T, h, w, D] -> patch logits [B, P]. `SpatialHead` and `TemporalHead` are made.

    Channels are first standardised with the fixed `mean` and `std` of real features, because a
    frozen transformer's channels differ by orders of magnitude and fine detail lies in the small
    ones. Unlike a norm per token, this keeps how strong a feature is, and its gradient.
    """

    conv: type[nn.Conv2d] | type[nn.Conv1d]
    kernel: int
    stride: int
    rows_are_frames: bool
    mean: Tensor
    std: Tensor

    def __init__(self, features: int, width: int, prompt: int | None = None) -> None:
        """
        Args:
            features: D.
            width: channels of the head.
            prompt: width of the prompt vector that it is conditioned on; None for no condition.
        """
        super().__init__()
        groups = _groups(width)
        self.enter = self.conv(features, width, self.kernel, self.stride, padding=1)
        self.enter_norm = nn.GroupNorm(groups, width)
        self.residual = self.conv(width, width, kernel_size=3, padding=1)
        self.residual_norm = nn.GroupNorm(groups, width)
        self.logits = self.conv(width, 1, kernel_size=1)
        self.projection = (
            None if prompt is None else Projection(prompt, width, frames=self.rows_are_frames)
        )
        # Not persistent: they follow from the dataset and the seed.
        self.register_buffer("mean", torch.zeros(features), persistent=False)
        self.register_buffer("std", torch.ones(features), persistent=False)

    @torch.no_grad()
    def calibrate(self, scale: FeatureScale) -> None:
        """Take over mean and deviation of every channel of real features."""
        std = scale.variance.sqrt()
        # A channel that hardly moves is noise; it is not blown up to the size of the others.
        self.std.copy_(std.clamp_min(0.01 * float(std.median()) + 1e-6))
        self.mean.copy_(scale.mean)

    def fold(self, x: Tensor) -> Tensor:
        """[B, T, h, w, D] -> [B R, D, ...], what is convolved over last."""
        raise NotImplementedError

    def forward(self, features: Tensor, prompt: Tensor | None = None) -> Tensor:
        """`prompt` [B, prompt width] for a head that is conditioned on it."""
        x = self.fold((features.float() - self.mean) / self.std)
        x = F.leaky_relu(self.enter_norm(self.enter(x)), _SLOPE)
        x = x + F.leaky_relu(self.residual_norm(self.residual(x)), _SLOPE)
        logits = self.logits(x)
        if self.projection is not None and prompt is not None:
            logits = logits + self.projection(x, prompt)
        return logits.reshape(features.shape[0], -1)


class SpatialHead(Head):
    """Judges every latent frame by itself; the transformer has already mixed time into it."""

    conv = nn.Conv2d
    kernel, stride = 4, 2
    rows_are_frames = True

    def fold(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1).permute(0, 3, 1, 2)
        rows, columns = x.shape[2:]
        if min(rows, columns) > 1:
            return x
        # A single row or column is doubled, so that there is something to halve.
        return F.pad(x, (0, int(columns < 2), 0, int(rows < 2)), mode="replicate")


class TemporalHead(Head):
    """Judges how every position of the grid goes through time."""

    conv = nn.Conv1d
    kernel, stride = 3, 1
    rows_are_frames = False

    def fold(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 4, 1).flatten(0, 2)


class FeatureScale:
    """Mean and variance of every channel [D], of features that come one sample after another."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.variance, self.tokens = torch.zeros_like(like), torch.zeros_like(like), 0

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """Take in features [B, T, h, w, D] (Chan, Golub and LeVeque's update)."""
        tokens = features.float().flatten(0, -2)
        variance, mean = torch.var_mean(tokens, dim=0, correction=0)
        self.tokens += len(tokens)
        share, apart = len(tokens) / self.tokens, mean - self.mean
        self.variance = self.variance.lerp(variance, share) + share * (1 - share) * apart**2
        self.mean = self.mean + share * apart


def _groups(width: int) -> int:
    """Groups of a GroupNorm: 32 at the usual widths, fewer for narrow heads.

    A group of few channels on a grid of few patches would subtract most of what it is shown.
    """
    most = min(_MOST_GROUPS, max(1, width // _LEAST_CHANNELS))
    return max(groups for groups in range(1, most + 1) if width % groups == 0)

"""The network of the paper's Figure 8: a residual network of Conv1D and BatchNorm on a scalar.

The figure names the layers, not their sizes. On a scalar only the middle of a kernel meets data
and AvgPool1D changes nothing, so kernels have size 1 and there is no pool.

Shapes: N points, W channels. The points stand along the length of a convolution, [1, W, N], where
kernels of size 1 leave each alone and BatchNorm takes its statistics over all of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..latents import key_generator

_FREQUENCIES = 32
_BLOCKS = 2  # of two Conv1D and BatchNorm each: the figure draws four pairs behind the stem


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(width, width, 1), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Conv1d(width, width, 1), nn.BatchNorm1d(width),
        )  # fmt: skip

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(h + self.body(h))


class VelocityNet(nn.Module):
    """v_theta(x_t, t): [N], [N] -> [N]."""

    def __init__(self, width: int, *key: object) -> None:
        """Weights follow from `key` alone; the global generator is left alone."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.stem = nn.Sequential(nn.Conv1d(1, width, 1), nn.BatchNorm1d(width))
            self.time = nn.Sequential(
                nn.Conv1d(2 * _FREQUENCIES, width, 1), nn.ReLU(), nn.Conv1d(width, width, 1)
            )
            self.blocks = nn.Sequential(*(_Block(width) for _ in range(_BLOCKS)))
            self.head = nn.Conv1d(width, 1, 1)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                bound = 1 / math.sqrt(p[0].numel())
                nn.init.uniform_(p, -bound, bound, generator=key_generator(*key, name))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        angles = _frequencies()[:, None] * t
        time = self.time(torch.cat([angles.sin(), angles.cos()])[None])
        h = torch.relu(self.stem(x_t[None, None]) + time)
        return self.head(self.blocks(h))[0, 0]


def _frequencies() -> Tensor:
    return torch.exp(torch.linspace(0, math.log(100.0), _FREQUENCIES))

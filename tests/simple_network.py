"""As little a network as one with blocks can be, of the analytic family.

What a compiler needs half a minute for with a real network takes seconds with this one, and its
blocks end in a linear layer and nothing else, as no real network's do.

Shapes: B batch, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from accvideo_core.conditioning import Condition
from accvideo_core.models import VideoModel
from accvideo_core.models.packing import pack_weights
from tests import analytic
from tests.tiny import randomise
from tests.tiny_families import Case


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(self.norm(x) + t)))


class Network(nn.Module):
    """Embedding, blocks, output layer; it recomputes as diffusers' networks do."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.enter = nn.Linear(analytic.SPEC.channels, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.tail = nn.Linear(width, analytic.SPEC.channels)
        self.is_gradient_checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        self.is_gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.is_gradient_checkpointing = False

    def forward(self, x: Tensor, t: Tensor, _cond: Condition) -> Tensor:
        h = self.enter(x.movedim(1, -1))
        t = t.to(h.dtype).reshape(-1, 1, 1, 1, 1)
        for block in self.blocks:
            if self.is_gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block.__call__, h, t, use_reentrant=False)
            else:
                h = block(h, t)
        return self.tail(h).movedim(-1, 1)


def simple_case(weights: str | None = None, width: int = 16, blocks: int = 4) -> Case:
    """The network with latents and a condition to ask it about; `weights` as `pack_weights`."""
    family = replace(
        analytic.ANALYTIC,
        lora_targets=("first", "second"),
        tokens=lambda _module, output, _shape: output,
    )
    network = Network(width, blocks)
    randomise(network)
    network.eval().requires_grad_(False)
    model = VideoModel(network, family, analytic.SPEC, source="simple")
    if weights is not None:
        model = pack_weights(model, weights)
    x = torch.randn(2, *analytic.SPEC.shape(5, 16, 16), generator=torch.Generator().manual_seed(1))
    return Case(model, x, analytic.condition(2))

"""Sparse attention of video tokens: Radial Attention (arXiv 2506.19852), by blocks of tokens.

What tokens give each other falls with their distance in space and in time. So tokens of one frame
and of its neighbours see each other as always; between frames further apart a token sees a window
around its own place, of half the width for every doubling of the distance. Where the window would
become narrower than a block, it stays, and only every second, fourth, ... distance is seen instead.
All tokens see the first frame (the paper's attention sink). Text sees everything and is seen by
everything.

Tokens are cut into blocks, and a pair of blocks is computed as a whole or not at all, by the
distance of the tokens in their middles; the paper's release decides by shares of a block instead.
The window lies along the frame's rows, one after the other, as it does there.

Shapes: N tokens, of which the video's T*h*w come first; n blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int, int]
"""Frames, height and width of the video, in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Radial:
    """The pattern's parameters."""

    window: float = 0.5
    """At a distance of d >= 2 frames a token sees window / 2^floor(log2 d) of a frame to each side.
    1 is the paper's formula, about 0.5 what its code does."""
    block: int = 128
    """Tokens of a block; what FlexAttention likes."""

    def blocks(self, grid: Grid, text: int) -> Tensor:
        """Which blocks of queries (rows) see which blocks of keys; bool [n, n] on the CPU."""
        per_frame, video = math.prod(grid[1:]), math.prod(grid)
        count = -(-(video + text) // self.block)
        middle = (torch.arange(count) * self.block + self.block // 2).clamp(max=video - 1)
        frame, place = middle // per_frame, middle % per_frame
        frames = (frame[:, None] - frame).abs()
        # 0, 1, 1, 2, 2, 2, 2, ... doublings of the distance; below 2 there is no window.
        halvings = torch.log2(frames.clamp(min=1)).floor()
        width = self.window * per_frame / 2**halvings
        near = (place[:, None] - place).abs() <= width.clamp(min=self.block)
        seen = frames % (self.block / width).clamp(min=1).ceil() == 0
        pattern = (near & seen) | (frames < 2) | (frame == 0)
        written = torch.arange(count) >= video // self.block if text else torch.tensor(False)
        return pattern | written | written[..., None]


PATTERNS: dict[str, Radial | None] = {"dense": None, "radial": Radial()}
"""By name; dense attention computes all pairs."""


def computed_share(pattern: Radial, grid: Grid, text: int) -> float:
    """Of all pairs of blocks, how many are computed."""
    return float(pattern.blocks(grid, text).float().mean())


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # they are kept, and may meet gradients
def block_mask(pattern: Radial, grid: Grid, text: int, device: torch.device) -> Any:
    """The pattern as FlexAttention takes it, a BlockMask of all heads and samples."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = pattern.blocks(grid, text)
    tokens = math.prod(grid) + text
    full, cut = blocks.clone(), torch.zeros_like(blocks)
    if tokens % pattern.block:
        # What lies behind the last token is kept out where a block's pairs are looked at.
        for edge in (slice(-1, None), (slice(None), slice(-1, None))):
            cut[edge], full[edge] = blocks[edge], False
    return BlockMask.from_kv_blocks(
        *_ordered(cut, device),
        *_ordered(full, device),
        BLOCK_SIZE=pattern.block,
        mask_mod=_every,
        seq_lengths=(tokens, tokens),
    )


def _every(_batch: Tensor, _head: Tensor, query: Tensor, _key: Tensor) -> Tensor:
    return query >= 0


def _ordered(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bool [n, n] -> how many each row has [1, 1, n], and which, those first [1, 1, n, n]."""
    counts = blocks.sum(dim=1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None].to(device), indices[None, None].to(device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def token_mask(pattern: Radial, grid: Grid, text: int, device: torch.device) -> Tensor:
    """The pattern token by token, bool [N, N], to compute the same with a dense kernel."""
    tokens = math.prod(grid) + text
    blocks = pattern.blocks(grid, text).to(device)
    of_block = torch.arange(tokens, device=device) // pattern.block
    return blocks[of_block][:, of_block]

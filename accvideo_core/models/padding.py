"""Text padding that a network attends to (Wan): a few of its tokens stand for all of them.

Padding is equal rows, whose keys and values are equal too. In a softmax n equal keys weigh as one
whose score is larger by ln n. So attention to 512 tokens, of which 20 are a prompt's, is attention
to 21 with a bias for the last one: the same to rounding, and keys and values are projected for 21.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

WORTH = 0.5
"""Of all tokens: only where fewer are left a bias costs less than it spares."""
_EXACT = torch.finfo(torch.float32).eps
"""Of the padding's weight, what may be missing."""


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # it is kept
def padding_bias(
    valid: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Biases [1, 1, 1, L] of the first L tokens that make them weigh as all `tokens`, of which
    those after the first `valid` are equal; None where too many are valid for that to pay.
    """
    biases = _shares(tokens - valid, dtype) if valid < tokens else []
    if valid + len(biases) > WORTH * tokens:
        return None
    row = torch.zeros(valid + len(biases), dtype=dtype)
    row[valid:] = torch.tensor(biases, dtype=dtype)
    return row.to(device).view(1, 1, 1, -1)


def _shares(count: int, dtype: torch.dtype) -> list[float]:
    """Numbers of a dtype whose exponentials add up to `count`: one, or some where it is narrow."""
    shares, left = [], float(count)
    precision = torch.finfo(dtype).eps
    while left > _EXACT * count:
        exact = math.log(left)
        # Rounded down, so that what is left stays positive.
        shares.append(float(torch.tensor(exact - abs(exact) * precision, dtype=dtype)))
        left -= math.exp(shares[-1])
    return shares

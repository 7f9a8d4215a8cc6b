"""Parameters of which every process holds a part (DTensors), beside plain ones.

Everything here takes both, and needs torch.distributed only where there is a sharded one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(x: Tensor) -> bool:
    """Whether other processes hold parts of `x`."""
    return hasattr(x, "device_mesh")


def local(x: Any) -> Tensor:
    """What this process holds of `x`; changing it changes `x`."""
    return x.to_local() if is_sharded(x) else x


def whole(x: Any) -> Tensor:
    """All of `x`; every process must ask where it is sharded."""
    return x.full_tensor() if is_sharded(x) else x


def placed(x: Tensor, like: Any) -> Tensor:
    """`x`, the same everywhere, sharded as `like` where that is sharded and of its shape."""
    if not is_sharded(like) or is_sharded(x) or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    # No source rank: each process cuts its own part, and nothing is sent.
    x = x.to(like.device)
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def assign(target: Tensor, x: Tensor) -> None:
    """Give `target` the values of `x`, which is sharded as `target` is or the same everywhere."""
    target.copy_(placed(x, target))


def snapshot(x: Any) -> Tensor:
    """A copy on the CPU for a checkpoint; what is sharded stays as it is until it is written."""
    return x.detach() if is_sharded(x) else x.detach().to("cpu", copy=True)


@contextlib.contextmanager
def untouched(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Leave the gradients of `parameters` as they are, whatever the block adds to them."""
    kept = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], limit: float) -> float:
    """Scale all gradients so that their common norm is at most `limit`; the norm before."""
    trained = list(parameters)
    grads = [p.grad for p in trained if p.grad is not None]
    sharded = [local(grad) for grad in grads if is_sharded(grad)]
    if not sharded:
        return float(nn.utils.clip_grad_norm_(trained, limit))
    import torch.distributed as dist

    squares = torch.stack([x.float().square().sum() for x in sharded]).sum()
    dist.all_reduce(squares)
    plain = [grad for grad in grads if not is_sharded(grad)]
    norm = math.sqrt(float(squares) + sum(float(x.float().square().sum()) for x in plain))
    factor = min(1.0, limit / (norm + 1e-6))  # as torch's
    for x in [*sharded, *plain]:
        x.mul_(factor)
    return norm

"""Muon for matrices, AdamW for the rest, a trapezoid schedule, and gradient averaging over gloo.

Muon (Jordan et al., 2024): momentum, then the nearest orthogonal matrix by five Newton-Schulz
iterations. Each process orthogonalises its share of the matrices; one all-reduce spreads them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315  # the quintic of the reference implementation


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Nearly the closest orthogonal matrices to [N, R, C]; singular values end near 0.7..1.2."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum and orthogonalisation; parameters of more than two dimensions are flattened."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.flatten(1).shape, []).append(parameter)
            batches = list(shapes.values())
            updates = [self._momentum(batch, group["momentum"]) for batch in batches]
            for batch, update in zip(batches, _spread(updates), strict=True):
                rows, columns = update.shape[-2:]
                scale = max(1.0, rows / columns) ** 0.5
                for parameter, direction in zip(batch, update, strict=True):
                    parameter.add_(direction.view_as(parameter), alpha=-group["lr"] * scale)

    def _momentum(self, batch: list[nn.Parameter], beta: float) -> Tensor:
        nesterov = []
        for parameter in batch:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - beta)
            nesterov.append(parameter.grad.lerp(state["momentum"], beta).flatten(1))
        return torch.stack(nesterov)


def _spread(updates: list[Tensor]) -> list[Tensor]:
    """Orthogonalise every update, a share of each stack per process."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if world == 1:
        return [orthogonalise(update) for update in updates]
    results = [torch.zeros_like(update) for update in updates]
    for update, result in zip(updates, results, strict=True):
        result[rank::world] = orthogonalise(update[rank::world])
    flat = torch.cat([result.flatten() for result in results])
    dist.all_reduce(flat)
    parts = flat.split([result.numel() for result in results])
    return [part.view_as(result) for part, result in zip(parts, results, strict=True)]


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def trapezoid(step: int, steps: int, warmup: int = 100, decay: float = 0.25) -> float:
    """Learning-rate factor: linear warm-up, constant, linear decay to 0 over the last quarter."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))

"""Low-rank factors between diffusers' layers and the native layers that hold several of them.

Three adapters of rank r on q, k and v are one adapter of rank 3r on the fused layer: A matrices
stacked, B block-diagonal, error 0. The way back finds the blocks and is exact too.

Shapes: A [r, in], B [out, r]; an adapter is B @ A, its scale folded into B.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .keys.table import KeyTable

Factors = tuple[Tensor, Tensor]
"""(A [r, in], B [out, r])."""


def fuse(table: KeyTable, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Adapters of diffusers layers -> adapters of native layers, exactly.

    A fused layer's rank is the sum of the ranks of those of its parts that have an adapter.
    """
    fused: dict[str, Factors] = {}
    for native in dict.fromkeys(table.whole(layer) for layer in factors):
        parts = table.parts(native)
        found = [part for part in parts if part.layer in factors]
        ranks = [factors[part.layer][0].shape[0] for part in found]
        first = factors[found[0].layer][1]
        b, column = first.new_zeros(parts[-1].stop, sum(ranks)), 0
        for part, rank in zip(found, ranks, strict=True):
            rows = part.reorder(factors[part.layer][1])
            b[part.start : part.stop, column : column + rank] = rows
            column += rank
        fused[native] = torch.cat([factors[part.layer][0] for part in found]), b
    return fused


def split(
    table: KeyTable, native: str, a: Tensor, b: Tensor, layers: Collection[str] | None = None
) -> dict[str, Factors]:
    """An adapter of a native layer -> adapters of its diffusers layers; the inverse of `fuse`.

    Each part takes its own block where B is block-diagonal, and otherwise all of A and its rows of
    B.

    Args:
        layers: diffusers layers that are known to have an adapter; None means those with a row
            in B that is not zero.
    """
    every = [(part, b[part.start : part.stop]) for part in table.parts(native)]
    if layers is None:
        found = [(part, rows) for part, rows in every if bool(rows.any())] or every
    else:
        found = [(part, rows) for part, rows in every if part.layer in layers]
    rank = _block_rank([rows for _, rows in found]) if found else 0
    result = {}
    for i, (part, rows) in enumerate(found):
        block = slice(i * rank, (i + 1) * rank) if rank else slice(None)
        result[part.layer] = a[block], part.reorder(rows[:, block])
    return result


def _block_rank(rows: list[Tensor]) -> int:
    """Rank of each block when the rows have a block of columns each; 0 when they do not."""
    rank, rest = divmod(rows[0].shape[1], len(rows))
    if rest or len(rows) == 1:
        return 0
    for i, x in enumerate(rows):
        if x[:, : i * rank].any() or x[:, (i + 1) * rank :].any():
            return 0
    return rank


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """The nearest adapter of a lower rank; `lost` and `total` are squared Frobenius norms."""

    a: Tensor
    b: Tensor
    lost: float
    total: float


def truncate(a: Tensor, b: Tensor, rank: int) -> Truncated:
    """The adapter of rank `rank` nearest to B @ A (Eckart and Young 1936).

    Only matrices as small as the factors are made: with B = Q_b R_b and A^T = Q_a R_a, the singular
    values of B A are those of R_b R_a^T. A rank that is not lower changes nothing.
    """
    if rank >= a.shape[0]:
        return Truncated(a, b, 0.0, _norm2(a, b))
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    new_b, new_a = q_b @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ q_a.T
    lost, total = float(s[rank:].square().sum()), float(s.square().sum())
    return Truncated(new_a.to(a.dtype), new_b.to(b.dtype), lost, total)


def _norm2(a: Tensor, b: Tensor) -> float:
    """Squared Frobenius norm of B @ A, from the factors' Gram matrices."""
    a, b = a.double(), b.double()
    return float(((b.T @ b) * (a @ a.T)).sum())

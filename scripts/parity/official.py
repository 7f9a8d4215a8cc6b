"""The official code, imported from checkouts that are given by path and are left untouched.

Only the modules that are needed are imported, past the packages' `__init__` files, which ask for
CUDA-only or unneeded libraries. Flash attention is replaced at run time by torch's own attention in
float32, segment by segment.

Shapes: B batch, L tokens, N heads, D head width.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def package(alias: str, folder: Path) -> None:
    """Make `folder` importable as the package `alias`, without running its `__init__`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; check the path of the checkout")
    module = ModuleType(alias)
    module.__path__ = [str(folder)]
    sys.modules[alias] = module


def hunyuan(alias: str, root: Path) -> ModuleType:
    """Tencent's `modules/models.py` (or AccVideo's copy) under `root`, able to run on a CPU."""
    package(alias, root)
    package(f"{alias}.modules", root / "modules")
    with _stand_ins("deepspeed", "torch.utils.tensorboard"):
        importlib.import_module(f"{alias}.utils.helpers")
    models = importlib.import_module(f"{alias}.modules.models")
    attention: Any = importlib.import_module(f"{alias}.modules.attenion")
    attention.flash_attn_varlen_func = _varlen_attention
    models.get_cu_seqlens = cu_seqlens  # type: ignore[attr-defined]  # theirs asks for CUDA
    return models


def wan(alias: str, root: Path) -> ModuleType:
    """`wan/modules/model.py` of Wan 2.1 or 2.2 under `root`, able to run on a CPU."""
    package(alias, root)
    package(f"{alias}.modules", root / "modules")
    model: Any = importlib.import_module(f"{alias}.modules.model")
    model.flash_attention = _batch_attention
    return model


def single(alias: str, file: Path) -> ModuleType:
    """One file that imports nothing of its own package."""
    package(alias, file.parent)
    return importlib.import_module(f"{alias}.{file.stem}")


@contextmanager
def _stand_ins(*names: str) -> Iterator[None]:
    """Training libraries that HunyuanVideo-I2V's helpers import and its network does not use."""
    missing = [name for name in names if name not in sys.modules]
    for name in missing:
        module: Any = ModuleType(name)
        module.SummaryWriter = None
        sys.modules[name] = module
    yield
    for name in missing:
        del sys.modules[name]


def hunyuan_args(**widths: Any) -> SimpleNamespace:
    """What HunyuanVideo's constructor reads from the command line."""
    defaults = {"rope_theta": 256, "gradient_checkpoint": False, "gradient_checkpoint_layers": -1}
    return SimpleNamespace(**defaults, **widths)


def hunyuan_rope(
    models: ModuleType, axes: list[int], grid: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the video tokens' positions, as their `inference.py` computes them."""
    name = models.__name__.replace(".models", ".posemb_layers")
    positions = importlib.import_module(name).get_nd_rotary_pos_embed
    return positions(axes, grid, theta=256, use_real=True, theta_rescale_factor=1)


def cu_seqlens(text_mask: Tensor, img_len: int) -> Tensor:
    """Ends of the segments [video + valid text] [padding] of every sample, from 0; [2B + 1]."""
    batch, text_len = text_mask.shape
    starts = torch.arange(batch) * (text_len + img_len)
    valid = starts + img_len + text_mask.sum(dim=1).cpu()
    ends = torch.stack([valid, starts + text_len + img_len], dim=1).flatten()
    return torch.cat([torch.zeros(1, dtype=ends.dtype), ends]).int()


def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, _max_q: int, _max_k: int
) -> Tensor:
    """flash_attn_varlen_func: [B*L, N, D] in segments that do not see one another."""
    out = torch.zeros_like(q)
    q_bounds, k_bounds = cu_q.tolist(), cu_k.tolist()
    for i in range(len(q_bounds) - 1):
        rows, columns = slice(*q_bounds[i : i + 2]), slice(*k_bounds[i : i + 2])
        if rows.start < rows.stop:
            out[rows] = _attention(q[rows][None], k[columns][None], v[columns][None])[0]
    return out


def _batch_attention(
    q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None = None, **_: Any
) -> Tensor:
    """Wan's flash_attention [B, L, N, D] without its cast to half precision."""
    if k_lens is None:
        return _attention(q, k, v)
    lengths = k_lens.tolist()
    rows = [
        _attention(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n]) for i, n in enumerate(lengths)
    ]
    return torch.cat(rows)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)

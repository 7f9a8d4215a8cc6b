"""Stand-ins for attention kernels that are made for GPUs, and for one that takes no mask."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from accvideo_core.models.kernels import ALL, KERNELS, Kernel, Limits

PACKAGES = {
    "xformers": ("xformers.ops", "memory_efficient_attention"),
    "flash2": ("flash_attn", "flash_attn_func"),
    "flash3": ("flash_attn_interface", "flash_attn_func"),
    "sage": ("sageattention", "sageattn"),
}
"""Kernel -> the module and the function that it calls."""


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def let_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """As if a kernel of a package were made for the CPU's numbers."""
    changed = replace(KERNELS[kernel], limits={"cpu": Limits(dtypes=ALL)})
    monkeypatch.setitem(KERNELS, kernel, changed)


def install(monkeypatch: pytest.MonkeyPatch, kernel: str, result: Any = None) -> list[Any]:
    """A package that computes plain attention on the CPU; gives the list of its calls.

    `result` changes what comes out.
    """
    let_run_on_the_cpu(monkeypatch, kernel)
    package, function = PACKAGES[kernel]
    calls: list[Any] = []

    def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        calls.append((q.shape, options))
        out = plain(q, k, v)
        return out if result is None else result(out)

    module = ModuleType(package)
    setattr(module, function, run)
    monkeypatch.setitem(sys.modules, package, module)
    return calls


def add_maskless(monkeypatch: pytest.MonkeyPatch) -> str:
    """A further kernel that computes what torch does but takes no mask; gives its name."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        assert mask is None
        return plain(q, k, v)

    name = "maskless"
    kernel = Kernel(name=name, load=lambda _device: run, limits={"any": Limits()})
    monkeypatch.setitem(KERNELS, name, kernel)
    return name

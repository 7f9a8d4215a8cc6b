"""What a device can do, measured: products of large matrices, and copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .timeline import Timeline

_REPEATS = 5
_LARGE = 8192
"""Rows and columns of the product on an accelerator."""
_SECONDS = 0.02
"""A product on a CPU is enlarged until it lasts so long."""
_COPIED = {"cpu": 2**28}
_COPIED_ELSEWHERE = 2**30
"""Bytes; caches are smaller."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """Rates that a device was seen to reach."""

    device: str
    dtype: str
    size: int
    """Rows and columns of the square matrices."""
    flops: float
    """Floating-point operations a second in a product of theirs."""
    bytes: float
    """Bytes read and written a second in a copy within the device's memory."""
    upload: float | None = None
    """Bytes a second from main memory to the device, None where they are the same."""
    download: float | None = None
    """Bytes a second back."""


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Measure in a second or two; `dtype` is that of the matrices."""
    size, flops = _product_rate(device, dtype)
    upload = download = None
    count = _COPIED.get(device.type, _COPIED_ELSEWHERE)
    here = torch.zeros(count, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    copying = 2 * count / _best(device, lambda: there.copy_(here))
    if device.type != "cpu":
        host = torch.zeros(count // 4, dtype=torch.uint8)
        part = here[: len(host)]
        upload = len(host) / _best(device, lambda: part.copy_(host))
        download = len(host) / _best(device, lambda: host.copy_(part))
    name = str(dtype).removeprefix("torch.")
    return Peaks(device_name(device), name, size, flops, copying, upload, download)


def device_name(device: torch.device) -> str:
    """What people call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)


def _product_rate(device: torch.device, dtype: torch.dtype) -> tuple[int, float]:
    """(size, operations a second)."""
    size = _LARGE if device.type != "cpu" else 512
    while True:
        # Random, because a card draws less power for zeros and ones, and is faster for it.
        generator = torch.Generator(device).manual_seed(0)
        a = torch.rand(size, size, generator=generator, device=device).to(dtype)
        out = torch.empty_like(a)
        took = _best(device, partial(torch.mm, a, a, out=out))
        if device.type != "cpu" or size >= _LARGE or took >= _SECONDS:
            return size, 2 * size**3 / took
        size *= 2


def _best(device: torch.device, work: Callable[[], object]) -> float:
    """The fewest seconds of several calls, after one that only warms up."""
    work()
    timeline, found = Timeline(device), []
    for _ in range(_REPEATS):
        start = timeline.mark()
        work()
        found.append((start, timeline.mark()))
    timeline.wait()
    return max(1e-9, min(timeline.seconds(*each) for each in found))

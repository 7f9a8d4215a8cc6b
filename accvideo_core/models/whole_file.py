"""WholeFile: how some families' network, VAE and encoders lie together in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import Later


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeFile:
    """What a family's checkpoints hold beside the network, in and out."""

    network: str
    """Prefix of the network's tensors."""
    is_whole: Callable[[Iterable[str]], bool]
    """(names of a file's tensors) -> whether all parts are there."""
    load_pipeline: Callable[[Path, torch.dtype], Any]
    """(file, number format) -> diffusers' pipeline without network and VAE."""
    others: Callable[[Path], dict[str, Later]]
    """(whole file or pipeline folder) -> every tensor of a whole file but the network's."""
    write_parts: Callable[[Path, Path], None]
    """(whole file, folder) -> writes everything but the network as a pipeline folder."""

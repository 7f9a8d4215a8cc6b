"""Checkpoints of sharded weights: a folder that all processes write at once (torch's DCP).

    <run>/checkpoints/<step>/shard-....safetensors     what one process held, with its place
    <run>/checkpoints/<step>/manifest.json             the files and their sizes

The folder is written under another name and renamed when all of it is on the disk. Any number of
processes can read it, one too.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AccVideoError
from ..files import disk_errors, read_json, write_json
from ..ranks import Ranks
from .sharded_tensors import is_sharded

MANIFEST = "manifest.json"


def save_sharded(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write `tensors`, whole or not at all. All processes must call this.

    Raises:
        AccVideoError: the disk is full or denies writing.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    _storage()
    temp = folder.with_name(f".{folder.name}.partial")
    with disk_errors("write", folder):
        if ranks.first:
            for old in folder.parent.glob(".*.partial"):
                shutil.rmtree(old)
            temp.mkdir(parents=True)
        ranks.wait()
        try:
            writer = dcp.HuggingFaceStorageWriter(str(temp), save_distributed=True)
            dcp.save(dict(tensors), storage_writer=writer)
        except CheckpointException as error:
            reasons = "; ".join(sorted({str(found[0]) for found in error.failures.values()}))
            raise AccVideoError(
                f"cannot write {folder} ({reasons}); free space there and start again, the last "
                "checkpoint is untouched"
            ) from error
        if ranks.first:
            sizes = {path.name: path.stat().st_size for path in sorted(temp.iterdir())}
            write_json(temp / MANIFEST, sizes)
            if folder.exists():  # a damaged one, which the run went back before
                shutil.rmtree(folder)
            os.replace(temp, folder)
        ranks.wait()


def load_sharded(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder, those of sharded parameters sharded alike. All processes call this.

    Args:
        like: the parameters by name. A tensor is one's own if its name ends in "/<name>" or
            ":<name>" and its shape is the parameter's.

    Raises:
        AccVideoError: the folder is not whole.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    _storage()
    _check_whole(folder)
    known = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {name: _empty(name, found, like) for name, found in known.items()}
    alone = not (dist.is_available() and dist.is_initialized())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, no_dist=alone)
    return tensors


def _empty(name: str, found: Any, like: Mapping[str, Tensor]) -> Tensor:
    """A tensor to read into."""
    dtype = found.properties.dtype
    parameter = like.get(name.partition("/")[2].rpartition(":")[2])
    if parameter is not None and is_sharded(parameter) and parameter.shape == found.size:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(found.size, dtype=dtype)


def _check_whole(folder: Path) -> None:
    sizes = read_json(folder / MANIFEST)
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise AccVideoError(f"{path} is missing or truncated; delete {folder} and go on")


def _storage() -> None:
    import torch.distributed.checkpoint as dcp

    if not hasattr(dcp, "HuggingFaceStorageReader"):
        raise AccVideoError(
            f"torch {torch.__version__} cannot keep sharded weights in safetensors files; install "
            "torch 2.9 or newer, or train a LoRA"
        )

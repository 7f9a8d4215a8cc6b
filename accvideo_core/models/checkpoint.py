"""Checkpoint: a weights file in any format that users have, opened without reading its tensors.

Names, shapes and dtypes come from headers. A tensor is read when it is asked for, by memory map
wherever the format allows: no copy is made, and the system fetches its pages when they are used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AccVideoError
from ..files import disk_errors, read_json
from .weights_file import Entry, GgufFile, SafetensorsFile, TorchFile, WeightsFile

SUFFIXES = (".safetensors", ".gguf", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.\w+)$")
_DIFFUSERS = "diffusion_pytorch_model.safetensors"
_LFS = b"version https://git-lfs"


class Checkpoint:
    """The tensors of one or several files, by the keys that the files have."""

    def __init__(self, path: Path, files: Sequence[WeightsFile]) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self._holder: dict[str, WeightsFile] = {}
        for file in files:
            self.metadata |= file.metadata
            self.entries |= file.entries
            self._holder |= dict.fromkeys(file.entries, file)
        if not self.entries:
            raise AccVideoError(f"{str(path)!r} holds no tensors; choose a file with weights")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype | None]:
        return {name: entry.dtype for name, entry in self.entries.items()}

    @property
    def bytes(self) -> int:
        """Size of all tensors as they are stored."""
        return sum(entry.nbytes for entry in self.entries.values())

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU as it is stored (packed GGUF: its bytes), mapped where possible.

        Writing to it never reaches the file.
        """
        if self.entries[name].dtype is None:
            raise AccVideoError(
                f"{name!r} in {str(self.path)!r} is stored in a number format that torch cannot "
                "read; use a bf16, fp8 or GGUF file of the model"
            )
        # What is made in ComfyUI's inference mode could never be trained against.
        with torch.inference_mode(False):
            return self._holder[name].get(name)

    def forget(self, name: str) -> None:
        """Give back the memory of a tensor's mapped pages, which are read again when needed."""
        self._holder[name].forget(name)

    def close(self) -> None:
        """Let go of the files; tensors that were got stay valid."""
        self._holder.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a weights file, a set of shards (by any one, its index or its folder).

    Raises:
        AccVideoError: it is missing, empty, damaged, unreadable, incomplete or of no known format.
    """
    path = Path(path)
    files = _files_of(path)
    return Checkpoint(path, [_open(file) for file in files])


def _files_of(path: Path) -> list[Path]:
    if not path.exists():
        raise AccVideoError(f"{str(path)!r} does not exist; check the path")
    if path.is_dir():
        return _files_in(path)
    if path.name.endswith(".index.json"):
        return _indexed(path)
    shard = _SHARD.match(path.name)
    if shard is None:
        return [path]
    total = int(shard["total"])
    names = [
        f"{shard['stem']}-{i + 1:05d}-of-{shard['total']}{shard['suffix']}" for i in range(total)
    ]
    return _complete(path, [path.with_name(name) for name in names])


def _files_in(folder: Path) -> list[Path]:
    """The one checkpoint in a folder."""
    with disk_errors("read", folder):
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    for name in (_DIFFUSERS, f"{_DIFFUSERS}.index.json"):
        if name in names:  # beside which a repository may hold other variants
            return _files_of(folder / name)
    index = [name for name in names if name.endswith(".safetensors.index.json")]
    if len(index) == 1:
        return _indexed(folder / index[0])
    found = [name for name in names if name.endswith(SUFFIXES)]
    found = [name for name in found if name.endswith(".safetensors")] or found
    sets = {shard["stem"] if (shard := _SHARD.match(name)) else name for name in found}
    if len(sets) == 1:
        return _files_of(folder / found[0])
    if not sets:
        raise AccVideoError(
            f"folder {str(folder)!r} holds no weights ({', '.join(SUFFIXES)}); choose the file, "
            "or download the model again"
        )
    raise AccVideoError(
        f"folder {str(folder)!r} holds {len(sets)} checkpoints ({', '.join(sorted(sets)[:3])}); "
        "choose one of the files"
    )


def _indexed(index: Path) -> list[Path]:
    data = read_json(index)
    weights = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(n, str) for n in weights.values()):
        raise AccVideoError(f"{str(index)!r} is not an index of shards; download it again")
    names = sorted(set(weights.values()))
    if any(Path(name).name != name for name in names):
        raise AccVideoError(f"{str(index)!r} names files in other folders; download it again")
    return _complete(index, [index.with_name(name) for name in names])


def _complete(path: Path, files: list[Path]) -> list[Path]:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise AccVideoError(
            f"{len(missing)} of the {len(files)} shards of {str(path)!r} are missing, "
            f"{missing[0]!r} among them; download them into the same folder"
        )
    return files


def _open(path: Path) -> WeightsFile:
    if path.suffix.lower() not in SUFFIXES:
        raise AccVideoError(
            f"{str(path)!r} has no ending of a weights file; choose one of {', '.join(SUFFIXES)}"
        )
    with disk_errors("read", path), open(path, "rb") as file:
        start = file.read(len(_LFS))
    if not start:
        raise AccVideoError(f"{str(path)!r} is empty; download it again")
    if start == _LFS:
        raise AccVideoError(
            f"{str(path)!r} is a pointer of Git LFS and not the weights; run git lfs pull there"
        )
    opener = {".safetensors": SafetensorsFile, ".gguf": GgufFile}.get(
        path.suffix.lower(), TorchFile
    )
    return opener(path)

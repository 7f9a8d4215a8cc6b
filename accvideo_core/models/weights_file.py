"""The three kinds of weights file: safetensors, what torch.save writes, and GGUF.

Each knows its tensors from its header and reads one when it is asked for, by memory map.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import AccVideoError
from ..files import DTYPE_NAMES, MAX_HEADER, disk_errors

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
"""safetensors' names; what is not here (4-bit floats and the like) is known by name only."""

WRAPPERS = ("module", "ema", "state_dict", "model")
"""Keys under which official .pt files hold the network, in the order in which they are tried."""

_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE, from Python 3.13


@dataclass(frozen=True, slots=True)
class Entry:
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    """Of the numbers; a GGUF tensor's bytes have another."""
    dtype: torch.dtype | None
    """Of what `get` returns: uint8 for packed GGUF; None where torch has no such dtype."""
    nbytes: int
    quant_type: int | None = None
    """gguf's number of the block format."""


class WeightsFile(Protocol):
    """One file of a checkpoint."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def get(self, name: str) -> Tensor: ...

    def forget(self, name: str) -> None: ...


def _damaged(path: Path, reason: object) -> AccVideoError:
    return AccVideoError(f"{str(path)!r} is damaged or cut short ({reason}); download it again")


class SafetensorsFile:
    """Mapped privately, so that nobody's writing reaches the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors("read", path), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise _damaged(path, "its header does not fit in it")
            header = file.read(length)
            self._map = _map(file.fileno(), size)
        self._start = 8 + length
        self.metadata, self._spans, self.entries = self._parse(header, size - self._start)

    def _parse(
        self, raw: bytes, size: int
    ) -> tuple[dict[str, str], dict[str, tuple[int, int]], dict[str, Entry]]:
        try:
            header = json.loads(raw)
            metadata = {str(k): str(v) for k, v in (header.pop("__metadata__", None) or {}).items()}
            spans, entries = {}, {}
            for name, value in header.items():
                begin, end = (int(x) for x in value["data_offsets"])
                shape, dtype = tuple(int(x) for x in value["shape"]), DTYPES.get(value["dtype"])
                if not 0 <= begin <= end:
                    raise ValueError(f"{name!r} lies nowhere")
                if end > size:
                    raise _damaged(self.path, f"{name!r} ends after the file")
                if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
                    raise ValueError(f"{name!r} has another size than its shape")
                spans[name], entries[name] = (begin, end), Entry(shape, dtype, end - begin)
            return metadata, spans, entries
        except AccVideoError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(self.path, "its header cannot be read") from error

    def get(self, name: str) -> Tensor:
        entry, (begin, end) = self.entries[name], self._spans[name]
        assert entry.dtype is not None
        if begin == end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        raw = torch.frombuffer(
            self._map, dtype=torch.uint8, count=end - begin, offset=self._start + begin
        )
        if (self._start + begin) % entry.dtype.itemsize:
            raw = raw.clone()  # a header whose length is odd
        return raw.view(entry.dtype).reshape(entry.shape)

    def forget(self, name: str) -> None:
        begin, end = (self._start + x for x in self._spans[name])
        begin += -begin % mmap.PAGESIZE
        end -= end % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and begin < end:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _map(handle: int, size: int) -> mmap.mmap:
    if not _NORESERVE:
        return mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
    # Linux would count a private map against main memory and refuse large ones.
    flags = mmap.MAP_PRIVATE | _NORESERVE
    return mmap.mmap(handle, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


class TorchFile:
    """What torch.save wrote, without running any code of it."""

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        with disk_errors("read", path), open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        try:
            # The format before torch 1.6 cannot be mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # the unpickler raises whatever the bytes lead it to
            raise _refused(path, error) from error
        self._tensors = _unwrap(loaded)
        self.entries = {
            name: Entry(tuple(x.shape), x.dtype, x.numel() * x.element_size())
            for name, x in self._tensors.items()
        }

    def get(self, name: str) -> Tensor:
        return self._tensors[name]

    def forget(self, name: str) -> None:
        """Torch keeps its map to itself."""


def _refused(path: Path, error: Exception) -> AccVideoError:
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named is None:
        return _damaged(path, "it is no complete file of torch.save")
    return AccVideoError(
        f"{str(path)!r} holds Python objects beside weights ({named[1]}), which could run code "
        "and are not loaded; use a .safetensors file of the model"
    )


def _unwrap(loaded: Any) -> dict[str, Tensor]:
    """The network's tensors, which official files keep under a key of their own."""
    while isinstance(loaded, Mapping):
        inner = [loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping)]
        if not inner:
            return {str(name): x for name, x in loaded.items() if isinstance(x, Tensor)}
        loaded = inner[0]
    return {}


@dataclass(slots=True)
class _GgufTensor:
    entry: Entry
    data: Any = field(repr=False)
    """numpy array over the mapped file."""


class GgufFile:
    """llama.cpp's format through the package gguf; block formats stay packed."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise AccVideoError(
                f"reading {path.name!r} needs the package gguf; install it with pip install gguf"
            ) from error
        try:
            reader = GGUFReader(path, "c")  # copy on write
            self._tensors = {x.name: _gguf_tensor(reader, x) for x in reader.tensors}
        except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
            raise _damaged(path, "it is no complete GGUF file") from error
        self.metadata = {
            name: bytes(value.parts[value.data[0]]).decode(errors="replace")
            for name, value in reader.fields.items()
            if value.types and value.types[0].name == "STRING"
        }
        self.entries = {name: x.entry for name, x in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        entry, data = self._tensors[name].entry, torch.from_numpy(self._tensors[name].data)
        if entry.quant_type is not None:
            return data
        assert entry.dtype is not None
        return data.view(entry.dtype).reshape(entry.shape)

    def forget(self, name: str) -> None:
        """Packed weights stay mapped, and the rest is small."""


def _gguf_tensor(reader: Any, tensor: Any) -> _GgufTensor:
    kind = tensor.tensor_type.name
    shape = tuple(int(x) for x in reversed(tensor.shape))
    # ComfyUI-GGUF notes the shapes of tensors that the format cannot hold as they are.
    noted = reader.fields.get(f"comfy.gguf.orig_shape.{tensor.name}")
    if noted is not None:
        shape = tuple(int(noted.parts[i][0]) for i in noted.data)
    plain = DTYPES.get(kind)  # the two formats name plain numbers alike
    if plain is None:
        return _GgufTensor(
            Entry(shape, torch.uint8, tensor.n_bytes, int(tensor.tensor_type)), tensor.data
        )
    return _GgufTensor(Entry(shape, plain, tensor.n_bytes), tensor.data)

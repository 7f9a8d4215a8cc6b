"""Writing files that exist whole or not at all, and reading them with one clear sentence.

Everything this project writes goes to a temporary name beside the target, is flushed to the disk
and renamed. Whoever reads sees the old file or the new one, never a part of one.

Tensors lie in safetensors files, written here rather than by the library, whose header order
changes between processes: the same tensors and metadata give the same bytes everywhere. The header
carries a SHA-256 over names, shapes, metadata and data, checked whenever tensors are read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import AccVideoError

CHECKSUM = "accvideo_checksum"
"""Metadata key of the checksum; `read_safetensors` takes it out again."""

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' name of each dtype."""

_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
MAX_HEADER = 100_000_000  # the safetensors format's own limit


@contextlib.contextmanager
def disk_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn the system's errors while `doing` ("read", "write") `path` into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            remedy = "free space there or choose another folder, and start again; what was finished"
            remedy += " before is untouched"
        elif error.errno in _DENIED:
            remedy = f"allow this user to {doing} there or choose another folder"
        else:
            remedy = "check the path and the disk"
        reason = error.strerror or str(error)
        raise AccVideoError(f"cannot {doing} {path} ({reason}); {remedy}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there becomes `path` when the block ends.

    When the block raises, the temporary file is removed and `path` is as it was. Parent folders
    are made. Raises AccVideoError when the disk is full or denies writing.
    """
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with disk_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temp
            _sync(temp)
            os.replace(temp, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temp.unlink()
            raise
        _sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` whole or not at all."""
    with replacing(path) as temp, open(temp, "wb") as file:
        file.write(data)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(data, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises AccVideoError for a missing or foreign file."""
    with disk_errors("read", path):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except ValueError as error:
        raise AccVideoError(f"{path} is not JSON ({error}); delete it and make it again") from error


def append_lines(path: Path, text: str) -> None:
    """Append `text`, which ends with a newline, on a line of its own.

    A line that an interrupted append left unfinished stays behind as a line of its own, which its
    reader skips.
    """
    with disk_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else "\n" + text
            data = memoryview(text.encode())
            while data:
                data = data[file.write(data) or 0 :]
            os.fsync(file.fileno())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` for the block, waiting for whoever holds it now.

    The system lets go of the lock when its holder dies, however that happens. The value is whether
    it is held: on Windows and on some network disks there is none, and callers must be harmless, if
    untidy, without it.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with disk_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")
    with file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _LOCKLESS:
                raise
            held = False
        yield held


@dataclass(frozen=True, slots=True, eq=False)
class Later:
    """A tensor that is made when it is written and then forgotten, so that one at a time exists."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor | Later], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (any device and shape) and string metadata, whole or not at all.

    The bytes follow from the arguments alone. Memory beside `tensors` is that of the largest one
    that has to be made or moved. Raises AccVideoError when the disk is full.
    """
    # Widest elements first keeps every tensor aligned, as the format asks; then by name.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, Any] = {}
    offset = 0
    for name in names:
        shape, dtype = list(tensors[name].shape), tensors[name].dtype
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    meta = dict(sorted((metadata or {}).items()))
    digest = _digest(meta, entries)
    with replacing(path) as temp, open(temp, "wb") as file:
        # The checksum is known last and has a fixed length: the header is written twice.
        file.write(_header(meta, digest.hexdigest(), entries))
        for name in names:
            buffer = _made(name, tensors[name])
            digest.update(buffer)
            file.write(buffer)
        file.seek(0)
        file.write(_header(meta, digest.hexdigest(), entries))


def _header(meta: Mapping[str, str], checksum: str, entries: Mapping[str, Any]) -> bytes:
    whole = {"__metadata__": {**meta, CHECKSUM: checksum}, **entries}
    header = json.dumps(whole, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _made(name: str, x: Tensor | Later) -> memoryview:
    if not isinstance(x, Later):
        return _raw(x)
    made = x.make()
    if (tuple(made.shape), made.dtype) != (tuple(x.shape), x.dtype):
        raise ValueError(f"{name} is {tuple(made.shape)} {made.dtype}, not {x.shape} {x.dtype}")
    return _raw(made)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (CPU) and the metadata of a file written by `write_safetensors`.

    Raises AccVideoError for a missing, truncated, damaged or foreign file.
    """
    header = _read_header(path)
    meta = header.pop("__metadata__")
    stored = meta.pop(CHECKSUM)
    try:
        with disk_errors("read", path), safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in header}
    except SafetensorError as error:
        raise AccVideoError(f"{path} is damaged ({error}); delete it and make it again") from error
    if _checksum(meta, header, map(_raw, tensors.values())) != stored:
        raise AccVideoError(
            f"{path} is damaged: its content does not match its checksum; "
            "delete it and make it again"
        )
    return tensors, meta


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone, without reading the tensors or checking their content."""
    meta = _read_header(path)["__metadata__"]
    return {name: text for name, text in meta.items() if name != CHECKSUM}


def remove_leftovers(folder: Path, pattern: str = "**", older_than: float = 3600.0) -> None:
    """Remove the temporary files that killed writers left in `folder`'s subfolders like `pattern`.

    Those younger than `older_than` seconds may still be in a writer's hands.
    """
    with disk_errors("clean", folder):
        found = list(folder.glob(f"{pattern}/.*.tmp"))
        now = disk_time(folder) if found else 0.0
        for path in found:
            with contextlib.suppress(FileNotFoundError):
                if now - path.stat().st_mtime >= older_than:
                    path.unlink()


def disk_time(folder: Path) -> float:
    """The time by the clock that gives `folder`'s files their times; machines may disagree."""
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        probe.write_bytes(b".")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _read_header(path: Path) -> dict[str, Any]:
    """The header of one of our files, with tensors in the order of their data."""
    with disk_errors("read", path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        foreign = size >= 8 and not 2 <= length <= MAX_HEADER
        raw = b"" if foreign else file.read(length)
    header = None if foreign else _parse(raw)
    if size < 8 or (not foreign and size < 8 + length):
        raise AccVideoError(
            f"{path} is truncated: it ends inside its header after {size} bytes; "
            "delete it and make it again"
        )
    if header is None or CHECKSUM not in header["__metadata__"]:
        raise AccVideoError(
            f"{path} is damaged or was not written by AccVideo: it has no header of ours; "
            "delete it and make it again, or choose another file"
        )
    expected = 8 + length + max((entry["data_offsets"][1] for entry in _entries(header)), default=0)
    if size != expected:
        raise AccVideoError(
            f"{path} is truncated or damaged: it has {size} bytes instead of {expected}; "
            "delete it and make it again"
        )
    return header


def _entries(header: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [entry for name, entry in header.items() if name != "__metadata__"]


def _parse(raw: bytes) -> dict[str, Any] | None:
    """The header, or None when it is not one that this project writes."""
    try:
        header = json.loads(raw)
        meta = header["__metadata__"]
        spans = [entry["data_offsets"] for entry in _entries(header)]
        whole = all(isinstance(text, str) for text in meta.values())
        return header if whole and all(0 <= begin <= end for begin, end in spans) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _checksum(
    meta: Mapping[str, str], entries: Mapping[str, Any], buffers: Iterable[memoryview]
) -> str:
    digest = _digest(meta, entries)
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()


def _digest(meta: Mapping[str, str], entries: Mapping[str, Any]) -> hashlib._Hash:
    """A SHA-256 that has seen the header; the data follow in their order."""
    return hashlib.sha256(json.dumps([meta, entries], sort_keys=True).encode())


def _raw(x: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it already lies contiguous on the CPU."""
    flat = x.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable. Windows and some network disks cannot, and need not."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

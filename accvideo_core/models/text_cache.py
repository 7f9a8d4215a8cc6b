"""Encoded prompts on disk, so that text encoders run once for a prompt and then need no loading.

An entry's name is a hash of what its numbers follow from: the text and the image, the files of the
text encoders, the number format that they compute in, and the libraries. Nothing else ever reads
it, and nothing has to be thrown away by hand when a model changes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..conditioning import Condition
from ..errors import AccVideoError
from ..files import disk_errors, read_safetensors, write_safetensors

VERSION = 1
"""Of what an entry holds; another one is never read."""
_WHOLE = 2**20
"""Bytes up to which all of a file counts."""
_SAMPLES, _SAMPLE = 256, 2**12
"""Pieces of a larger file that count, and their bytes: hashing 11 GB would take as long as loading
them."""
_LIBRARIES = ("diffusers", "transformers")
_log = logging.getLogger(__name__)


class TextCache:
    """Conditions in a folder, by the hash of what they were made from."""

    def __init__(self, folder: Path, encoder: str) -> None:
        """`encoder` says what encodes: equal where, and only where, the same numbers come out."""
        self.folder = folder
        self.encoder = encoder
        self._writing = True

    def key(self, text: str, image: Tensor | None = None, frames: int = 1) -> str:
        """The name of an entry; `image` [H, W, 3] is what a video of `frames` begins with."""
        digest = hashlib.sha256(json.dumps([VERSION, self.encoder, text]).encode())
        if image is not None:
            plain = image.detach().float().cpu().contiguous()
            digest.update(json.dumps([frames, *plain.shape]).encode())
            digest.update(plain.numpy().tobytes())
        return digest.hexdigest()

    def get(self, key: str, encode: Callable[[], Condition]) -> Condition:
        """An entry, on the CPU, or what `encode` gives, which is kept."""
        found = self._read(key)
        if found is None:
            found = encode()
            self._write(key, found)
        return found

    def _read(self, key: str) -> Condition | None:
        """None where there is no entry, or a damaged one, which is said."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            tensors, metadata = read_safetensors(path)
            if metadata.get("key") != key:
                raise AccVideoError(f"{path} holds another prompt than its name says")
            return Condition(**tensors)
        except (AccVideoError, TypeError) as error:  # TypeError: tensors of other names
            _log.warning("encoding a prompt again, because %s", error)
            return None

    def _write(self, key: str, condition: Condition) -> None:
        """A folder that takes no more is said once, and does no other harm."""
        if not self._writing:
            return
        try:
            write_safetensors(self._path(key), condition.tensors(), {"key": key})
        except AccVideoError as error:
            self._writing = False
            _log.warning("encoded prompts are not kept, because %s", error)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def encoder_name(parts: Iterable[Path], dtype: torch.dtype) -> str:
    """What a `TextCache` is told of encoders and tokenizers that lie in `parts`, files or folders.

    It follows from what lies there and not from where that is. Of large files a sample counts.
    """
    digest = hashlib.sha256()
    for part in parts:
        for path in _files(part):
            name = path.relative_to(part.parent).as_posix()
            digest.update(json.dumps([name, _content(path)]).encode())
    libraries = [f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES]
    return ", ".join([digest.hexdigest(), str(dtype), *libraries])


def _files(part: Path) -> list[Path]:
    with disk_errors("read", part):
        found = [part] if part.is_file() else sorted(part.rglob("*"))
        # Downloads leave their own notes beside the files.
        return [p for p in found if p.is_file() and not p.name.startswith(".")]


def _content(path: Path) -> str:
    """A hash of a file's size and of its bytes, or of a sample of them."""
    with disk_errors("read", path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        if size <= _WHOLE:
            digest.update(file.read())
            return digest.hexdigest()
        for number in range(_SAMPLES):  # from the first bytes to the last
            file.seek(number * (size - _SAMPLE) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()

"""Export to WebDataset: tar files of a fixed order that other trainers stream.

    export.json   whose trajectories these are (dataset.json's content) and how they were exported
    00000.tar     the samples' files, one sample after the other, see `Export`
    shards.json   samples per tar; written last, so it says that the export is complete

The same records give the same bytes, whoever exports them: files are in order of the records' ids
and carry neither times nor owners. Each tar exists whole or not at all.

Shapes: K kept times, C channels, T latent frames, H, W latent size, L text tokens, D text width.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AccVideoError
from ..files import (
    disk_errors,
    locked,
    read_json,
    remove_leftovers,
    replacing,
    write_bytes,
    write_json,
)
from ..monitor import Monitor, Progress, silent
from .listing import read_listing
from .store import TrajectoryDataset

FORMAT = 1
LOCK_FILE = ".export.lock"
TENSORS = ("safetensors", "npy")
_NPY_NAMES = {"text": "txt_emb"}
_TAR: dict[str, Any] = {"format": tarfile.GNU_FORMAT}
_BLOCK = 512
_END = 10240  # tarfile fills up the end of an archive to whole records of this size
_MOST_FILES = 10


@dataclass(frozen=True, slots=True)
class Export:
    """How a dataset is exported.

    `tensors` is "safetensors", the records' own files bit for bit:
        <id>.latents.safetensors    `latents` [K, C, T, H, W]
        <id>.condition.safetensors  the fields of the prompt's Condition, with `conditions`
    or "npy", which WebDataset decodes by itself (bfloat16, unknown to numpy, becomes float32):
        <id>.path.npy [K - 1, C, T, H, W], <id>.latent.npy [C, T, H, W] the finished video
        <id>.txt_emb.npy [L, D], <id>.pooled.npy [P], ..., with `conditions`
    and always <id>.json (times, seed, guidance, ...) and <id>.txt, the prompt.
    """

    shard_size: int = 10**9
    """Bytes that no tar exceeds, unless it holds a single sample."""
    tensors: str = "safetensors"
    conditions: bool = False
    text_length: int | None = None
    """Text embeddings as npy are filled up with zeros to this length, so that they can be
    batched; None leaves each at its own."""

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise AccVideoError(f"shard_size is {self.shard_size}; give a size such as 1GB")
        if self.tensors not in TENSORS:
            raise AccVideoError(f"tensors {self.tensors!r} is unknown; use {' or '.join(TENSORS)}")
        if self.text_length is not None and self.tensors != "npy":
            raise AccVideoError(
                "text_length is for npy files; safetensors hold every text at its own length"
            )


def export_webdataset(
    dataset: TrajectoryDataset, out: Path, how: Export, monitor: Monitor = silent
) -> list[Path]:
    """Write the tars of `dataset` into `out`, and go on where an earlier export stopped.

    Raises AccVideoError for a damaged record, for a folder that holds anything else, also an export
    of other records or made otherwise, and for a full disk.
    """
    out = Path(out)
    samples = _Samples(dataset, how)
    shards = samples.shards()
    _begun(out, samples)  # raises before a lock file is put into a foreign folder
    with locked(out / LOCK_FILE) as alone:
        if not _begun(out, samples):
            write_json(out / "export.json", samples.facts())
        # Tars are large: what a killed export left half written goes at once.
        remove_leftovers(out, older_than=0 if alone else 3600)
        _write_shards(out, samples, shards, monitor)
    return [out / name for name in shards]


def _write_shards(
    out: Path, samples: _Samples, shards: Mapping[str, Sequence[str]], monitor: Monitor
) -> None:
    """Write what is not there yet, each file whole or not at all."""
    for file, data in samples.negative():
        if not (out / file).exists():
            write_bytes(out / file, data)
    done = 0
    for name, ids in shards.items():
        if not (out / name).exists():
            with replacing(out / name) as temp, tarfile.open(temp, "w", **_TAR) as tar:
                for number, id in enumerate(ids, start=done):
                    _report(monitor, number, len(samples.heads))
                    for file, data in samples.files(id):
                        tar.addfile(_entry(file, len(data)), io.BytesIO(data))
        done += len(ids)
        _report(monitor, done, len(samples.heads))
    write_json(out / "shards.json", {name: len(ids) for name, ids in shards.items()})


def _begun(out: Path, samples: _Samples) -> bool:
    """Whether this very export was begun in `out`; raises when something else is there."""
    asked = json.loads(json.dumps(samples.facts()))
    with disk_errors("read", out):
        found = sorted(p.name for p in out.iterdir()) if out.exists() else []
    found = [name for name in found if not name.startswith(".")]
    if "export.json" in found:
        if read_json(out / "export.json") != asked:
            raise AccVideoError(
                f"{out} holds an export of other records, or one made otherwise; choose another "
                "folder"
            )
    elif found:
        raise AccVideoError(f"{out} is no export but holds {found[0]!r}; choose another folder")
    return bool(found)


class _Samples:
    """The records of a dataset as the files of WebDataset samples."""

    def __init__(self, dataset: TrajectoryDataset, how: Export) -> None:
        self.dataset, self.how = dataset, how
        self.texts = read_listing(dataset.folder).texts
        self.heads = {head.id: head for head in sorted(dataset.headers(), key=lambda h: h.id)}
        name, last = dataset.folder.name, dataset.info.times[-1]
        if not self.heads:
            raise AccVideoError(f"dataset {name!r} has no records; record some first")
        if how.tensors == "npy" and last != 0:
            raise AccVideoError(
                f"the last stored state is at time {last:g}, which is no finished video; export as "
                "safetensors, or record with the last state"
            )

    def facts(self) -> dict[str, Any]:
        """What export.json says; two exports with the same facts have the same tars."""
        return {
            "format": FORMAT,
            "how": asdict(self.how),
            "records": len(self.heads),
            "records_sha256": hashlib.sha256("\n".join(self.heads).encode()).hexdigest(),
            "dataset": self.dataset.info.as_dict(),
        }

    def shards(self) -> dict[str, list[str]]:
        """Record ids by tar, as many in each (but the last) as `shard_size` surely has room for."""
        ids = list(self.heads)
        count = max(1, (self.how.shard_size - _END) // max(map(self._room, ids)))
        parts = [ids[i : i + count] for i in range(0, len(ids), count)]
        return {f"{number:05d}.tar": part for number, part in enumerate(parts)}

    def files(self, id: str) -> list[tuple[str, bytes]]:
        """Name and content of every file of one sample, in their order in the tar."""
        found = self.dataset.read(id)
        files = [("json", self._json(id)), ("txt", self.texts.get(found.prompt_id, "").encode())]
        if self.how.tensors == "npy":
            arrays = {"path": found.latents[:-1], "latent": found.latents[-1]}
            files += [(f"{name}.npy", _npy(x)) for name, x in arrays.items()]
        else:
            files.append(("latents.safetensors", self.dataset.record_path(id).read_bytes()))
        if self.how.conditions:
            files += self._condition(found.prompt_id, "condition.safetensors")
        return [(f"{id}.{name}", data) for name, data in files]

    def negative(self) -> list[tuple[str, bytes]]:
        """The files of the negative prompt, which all samples share."""
        id = self.dataset.info.negative
        files = self._condition(id, "safetensors") if id and self.how.conditions else []
        return [(f"negative.{name}", data) for name, data in files]

    def _condition(self, prompt_id: str, name: str) -> list[tuple[str, bytes]]:
        prompt = self.dataset.prompt(prompt_id)
        if self.how.tensors != "npy":
            return [(name, self.dataset.prompt_path(prompt_id).read_bytes())]
        length, text = self.how.text_length, prompt.condition.text
        if length is not None and text.shape[1] > length:
            raise AccVideoError(
                f"prompt {prompt.text or prompt_id!r} has {text.shape[1]} tokens, more than the "
                f"text length {length}; choose a greater one"
            )
        tensors = {name: x[0] for name, x in prompt.condition.tensors().items()}
        tensors.pop("guidance", None)
        if length is not None:
            along = {"text", "mask"} & tensors.keys()
            tensors |= {name: _padded(tensors[name], length) for name in along}
        return [(f"{_NPY_NAMES.get(name, name)}.npy", _npy(x)) for name, x in tensors.items()]

    def _json(self, id: str) -> bytes:
        info, head = self.dataset.info, self.heads[id]
        facts = {
            "id": id,
            "prompt": self.texts.get(head.prompt_id, ""),
            "prompt_id": head.prompt_id,
            "seed": info.seed,
            "sample": head.sample,
            "times": info.times,
            "guidance": info.guidance,
            "cfg": None if info.cfg is None else asdict(info.cfg),
            "family": info.family,
            "teacher": info.teacher,
            "frames": info.frames,
            "height": info.height,
            "width": info.width,
        }
        return (json.dumps(facts) + "\n").encode()

    def _room(self, id: str) -> int:
        """Bytes of a tar that one sample takes at most."""
        info, prompt_id = self.dataset.info, self.heads[id].prompt_id
        wide = self.how.tensors == "npy"
        sizes = [len(self._json(id)), len(self.texts.get(prompt_id, "").encode())]
        if wide:
            sizes.append(4 * len(info.kept) * math.prod(info.shape))
        else:
            sizes.append(self.dataset.record_path(id).stat().st_size)
        if self.how.conditions:
            # float32 takes twice what bfloat16 took.
            sizes.append((1 + wide) * self.dataset.prompt_path(prompt_id).stat().st_size)
            sizes.append(self._padding if wide else 0)
        # Each file has a block of its own before it and is filled up to whole blocks.
        return sum(sizes) + _MOST_FILES * 3 * _BLOCK

    @functools.cached_property
    def _padding(self) -> int:
        """Bytes that filling up one text adds at most."""
        if self.how.text_length is None:
            return 0
        text = self.dataset.prompt(next(iter(self.heads.values())).prompt_id).condition.text
        return 5 * self.how.text_length * text.shape[2]


def _report(monitor: Monitor, done: int, total: int) -> None:
    monitor(Progress("export", done, total, {"records_done": done}))


def _entry(name: str, size: int) -> tarfile.TarInfo:
    """A file without time and owner (TarInfo's own defaults)."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry


def _npy(x: Tensor) -> bytes:
    """The .npy file of a tensor; numpy has no bfloat16."""
    buffer = io.BytesIO()
    np.save(buffer, (x.float() if x.dtype == torch.bfloat16 else x).contiguous().numpy())
    return buffer.getvalue()


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.cat([x, x.new_zeros(length - x.shape[0], *x.shape[1:])])

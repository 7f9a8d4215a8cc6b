"""A dataset of trajectories on disk: one folder, one file per record.

    dataset.json                      DatasetInfo: whose trajectories, of what geometry and times
    records/<2 hex>/<id>.safetensors  latents [K, C, T, H, W] in model space, and whose they are
    prompts/<2 hex>/<id>.safetensors  a prompt's Condition, once for all its records
    prompts.jsonl, plan.json          what was asked for: see listing.py

The record files are the truth: a record exists when its file does, and every file exists whole or
not at all.

Shapes: K kept times, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..conditioning import AnyPrompt, Condition, LatePrompt, Prompt, encoded
from ..errors import AccVideoError
from ..files import (
    disk_errors,
    locked,
    read_json,
    read_metadata,
    read_safetensors,
    write_json,
    write_safetensors,
)
from ..flow import Times
from ..monitor import Monitor, Progress, silent
from ..names import safe_name
from .info import DTYPES, DatasetInfo
from .listing import read_listing, write_listing
from .verify import Fault, repair, verify

LOCK_FILE = ".prompts.lock"
_RECORD_FILE = re.compile(r"([0-9a-f]{32})\.safetensors")


def record_id(seed: int, prompt_id: str, sample: int) -> str:
    """32 hex digits that follow from dataset seed, prompt and sample number alone."""
    return hashlib.sha256(f"{seed}/{prompt_id}/{sample}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One record: the states `latents` [K, C, T, H, W] at `times`, from noise to data."""

    id: str
    latents: Tensor
    times: Times
    seed: int
    prompt_id: str
    sample: int
    rounding: float | None = None
    """Relative error of the states, root mean square, that storing them in fewer bits made."""


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What a record's file says without its tensors."""

    id: str
    prompt_id: str
    sample: int
    size: int
    """Bytes of the file."""
    rounding: float | None


@dataclass(frozen=True, eq=False)
class TrajectoryDataset:
    """A folder and its info; tensors are read when asked for."""

    folder: Path
    info: DatasetInfo
    _whole: dict[str, tuple[tuple[int, int], RecordHeader]] = field(
        default_factory=dict, init=False, repr=False
    )
    """Records that this process has read in full, with their files' size and time by then."""

    @classmethod
    def create(cls, folder: Path, info: DatasetInfo) -> TrajectoryDataset:
        """A new dataset, or the one that is there if it was made with the same settings.

        Raises AccVideoError, and touches nothing, when other settings or other files are there.
        """
        folder = Path(folder)
        if not (folder / "dataset.json").exists():
            with disk_errors("read", folder):
                others = [p.name for p in folder.iterdir()] if folder.exists() else []
            # A hidden file may be another recorder's dataset.json on its way.
            others = sorted(name for name in others if not name.startswith("."))
            if others and not (folder / "dataset.json").exists():
                raise AccVideoError(
                    f"{folder} is no dataset but holds {others[0]!r}; choose another name"
                )
            # Without the lock, one that starts now could put other settings in these ones' place.
            with locked(folder / LOCK_FILE):
                if not (folder / "dataset.json").exists():
                    write_json(folder / "dataset.json", info.as_dict())
        dataset = cls.open(folder)
        differences = dataset.info.differences(info)
        if differences:
            raise AccVideoError(
                f"dataset {folder.name!r} cannot be continued with {', '.join(differences)}; "
                "record with its settings, or under another name"
            )
        return dataset

    @classmethod
    def open(cls, folder: Path) -> TrajectoryDataset:
        """The dataset in `folder`. Raises AccVideoError when it is missing, foreign or newer."""
        folder = Path(folder)
        path = folder / "dataset.json"
        if not path.is_file():
            raise AccVideoError(
                f"{folder} is no trajectory dataset (it has no dataset.json); "
                "record one first or choose another folder"
            )
        return cls(folder, DatasetInfo.from_json(read_json(path), str(path)))

    def __len__(self) -> int:
        return len(self.ids())

    def ids(self) -> list[str]:
        """Ids of the records that exist, sorted."""
        with disk_errors("read", self.folder):
            files = (self.folder / "records").glob("??/*.safetensors")
            found = [(p.parent.name, _RECORD_FILE.fullmatch(p.name)) for p in files]
        return sorted(match[1] for part, match in found if match and match[1][:2] == part)

    def has(self, id: str) -> bool:
        """Whether the record exists."""
        return self.record_path(id).exists()

    def headers(self) -> list[RecordHeader]:
        """What every record's file says, sorted by id, without reading tensors.

        Raises AccVideoError for a damaged header.
        """
        return [self.header(id) for id in self.ids()]

    def header(self, id: str) -> RecordHeader:
        """What one record's file says; raises AccVideoError when it is damaged or not of here."""
        path = self.record_path(id)
        with disk_errors("read", path):
            return self._header(id, read_metadata(path), path.stat().st_size)

    def read(self, id: str) -> Trajectory:
        """One record. Raises AccVideoError when it is missing, damaged or not of here.

        A file is read in full and checked once, and then trusted while its size and its time stay:
        its states are mapped into memory, and only those that are used are read.
        """
        path = self.record_path(id)
        with disk_errors("read", path):
            file = path.stat()
        now = (file.st_size, file.st_mtime_ns)
        seen = self._whole.get(id)
        if seen is None or seen[0] != now:
            found = self._read(id)
            header = RecordHeader(id, found.prompt_id, found.sample, now[0], found.rounding)
            self._whole[id] = (now, header)
            return found
        header = seen[1]
        return Trajectory(
            id,
            self._mapped(path, now[0]),
            self.info.times,
            self.info.seed,
            header.prompt_id,
            header.sample,
            header.rounding,
        )

    def check(self, id: str) -> str:
        """Read one record in full, whatever was read before; its prompt's id.

        Raises AccVideoError when it is missing, damaged or not of here.
        """
        return self._read(id).prompt_id

    def write(self, trajectory: Trajectory) -> None:
        """Store one record, whole or not at all.

        Raises AccVideoError when it does not belong here, is not finite, or the disk is full.
        """
        self._checked(trajectory, f"record {trajectory.id}")
        meta = {
            "seed": str(trajectory.seed),
            "prompt_id": trajectory.prompt_id,
            "sample": str(trajectory.sample),
            "times": json.dumps(trajectory.times),
            "teacher": self.info.teacher,
        }
        if trajectory.rounding is not None:
            meta["rounding"] = f"{trajectory.rounding:.2e}"
        write_safetensors(self.record_path(trajectory.id), {"latents": trajectory.latents}, meta)

    def load_all(self, ids: Sequence[str], indices: Sequence[int]) -> Tensor:
        """States `indices` (positions among the kept) of many records.

        Returns [N, K, C, T, H, W] in float32, where K counts `indices`.
        """
        states = torch.empty(len(ids), len(indices), *self.info.shape)
        for row, id in zip(states, ids, strict=True):
            row.copy_(self.read(id).latents[list(indices)])
        return states

    def prompt(self, prompt_id: str) -> Prompt:
        """One prompt with its Condition (CPU)."""
        path = self.prompt_path(prompt_id)
        tensors, meta = read_safetensors(path)
        if meta.get("id") != prompt_id or "text" not in tensors:
            raise AccVideoError(f"{path} is not prompt {prompt_id}; delete it and record again")
        return Prompt(prompt_id, meta.get("text", ""), Condition(**tensors))

    def prompts(self) -> list[Prompt]:
        """Every prompt, in the order they were added."""
        return [self.prompt(id) for id in read_listing(self.folder).ids()]

    def add_prompt(self, prompt: Prompt) -> None:
        """`add_prompts` with one alone."""
        self.add_prompts([prompt])

    def add_prompts(
        self,
        prompts: Sequence[AnyPrompt],
        samples: int | None = None,
        guidance: float | None = None,
        monitor: Monitor = silent,
    ) -> None:
        """Add prompts in one go; those that are there already are left as they are.

        `samples` of each are asked for; the most that ever were is remembered. `guidance` is the
        embedded one that all are stored with, None their own. The monitor follows what is encoded
        and stored. Raises AccVideoError, before anything is written, when a prompt that is there
        was encoded otherwise.
        """
        there = {prompt.id for prompt in prompts if self.prompt_path(prompt.id).exists()}
        new = [prompt for prompt in prompts if prompt.id not in there]
        # One prompt is enough to notice another text encoder; where nothing is left to be encoded,
        # none is loaded for that.
        known = (p for p in prompts if p.id in there and (new or isinstance(p, Prompt)))
        shared = next(known, None)
        if shared and not shared.condition.with_guidance(guidance).agrees_with(
            self.prompt(shared.id).condition
        ):
            raise AccVideoError(
                f"prompt {shared.text or shared.id!r} was encoded otherwise when dataset "
                f"{self.folder.name!r} was begun; use the same text encoder, or another name"
            )
        # Asked again at its turn: another recorder may be at the same.
        left = (prompt for prompt in new if not self.prompt_path(prompt.id).exists())
        for number, prompt in enumerate(encoded(left), start=1):
            self.store_prompt(prompt, guidance)
            if isinstance(new[0], LatePrompt):
                monitor(Progress("encode", number, len(new)))
        # Without the lock two recorders could overwrite each other's addition.
        with locked(self.lock_path):
            listing = read_listing(self.folder)
            given = {prompt.id: prompt.text for prompt in prompts}
            write_listing(self.folder, listing.extended(given, samples))

    def add_negative(self, prompt: Prompt) -> None:
        """Store the negative prompt, which has no records of its own."""
        self.store_prompt(prompt)

    def store_prompt(self, prompt: Prompt, guidance: float | None = None) -> None:
        """Store one prompt's condition, and leave listing it to the caller."""
        if not (path := self.prompt_path(prompt.id)).exists():
            tensors = prompt.condition.with_guidance(guidance).tensors()
            write_safetensors(path, tensors, {"id": prompt.id, "text": prompt.text})

    def batches(self) -> list[tuple[str, ...]]:
        """Prompt ids in the groups that are recorded together.

        Each addition is cut into groups of `batch_size`. A group never crosses from one addition
        to the next, so adding prompts leaves every earlier group, and its records' bytes, alone.
        """
        size = self.info.batch_size
        return [
            tuple(addition[i : i + size])
            for addition in read_listing(self.folder).additions
            for i in range(0, len(addition), size)
        ]

    @property
    def samples_per_prompt(self) -> int:
        """The most samples of each prompt that were ever asked for."""
        return read_listing(self.folder).samples or self.samples_recorded()

    def samples_recorded(self) -> int:
        """How many samples a prompt has, by the records' headers; at least 1."""
        found = []
        for id in self.ids():
            try:
                found.append(self.header(id).sample)
            except AccVideoError:
                continue  # a damaged record says nothing; `verify` names it
        return max(found, default=0) + 1

    def verify(self, content: bool = True) -> list[Fault]:
        """Every fault. All records and prompts are read in full; without `content` headers are."""
        return verify(self, content)

    def repair(self, faults: Sequence[Fault]) -> None:
        """Remove exactly the damaged files, so that recording makes them again."""
        repair(self, faults)

    @property
    def lock_path(self) -> Path:
        """Lock file of whoever changes dataset.json, prompts.jsonl or plan.json."""
        return self.folder / LOCK_FILE

    def record_path(self, id: str) -> Path:
        return self.folder / "records" / id[:2] / f"{safe_name(id, 'record')}.safetensors"

    def prompt_path(self, prompt_id: str) -> Path:
        name = f"{safe_name(prompt_id, 'prompt')}.safetensors"
        return self.folder / "prompts" / prompt_id[:2] / name

    def _read(self, id: str) -> Trajectory:
        """One record, read in full and checked."""
        path = self.record_path(id)
        tensors, meta = read_safetensors(path)
        try:
            times, latents = tuple(json.loads(meta["times"])), tensors["latents"]
        except (KeyError, ValueError, TypeError) as error:
            raise _no_trajectory(path) from error
        head = self._header(id, meta, 0)
        seed = int(meta["seed"])
        found = Trajectory(id, latents, times, seed, head.prompt_id, head.sample, head.rounding)
        return self._checked(found, str(path))

    def _header(self, id: str, meta: Mapping[str, str], size: int) -> RecordHeader:
        """The header of a record of this dataset, by its file's metadata."""
        path = self.record_path(id)
        try:
            prompt_id, sample, seed = meta["prompt_id"], int(meta["sample"]), int(meta["seed"])
            rounding = float(meta["rounding"]) if "rounding" in meta else None
            teacher = meta["teacher"]
        except (KeyError, ValueError) as error:
            raise _no_trajectory(path) from error
        if teacher != self.info.teacher:
            raise AccVideoError(
                f"{path} was recorded from teacher {teacher} instead of {self.info.teacher}; "
                "delete it and record again"
            )
        self._belongs(str(path), "id", id, record_id(seed, prompt_id, sample))
        return RecordHeader(id, prompt_id, sample, size, rounding)

    def _mapped(self, path: Path, size: int) -> Tensor:
        """The states of a file of `size` bytes that was checked, mapped into memory.

        Private to this process: whoever changes them changes no file.
        """
        dtype, shape = DTYPES[self.info.dtype], (len(self.info.kept), *self.info.shape)
        start = size - math.prod(shape) * dtype.itemsize
        data = torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8)
        return data[start:].view(dtype).view(shape)

    def _checked(self, found: Trajectory, what: str) -> Trajectory:
        """`found` itself, after checking that it belongs to this dataset."""
        info, latents = self.info, found.latents
        shape = (len(info.kept), *info.shape)
        self._belongs(what, "shape", tuple(latents.shape), shape)
        self._belongs(what, "dtype", latents.dtype, DTYPES[info.dtype])
        self._belongs(what, "times", found.times, info.times)
        self._belongs(what, "seed", found.seed, info.seed)
        right = record_id(found.seed, found.prompt_id, found.sample)
        self._belongs(what, "id", found.id, right)
        if not torch.isfinite(latents).all():
            raise AccVideoError(
                f"{what} holds NaN or infinite values; delete it and record again in float32"
            )
        return found

    def _belongs(self, what: str, name: str, value: object, right: object) -> None:
        if value != right:
            raise AccVideoError(
                f"{what} does not belong to dataset {self.folder.name!r}: its {name} is "
                f"{value} instead of {right}; delete it and record again"
            )


def _no_trajectory(path: Path) -> AccVideoError:
    return AccVideoError(f"{path} is not a trajectory; delete it and record again")

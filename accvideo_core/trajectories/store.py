"""A dataset of trajectories on disk: one folder, one file per record.

    dataset.json                      DatasetInfo: whose trajectories, of what geometry and times
    records/<2 hex>/<id>.safetensors  latents [K, C, T, H, W] in model space, and whose they are
    prompts/<id>.safetensors          a prompt's Condition, once for all its records
    prompts.jsonl                     id and text of every prompt, in the order they were added

The record files are the truth: a record exists when its file does, and every file exists whole or
not at all. `prompts.jsonl` only grows. A blank line ends each addition, so that the batches in
which prompts are recorded can be told from the file and never change.

Shapes: K kept times, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..conditioning import Condition, Prompt
from ..errors import AccVideoError
from ..files import (
    append_lines,
    disk_errors,
    locked,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from ..flow import Times
from ..names import safe_name
from .info import DTYPES, FORMAT, DatasetInfo

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


@dataclass(frozen=True, eq=False)
class TrajectoryDataset:
    """A folder and its info; tensors are read when asked for."""

    folder: Path
    info: DatasetInfo

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
        data = read_json(path)
        version = data.get("format") if isinstance(data, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise AccVideoError(
                f"dataset {folder.name!r} has format {version}, newer than the {FORMAT} that this "
                "version reads; update AccVideo"
            )
        try:
            return cls(folder, DatasetInfo.from_dict(data))
        except (KeyError, TypeError) as error:
            raise AccVideoError(
                f"{path} does not describe a trajectory dataset ({error}); choose another folder"
            ) from error

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
        return self._record_path(id).exists()

    def read(self, id: str) -> Trajectory:
        """One record, checked. Raises AccVideoError when it is missing, damaged or not of here."""
        path = self._record_path(id)
        tensors, meta = read_safetensors(path)
        try:
            times = tuple(json.loads(meta["times"]))
            latents, sample = tensors["latents"], int(meta["sample"])
            found = Trajectory(id, latents, times, int(meta["seed"]), meta["prompt_id"], sample)
            teacher = meta["teacher"]
        except (KeyError, ValueError, TypeError) as error:
            message = f"{path} is not a trajectory; delete it and record again"
            raise AccVideoError(message) from error
        if teacher != self.info.teacher:
            raise AccVideoError(
                f"{path} was recorded from teacher {teacher} instead of {self.info.teacher}; "
                "delete it and record again"
            )
        return self._checked(found, str(path))

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
        path = self._record_path(trajectory.id)
        write_safetensors(path, {"latents": trajectory.latents}, meta)

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
        path = self._prompt_path(prompt_id)
        tensors, meta = read_safetensors(path)
        if meta.get("id") != prompt_id or "text" not in tensors:
            raise AccVideoError(f"{path} is not prompt {prompt_id}; delete it and record again")
        return Prompt(prompt_id, meta.get("text", ""), Condition(**tensors))

    def prompts(self) -> list[Prompt]:
        """Every prompt, in the order they were added."""
        return [self.prompt(id) for addition in self._additions()[0] for id in addition]

    def add_prompt(self, prompt: Prompt) -> None:
        """Add one prompt; the same as `add_prompts` with it alone."""
        self.add_prompts([prompt])

    def add_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Add prompts in one go; those that are there already are left as they are.

        An addition that was interrupted is continued by the next one. Raises AccVideoError, before
        anything is written, when a prompt that is there was encoded otherwise.
        """
        shared = next((p for p in prompts if self._prompt_path(p.id).exists()), None)
        # One prompt is enough to notice another text encoder, and does not read all of them.
        if shared and not _alike(shared.condition, self.prompt(shared.id).condition):
            raise AccVideoError(
                f"prompt {shared.text or shared.id!r} was encoded otherwise when dataset "
                f"{self.folder.name!r} was begun; use the same text encoder, or another name"
            )
        for prompt in prompts:
            self._store_prompt(prompt)
        # Without the lock two recorders that start together would list every prompt twice.
        with locked(self.folder / ".prompts.lock"):
            additions, ended = self._additions()
            known = {id for addition in additions for id in addition}
            new = {p.id: p.text for p in prompts if p.id not in known}
            lines = [json.dumps({"id": id, "text": text}) + "\n" for id, text in new.items()]
            if lines or not ended:
                append_lines(self.folder / "prompts.jsonl", "".join(lines) + "\n")

    def add_negative(self, prompt: Prompt) -> None:
        """Store the negative prompt, which has no records of its own."""
        self._store_prompt(prompt)

    def batches(self) -> list[tuple[str, ...]]:
        """Prompt ids in the groups that are recorded together.

        Each addition is cut into groups of `batch_size`. A group never crosses from one addition
        to the next, so adding prompts leaves every earlier group, and its records' bytes, alone.
        """
        size = self.info.batch_size
        return [
            tuple(addition[i : i + size])
            for addition in self._additions()[0]
            for i in range(0, len(addition), size)
        ]

    def verify(self) -> list[str]:
        """One sentence per fault: every record and prompt is read in full and checked."""
        faults, used = [], set()
        for id in self.ids():
            try:
                used.add(self.read(id).prompt_id)
            except AccVideoError as error:
                faults.append(str(error))
        listed = {id for addition in self._additions()[0] for id in addition}
        negative = {self.info.negative} if self.info.negative else set()
        for id in sorted(used | listed | negative):
            try:
                self.prompt(id)
            except AccVideoError as error:
                faults.append(str(error))
        lost = [f"prompt {id} is not in prompts.jsonl; record it again" for id in used - listed]
        return faults + sorted(lost)

    def _store_prompt(self, prompt: Prompt) -> None:
        path = self._prompt_path(prompt.id)
        if not path.exists():
            meta = {"id": prompt.id, "text": prompt.text}
            write_safetensors(path, prompt.condition.tensors(), meta)

    def _additions(self) -> tuple[list[list[str]], bool]:
        """Prompt ids by addition, and whether the last addition was ended by its blank line."""
        path = self.folder / "prompts.jsonl"
        if not path.exists():
            return [], True
        with disk_errors("read", path):
            lines = path.read_bytes().split(b"\n")
        additions: list[list[str]] = [[]]
        known: set[str] = set()
        # What follows the last newline is an unfinished line or nothing.
        for line in lines[:-1]:
            id = _prompt_id(line)
            if not line and additions[-1]:
                additions.append([])
            elif id and id not in known:
                known.add(id)
                additions[-1].append(id)
        ended = not additions[-1] and not lines[-1]
        return [addition for addition in additions if addition], ended

    def _checked(self, found: Trajectory, what: str) -> Trajectory:
        """`found` itself, after checking that it belongs to this dataset."""
        info, latents = self.info, found.latents
        shape = (len(info.kept), *info.shape)
        expected = [
            ("shape", tuple(latents.shape), shape),
            ("dtype", latents.dtype, DTYPES[info.dtype]),
            ("times", found.times, info.times),
            ("seed", found.seed, info.seed),
            ("id", found.id, record_id(found.seed, found.prompt_id, found.sample)),
        ]
        for name, value, right in expected:
            if value != right:
                raise AccVideoError(
                    f"{what} does not belong to dataset {self.folder.name!r}: its {name} is "
                    f"{value} instead of {right}; delete it and record again"
                )
        if not torch.isfinite(latents).all():
            raise AccVideoError(
                f"{what} holds NaN or infinite values; delete it and record again in float32"
            )
        return found

    def _record_path(self, id: str) -> Path:
        return self.folder / "records" / id[:2] / f"{safe_name(id, 'record')}.safetensors"

    def _prompt_path(self, prompt_id: str) -> Path:
        return self.folder / "prompts" / f"{safe_name(prompt_id, 'prompt')}.safetensors"


def _alike(new: Condition, old: Condition) -> bool:
    """Whether two encodings agree, up to what other hardware or bfloat16 changes."""
    a, b = new.tensors(), old.tensors()
    return {k: x.shape for k, x in a.items()} == {k: x.shape for k, x in b.items()} and all(
        (a[k].float().cpu() - x.float()).norm() <= 0.1 * x.float().norm() for k, x in b.items()
    )


def _prompt_id(line: bytes) -> str | None:
    """The id in one line of prompts.jsonl, or None for an unfinished line."""
    try:
        return json.loads(line)["id"]
    except (ValueError, KeyError, TypeError):
        return None

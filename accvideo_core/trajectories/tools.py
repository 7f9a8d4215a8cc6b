"""Datasets made of datasets: merge, subset and split.

A new dataset holds the very files of the old ones, by hard link where the disk allows it and else
by copy: a record's file never changes once it is there. It is put together in a hidden folder
beside its place and renamed when it is whole, so it is never seen half made; what an interrupted
run left in the hidden folder is taken up by the next one with the same arguments.

A dataset has one seed: the ids and the noise of its records, also of those that are yet to be
recorded or mended, follow from it. Datasets of different seeds are therefore not merged. Batch
sizes may differ, because every group of prompts that was recorded together is listed as an addition
of its own and so stays together whatever the batch size of the whole.

Shapes: K kept times, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import AccVideoError
from ..files import disk_errors, read_json, remove_leftovers, replacing, write_json
from ..monitor import Monitor, Progress, silent
from .info import DatasetInfo
from .listing import Listing, read_listing, write_listing
from .store import RecordHeader, TrajectoryDataset

ORIGIN = "origin.json"
"""What a made dataset was made of: for people, and to know it again when the work is repeated."""

Groups = list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which part of a dataset to take; what is None leaves nothing out."""

    texts: frozenset[str] | None = None
    """Prompts with these texts."""
    match: str | None = None
    """Prompts in whose text this regular expression is found."""
    records: int | None = None
    """So many records: sample 0 of the prompts in their order, then sample 1, and so on."""
    kept: tuple[int, ...] | None = None
    """Indices in the time grid of the states to keep."""

    def __post_init__(self) -> None:
        if self.records is not None and self.records < 1:
            raise AccVideoError(f"records is {self.records}; it must be at least 1")
        try:
            re.compile(self.match or "")
        except re.error as error:
            raise AccVideoError(
                f"{self.match!r} is no regular expression ({error}); escape special characters "
                "with a backslash"
            ) from error

    def has_text(self, text: str) -> bool:
        """Whether a prompt of this text is chosen."""
        listed = self.texts is None or text in self.texts
        return listed and (self.match is None or re.search(self.match, text) is not None)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What a new dataset takes from one that is there."""

    dataset: TrajectoryDataset
    ids: Sequence[str]
    groups: Groups
    """Its prompts, by the groups in which they were recorded."""

    def named(self) -> list[Any]:
        return [self.groups, list(self.ids)]


def merge(
    datasets: Sequence[TrajectoryDataset], out: Path, monitor: Monitor = silent
) -> TrajectoryDataset:
    """One dataset in `out` with all records of `datasets`.

    A record or prompt that several of them hold is taken once.

    Raises AccVideoError, before anything is made, when they were recorded with different settings,
    or hold a record with different content, and when something else is in `out`.
    """
    if len(datasets) < 2:
        raise AccVideoError(f"{len(datasets)} dataset was given to merge; give at least two")
    info = _common_info(datasets)
    parts: list[_Part] = []
    prompts: dict[str, TrajectoryDataset] = {}
    records: dict[str, TrajectoryDataset] = {}
    for number, dataset in enumerate(datasets, start=1):
        ids, groups = [head.id for head in _heads(dataset)], dataset.batches()
        listed = [*_ids(groups), *_negative(dataset)]
        for id in ids:
            if id in records:
                _same_record(id, records[id], dataset)
        for id in listed:
            if id in prompts:
                _same_prompt(id, prompts[id], dataset)
        new = [tuple(id for id in group if id not in prompts) for group in groups]
        parts.append(_Part(dataset, [id for id in ids if id not in records], _filled(new)))
        prompts = dict.fromkeys(listed, dataset) | prompts
        records = dict.fromkeys(ids, dataset) | records
        monitor(Progress("compare", number, len(datasets)))
    samples = max(dataset.samples_per_prompt for dataset in datasets)
    return _make(out, info, parts, samples, {"made_by": "merge"}, monitor)


def subset(
    dataset: TrajectoryDataset, out: Path, choice: Choice, monitor: Monitor = silent
) -> TrajectoryDataset:
    """A dataset in `out` with the chosen prompts, records and states.

    Of fewer states each is as it was, bit for bit. A chosen prompt without records comes along,
    except when records are counted.

    Raises AccVideoError when nothing is chosen, for states that are not stored, and when something
    else is in `out`.
    """
    info = dataset.info
    if choice.kept is not None:
        absent = [index for index in choice.kept if index not in info.kept]
        if absent:
            raise AccVideoError(
                f"state {absent[0]} is not stored in dataset {dataset.folder.name!r}; choose among "
                f"{', '.join(map(str, info.kept))}"
            )
        info = replace(info, kept=choice.kept)
    listing = read_listing(dataset.folder)
    order = {id: number for number, id in enumerate(listing.ids())}
    chosen = {id for id in order if choice.has_text(listing.texts.get(id, ""))}
    heads = [head for head in _heads(dataset) if head.prompt_id in chosen]
    heads.sort(key=lambda head: (head.sample, order[head.prompt_id]))
    if choice.records is not None:
        heads = heads[: choice.records]
        chosen = {head.prompt_id for head in heads}
    if not heads:
        raise AccVideoError(
            f"no record of dataset {dataset.folder.name!r} is chosen; choose other prompts"
        )
    samples = dataset.samples_per_prompt if choice.records is None else heads[-1].sample + 1
    part = _Part(dataset, [head.id for head in heads], _only(dataset.batches(), chosen))
    return _make(out, info, [part], samples, {"made_by": "subset"}, monitor)


def split(
    dataset: TrajectoryDataset,
    train: Path,
    validation: Path,
    fraction: float = 0.05,
    seed: int = 0,
    monitor: Monitor = silent,
) -> tuple[TrajectoryDataset, TrajectoryDataset]:
    """Two datasets without a common prompt; about `fraction` of the prompts are for validation.

    On which side a prompt falls follows from its id and `seed` alone, so that a dataset that has
    grown, split again, keeps every earlier prompt on its side.

    Raises AccVideoError when a side gets no record, and when something else is in a folder.
    """
    if not 0 < fraction < 1:
        raise AccVideoError(f"fraction is {fraction}; it must lie between 0 and 1")
    if Path(train).resolve() == Path(validation).resolve():
        raise AccVideoError(f"both sides are to go to {train}; name two folders")
    heads, groups, made = _heads(dataset), dataset.batches(), []
    for side, out in ((False, train), (True, validation)):
        mine = [h.id for h in heads if for_validation(h.prompt_id, fraction, seed) is side]
        if not mine:
            raise AccVideoError(
                f"no record of dataset {dataset.folder.name!r} falls to "
                f"{'validation' if side else 'training'} with fraction {fraction:g} and seed "
                f"{seed}; choose another fraction or seed"
            )
        chosen = {id for id in _ids(groups) if for_validation(id, fraction, seed) is side}
        made.append((out, _Part(dataset, mine, _only(groups, chosen))))
    how = {"made_by": "split", "fraction": fraction, "seed": seed}
    info, samples = dataset.info, dataset.samples_per_prompt
    one, two = (_make(out, info, [part], samples, how, monitor) for out, part in made)
    return one, two


def for_validation(prompt_id: str, fraction: float, seed: int) -> bool:
    """On which side of a split a prompt falls; all clips of one video fall to the same."""
    digest = hashlib.sha256(f"{seed}/{prompt_id.partition('-')[0]}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _common_info(datasets: Sequence[TrajectoryDataset]) -> DatasetInfo:
    """The info of all of them together. Raises for the first two that do not go together."""
    first = datasets[0]
    for other in datasets[1:]:
        differences = first.info.differences(replace(other.info, batch_size=first.info.batch_size))
        if differences:
            seeds = "; more records of a prompt come from more samples with the same seed"
            raise AccVideoError(
                f"datasets {str(first.folder)!r} and {str(other.folder)!r} cannot be merged: the "
                f"second has {', '.join(differences)}"
                f"{seeds if first.info.seed != other.info.seed else ''}; "
                "record one of them again with the settings of the other"
            )
    versions: dict[str, set[str]] = {}
    for dataset in datasets:
        for library, version in dataset.info.versions.items():
            versions.setdefault(library, set()).add(version)
    return replace(
        first.info,
        batch_size=max(dataset.info.batch_size for dataset in datasets),
        versions={name: ", ".join(sorted(found)) for name, found in versions.items()},
    )


def _same_record(id: str, one: TrajectoryDataset, two: TrajectoryDataset) -> None:
    """Raise unless both hold the record with the same bytes."""
    a, b = one.record_path(id), two.record_path(id)
    with disk_errors("read", b):
        same = a.samefile(b) or filecmp.cmp(a, b, shallow=False)
    if not same:
        raise AccVideoError(
            f"record {id} is in {one.folder} and in {two.folder} with different content; verify "
            "both datasets, and delete the record in one of them"
        )


def _same_prompt(id: str, one: TrajectoryDataset, two: TrajectoryDataset) -> None:
    """Raise unless both were recorded with the same condition for a prompt, up to rounding."""
    a, b = one.prompt_path(id), two.prompt_path(id)
    with disk_errors("read", b):
        same = a.samefile(b) or filecmp.cmp(a, b, shallow=False)
    if not same and not two.prompt(id).condition.agrees_with(one.prompt(id).condition):
        raise AccVideoError(
            f"prompt {two.prompt(id).text or id!r} was encoded otherwise in {one.folder} than in "
            f"{two.folder}; record one of them again with the text encoder of the other"
        )


def _heads(dataset: TrajectoryDataset) -> list[RecordHeader]:
    """What every record's file says. Raises for one whose prompt is not listed."""
    listed = set(read_listing(dataset.folder).ids())
    heads = dataset.headers()
    for head in heads:
        if head.prompt_id not in listed:
            raise AccVideoError(
                f"record {head.id} is of prompt {head.prompt_id}, which dataset "
                f"{dataset.folder.name!r} does not list; verify and repair the dataset first"
            )
    return heads


def _negative(dataset: TrajectoryDataset) -> list[str]:
    return [dataset.info.negative] if dataset.info.negative else []


def _only(groups: Groups, chosen: set[str]) -> Groups:
    return _filled(tuple(id for id in group if id in chosen) for group in groups)


def _ids(groups: Groups) -> list[str]:
    return [id for group in groups for id in group]


def _filled(groups: Iterable[tuple[str, ...]]) -> Groups:
    return [group for group in groups if group]


def _make(
    out: Path,
    info: DatasetInfo,
    parts: list[_Part],
    samples: int,
    how: dict[str, Any],
    monitor: Monitor,
) -> TrajectoryDataset:
    """The dataset `out` of these parts: made, gone on with, or there already."""
    out = Path(out)
    named = [info.as_dict(), how, samples, [part.named() for part in parts]]
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    if _is_there(out, digest):
        return TrajectoryDataset.open(out)
    hidden = out.with_name(f".{out.name}.{digest[:12]}.part")
    made = TrajectoryDataset.create(hidden, info)
    total, done = sum(len(part.ids) for part in parts), 0
    for part in parts:
        for id in [*_ids(part.groups), *_negative(part.dataset)]:
            _place(part.dataset.prompt_path(id), made.prompt_path(id))
        for id in part.ids:
            _take(part.dataset, made, id)
            done += 1
            monitor(Progress(how["made_by"], done, total, {"records_done": done}))
    _list(made, parts, samples)
    remove_leftovers(hidden, older_than=0)  # of runs before, as nobody else writes here
    origin = {**how, "of": [str(part.dataset.folder) for part in parts], "digest": digest}
    write_json(hidden / ORIGIN, origin)
    with disk_errors("write", out):
        if out.exists():
            out.rmdir()
        hidden.rename(out)
    return TrajectoryDataset.open(out)


def _is_there(out: Path, digest: str) -> bool:
    """Whether `out` was made of the same parts before. Raises when it is something else."""
    with disk_errors("read", out):
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return False
        origin = read_json(out / ORIGIN) if (out / ORIGIN).is_file() else {}
    if isinstance(origin, dict) and origin.get("digest") == digest:
        return True
    raise AccVideoError(f"{out} exists already; choose another name, or delete it first")


def _take(source: TrajectoryDataset, made: TrajectoryDataset, id: str) -> None:
    """One record into the new dataset: its file, or its states where only some are wanted."""
    if made.info.kept == source.info.kept:
        _place(source.record_path(id), made.record_path(id))
    elif not made.has(id):
        found = source.read(id)
        states = [source.info.kept.index(index) for index in made.info.kept]
        # `rounding` was measured over all states, and says nothing of these alone.
        made.write(
            replace(found, latents=found.latents[states], times=made.info.times, rounding=None)
        )


def _place(source: Path, target: Path) -> None:
    """The same file under another name, whole or not at all."""
    if target.exists():
        return
    with disk_errors("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:  # another disk, one without hard links, or no such file
            with replacing(target) as temp:
                shutil.copyfile(source, temp)


def _list(made: TrajectoryDataset, parts: list[_Part], samples: int) -> None:
    """Write down the prompts, with every group as an addition of its own."""
    texts = {id: x for part in parts for id, x in read_listing(part.dataset.folder).texts.items()}
    groups = tuple(group for part in parts for group in part.groups)
    listed = {id: texts[id] for group in groups for id in group if id in texts}
    write_listing(made.folder, Listing(groups, listed, samples))

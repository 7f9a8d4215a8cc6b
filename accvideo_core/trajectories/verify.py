"""Finding what is damaged in a dataset, and taking exactly that away.

What is taken away, recording makes again with the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AccVideoError
from ..files import disk_errors, locked
from ..monitor import Monitor, Progress, silent
from .listing import PLAN_FILE, PROMPTS_FILE, Listing, read_listing, write_listing

if TYPE_CHECKING:
    from .store import TrajectoryDataset


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a dataset; as text, a sentence with its remedy."""

    kind: str
    """"record", "prompt" (a prompt's file), "line" (of prompts.jsonl) or "plan" (plan.json)."""
    id: str
    """Of the record or the prompt; "" for plan.json."""
    path: Path
    text: str

    def __str__(self) -> str:
        return self.text


def verify(
    dataset: TrajectoryDataset, content: bool = True, monitor: Monitor = silent
) -> list[Fault]:
    """Every fault; without `content` headers and sizes alone are read, which takes seconds.

    Leftover temporary files are no fault, and neither are records that are still to be made.
    """
    found = read_listing(dataset.folder)
    faults, used = [], set()
    ids = dataset.ids()
    for number, id in enumerate(ids, start=1):
        try:
            used.add(dataset.check(id) if content else dataset.header(id).prompt_id)
        except AccVideoError as error:
            faults.append(Fault("record", id, dataset.record_path(id), str(error)))
        monitor(Progress("verify", number, len(ids)))
    faults += _prompt_faults(dataset, found, used)
    if found.damage:
        faults.append(Fault("plan", "", dataset.folder / PLAN_FILE, found.damage))
    return faults


def _prompt_faults(dataset: TrajectoryDataset, listing: Listing, used: set[str]) -> Iterator[Fault]:
    """Prompts whose file or line is damaged or missing."""
    listed = set(listing.ids())
    lost = set(listing.lost)
    lines = dataset.folder / PROMPTS_FILE
    for id in sorted(used | listed | ({dataset.info.negative or ""} - {""})):
        text = listing.texts.get(id)
        try:
            stored = dataset.prompt(id).text
        except AccVideoError as error:
            yield Fault("prompt", id, dataset.prompt_path(id), str(error))
            stored = text
        if id in lost or (id in used and id not in listed):
            sentence = f"prompt {id} is not in {PROMPTS_FILE}; record it again"
        elif text is not None and text != stored:
            sentence = f"prompt {id} has another text in {PROMPTS_FILE}; record it again"
        else:
            continue
        yield Fault("line", id, lines, sentence)


def repair(dataset: TrajectoryDataset, faults: Sequence[Fault]) -> None:
    """Remove the damaged files that `faults` name, and write lost lines and plan.json again.

    What is whole by now is left alone. Recording with the same prompts makes again what is
    missing, with the same bytes. Raises AccVideoError when the disk denies it.
    """
    for fault in faults:
        if fault.kind == "record" and _raises(dataset.check, fault.id):
            _remove(dataset.record_path(fault.id))
        elif fault.kind == "prompt" and _raises(dataset.prompt, fault.id):
            _remove(dataset.prompt_path(fault.id))
    if any(fault.kind in ("line", "plan") for fault in faults):
        _mend_listing(dataset)


def _raises(look: Callable[[str], object], id: str) -> bool:
    try:
        look(id)
    except AccVideoError:
        return True
    return False


def _remove(path: Path) -> None:
    with disk_errors("remove", path):
        path.unlink(missing_ok=True)


def _mend_listing(dataset: TrajectoryDataset) -> None:
    """Write prompts.jsonl and plan.json from each other and from the prompts' own files."""
    with locked(dataset.lock_path):
        found = read_listing(dataset.folder)
        planned = {id for addition in found.planned for id in addition}
        texts, strangers = dict(found.texts), set()
        for id in found.ids():
            try:
                texts[id] = dataset.prompt(id).text
            except AccVideoError:
                # A prompt's file comes before its lines: an id that is in one line alone is none.
                strangers |= {id} - planned
        kept = (tuple(id for id in part if id not in strangers) for part in found.additions)
        additions = tuple(addition for addition in kept if addition)
        if unlisted := _unlisted(dataset, texts):
            texts |= unlisted
            additions = (*additions, tuple(sorted(unlisted)))
        samples = found.samples or dataset.samples_recorded()
        mended = replace(found, additions=additions, texts=texts, samples=samples)
        write_listing(dataset.folder, mended)


def _unlisted(dataset: TrajectoryDataset, listed: Mapping[str, str]) -> dict[str, str]:
    """Text by id of whole prompts that records use and no list has, as a killed ingestion leaves.

    None where records are computed in groups, which nothing tells again.
    """
    found: dict[str, str] = {}
    for id in dataset.ids() if dataset.info.batch_size == 1 else ():
        with contextlib.suppress(AccVideoError):  # damaged, which is another fault
            prompt_id = dataset.header(id).prompt_id
            if prompt_id not in listed:
                found[prompt_id] = dataset.prompt(prompt_id).text
    return found

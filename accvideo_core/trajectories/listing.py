"""What was asked of a dataset: its prompts in their order, and how many samples of each.

    prompts.jsonl   id and text of every prompt, a line each; a blank line ends each addition
    plan.json       the ids once more, addition by addition, and `samples_per_prompt`

Additions decide which records are computed together, and so their last bits. Each file is written
whole or not at all, prompts.jsonl first; a line that one of them loses is known from the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import AccVideoError
from ..files import disk_errors, read_json, write_bytes, write_json

PROMPTS_FILE = "prompts.jsonl"
PLAN_FILE = "plan.json"
Additions = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """The prompts of a dataset, and what its two files say of them."""

    additions: Additions = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    """Text by id, of every line of prompts.jsonl that is whole."""
    samples: int | None = None
    """Samples per prompt, the most that was ever asked for; None when plan.json does not say."""
    planned: Additions = ()
    """The additions that plan.json holds."""
    ended: bool = True
    """Whether the last addition of prompts.jsonl was ended by its blank line."""
    damage: str = ""
    """What is wrong with plan.json, in one sentence."""

    def ids(self) -> Iterator[str]:
        """Every prompt, in the order they were added."""
        return (id for addition in self.additions for id in addition)

    @property
    def lost(self) -> list[str]:
        """Prompts whose line in prompts.jsonl is lost."""
        return [id for id in self.ids() if id not in self.texts]

    def extended(self, new: Mapping[str, str], samples: int | None) -> Listing:
        """With the prompts of `new` (text by id) that are not there yet as one more addition."""
        known = set(self.ids())
        added = tuple(id for id in new if id not in known)
        additions = self.additions
        if added and not self.ended and additions:  # goes on with what was interrupted
            additions = (*additions[:-1], additions[-1] + added)
        elif added:
            additions = (*additions, added)
        lost = {id: new[id] for id in self.lost if id in new}
        texts = {**self.texts, **lost, **{id: new[id] for id in added}}
        most = max(self.samples or 1, samples or 1)
        return replace(self, additions=additions, texts=texts, samples=most)


def read_listing(folder: Path) -> Listing:
    """What the dataset in `folder` was asked for."""
    additions, texts, ended = _read_lines(folder / PROMPTS_FILE)
    planned, samples, damage = _read_plan(folder / PLAN_FILE)
    known = {id for addition in planned for id in addition}
    later = (tuple(id for id in addition if id not in known) for addition in additions)
    merged = (*planned, *(addition for addition in later if addition))
    return Listing(merged, texts, samples, planned, ended, damage)


def write_listing(folder: Path, listing: Listing) -> None:
    """Write both files, each whole or not at all, where they do not say so already."""
    lines = []
    for addition in listing.additions:
        told = [(id, listing.texts[id]) for id in addition if id in listing.texts]
        lines += [json.dumps({"id": id, "text": text}) for id, text in told]
        lines.append("")
    data = "".join(f"{line}\n" for line in lines).encode()
    path = folder / PROMPTS_FILE
    with disk_errors("read", path):
        same = path.exists() and path.read_bytes() == data
    if not same:
        write_bytes(path, data)
    found = read_listing(folder)
    if found.damage or found.planned != listing.additions or found.samples != listing.samples:
        plan = {"samples_per_prompt": listing.samples, "additions": listing.additions}
        write_json(folder / PLAN_FILE, plan)


def _read_lines(path: Path) -> tuple[Additions, dict[str, str], bool]:
    """Prompt ids by addition, text by id, and whether the last addition was ended."""
    if not path.exists():
        return (), {}, True
    with disk_errors("read", path):
        lines = path.read_bytes().split(b"\n")
    additions: list[list[str]] = [[]]
    texts: dict[str, str] = {}
    # What follows the last newline is an unfinished line or nothing.
    for line in lines[:-1]:
        if not line and additions[-1]:
            additions.append([])
        found = _parsed(line)
        if found and found[0] not in texts:
            texts[found[0]] = found[1]
            additions[-1].append(found[0])
    ended = not additions[-1] and not lines[-1]
    return tuple(tuple(addition) for addition in additions if addition), texts, ended


def _parsed(line: bytes) -> tuple[str, str] | None:
    """Id and text of one line, or None for what is none."""
    try:
        data = json.loads(line)
        id, text = data["id"], data["text"]
    except (ValueError, KeyError, TypeError):
        return None
    return (id, text) if isinstance(id, str) and isinstance(text, str) else None


def _read_plan(path: Path) -> tuple[Additions, int | None, str]:
    """The additions and samples of plan.json, and what is wrong with it."""
    if not path.exists():
        return (), None, ""
    try:
        data = read_json(path)
        additions = tuple(tuple(str(id) for id in addition) for addition in data["additions"])
        return additions, int(data["samples_per_prompt"]), ""
    except AccVideoError as error:
        return (), None, str(error)
    except (KeyError, TypeError, ValueError) as error:
        damage = f"{path} is not the plan of a dataset ({error!r}); delete it and record again"
        return (), None, damage

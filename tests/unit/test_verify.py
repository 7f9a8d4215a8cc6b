"""Reading once and trusting, finding faults, and mending exactly them."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accvideo_core import files
from accvideo_core.errors import AccVideoError
from accvideo_core.files import read_json, write_json
from accvideo_core.trajectories import TrajectoryDataset, record_id
from accvideo_core.trajectories.listing import read_listing
from accvideo_core.trajectories.verify import Fault
from tests.analytic import prompts
from tests.unit.test_store import INFO, snapshot, trajectory

GIVEN = prompts(5)


@pytest.fixture
def dataset(tmp_path: Path) -> TrajectoryDataset:
    made = TrajectoryDataset.create(tmp_path / "clips", INFO)
    made.add_prompts(GIVEN[:3], 2)
    made.add_prompts(GIVEN)
    for prompt in GIVEN:
        made.write(trajectory(prompt))
    return made


def name(number: int) -> str:
    return record_id(INFO.seed, GIVEN[number].id, 0)


def test_a_record_is_hashed_once_and_again_when_its_file_changes(
    dataset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    checksum = files._checksum
    monkeypatch.setattr(files, "_checksum", lambda *given: hashed.append(1) or checksum(*given))
    first = dataset.read(name(0))
    again = dataset.read(name(0))
    assert len(hashed) == 1 and torch.equal(first.latents, again.latents)
    for field in ("id", "times", "seed", "prompt_id", "sample", "rounding"):
        assert getattr(first, field) == getattr(again, field)
    path = dataset.record_path(name(0))
    os.utime(path, (1, 1))
    dataset.read(name(0))
    assert len(hashed) == 2
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(AccVideoError, match="truncated"):
        dataset.read(name(0))
    path.unlink()
    with pytest.raises(AccVideoError, match="cannot read"):
        dataset.read(name(0))


def test_changing_what_was_read_changes_no_file(dataset: TrajectoryDataset) -> None:
    before = snapshot(dataset.folder)
    dataset.read(name(0))
    mapped = dataset.read(name(0)).latents
    mapped.zero_()
    assert snapshot(dataset.folder) == before and dataset.read(name(0)).latents.any()


def test_verify_reads_again_what_was_trusted(dataset: TrajectoryDataset) -> None:
    dataset.read(name(0))
    path = dataset.record_path(name(0))
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [fault.id for fault in dataset.verify()] == [name(0)]
    assert dataset.verify(content=False) == []


def test_headers_say_whose_records_these_are_without_tensors(
    dataset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "safe_open", None)  # nobody reads tensors without it
    heads = dataset.headers()
    assert [head.id for head in heads] == dataset.ids()
    assert {head.prompt_id for head in heads} == {prompt.id for prompt in GIVEN}
    size = dataset.record_path(name(0)).stat().st_size
    assert {(head.sample, head.size, head.rounding) for head in heads} == {(0, size, None)}


def test_what_was_asked_for_is_remembered(dataset: TrajectoryDataset) -> None:
    assert dataset.samples_per_prompt == 2
    assert read_json(dataset.folder / "plan.json")["additions"] == [
        [prompt.id for prompt in GIVEN[:3]],
        [prompt.id for prompt in GIVEN[3:]],
    ]
    before = snapshot(dataset.folder)
    dataset.add_prompts(GIVEN, 1)
    assert snapshot(dataset.folder) == before
    dataset.add_prompts(GIVEN[:1], 3)
    assert TrajectoryDataset.open(dataset.folder).samples_per_prompt == 3


def test_a_dataset_without_plan_goes_on_as_it_was(dataset: TrajectoryDataset) -> None:
    """Earlier versions wrote none."""
    batches, before = dataset.batches(), snapshot(dataset.folder)
    dataset.write(trajectory(GIVEN[1], sample=3))
    (dataset.folder / "plan.json").unlink()
    assert dataset.batches() == batches and dataset.samples_per_prompt == 4
    assert dataset.verify() == []
    dataset.add_prompts(GIVEN, 2)
    after = snapshot(dataset.folder)
    assert after["plan.json"] == before["plan.json"]
    assert after["prompts.jsonl"] == before["prompts.jsonl"]


def lose_line(dataset: TrajectoryDataset, number: int) -> None:
    path = dataset.folder / "prompts.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    wanted = GIVEN[number].id.encode()
    path.write_bytes(b"".join(line for line in lines if wanted not in line))


@pytest.mark.parametrize("number", range(5))
def test_a_lost_line_changes_no_batch_and_comes_back(
    dataset: TrajectoryDataset, number: int
) -> None:
    whole, batches = snapshot(dataset.folder), dataset.batches()
    lose_line(dataset, number)
    assert dataset.batches() == batches
    (fault,) = dataset.verify()
    assert (fault.kind, fault.id, fault.path.name) == ("line", GIVEN[number].id, "prompts.jsonl")
    assert str(fault) == f"prompt {GIVEN[number].id} is not in prompts.jsonl; record it again"
    broken = snapshot(dataset.folder)
    dataset.repair([fault])
    assert snapshot(dataset.folder) == whole
    for path in ("prompts.jsonl", "plan.json"):
        (dataset.folder / path).write_bytes(broken[path])
    dataset.add_prompts(GIVEN)  # as recording does
    assert snapshot(dataset.folder) == whole


def damage_text(dataset: TrajectoryDataset) -> None:
    path = dataset.folder / "prompts.jsonl"
    path.write_text(path.read_text().replace("clip 3", "clap 3"))


def damage_id(dataset: TrajectoryDataset) -> None:
    path = dataset.folder / "prompts.jsonl"
    path.write_text(path.read_text().replace(GIVEN[3].id, "f" * 16))


def damage_plan(dataset: TrajectoryDataset) -> None:
    (dataset.folder / "plan.json").write_text('{"additions": 3}')


def damage_both(dataset: TrajectoryDataset) -> None:
    lose_line(dataset, 3)
    dataset.prompt_path(GIVEN[3].id).write_bytes(b"")


FAULTS: dict[str, tuple[Callable[[TrajectoryDataset], None], set[str]]] = {
    "text": (damage_text, {"line"}),
    "id": (damage_id, {"line", "prompt"}),
    "plan": (damage_plan, {"plan"}),
    "line and file": (damage_both, {"line", "prompt"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_to_what_was_asked_is_found_and_mended(
    dataset: TrajectoryDataset, fault: str
) -> None:
    whole, (damage, kinds) = snapshot(dataset.folder), FAULTS[fault]
    if fault == "plan":  # the samples are told by the records then
        dataset.write(trajectory(GIVEN[0], sample=1))
        whole = snapshot(dataset.folder)
    damage(dataset)
    faults = dataset.verify()
    assert {fault.kind for fault in faults} == kinds
    dataset.repair(faults)
    dataset.add_prompts(GIVEN, 2)
    assert snapshot(dataset.folder) == whole and dataset.verify() == []


def test_repair_removes_nothing_that_is_whole(dataset: TrajectoryDataset, tmp_path: Path) -> None:
    before = snapshot(dataset.folder)
    elsewhere = tmp_path / "precious"
    elsewhere.write_text("")
    dataset.repair(
        [
            Fault("record", name(0), elsewhere, "it was damaged when it was looked at"),
            Fault("prompt", GIVEN[0].id, elsewhere, "so was this"),
            Fault("line", GIVEN[0].id, elsewhere, "and this"),
        ]
    )
    assert snapshot(dataset.folder) == before and elsewhere.exists()


def test_an_addition_is_whole_or_not_at_all(
    dataset: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(dataset.folder)
    rename = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).suffix in (".jsonl", ".json"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        dataset.add_prompts(prompts(7))
    monkeypatch.undo()
    after = snapshot(dataset.folder)
    assert {k: v for k, v in after.items() if k in before} == before and dataset.verify() == []
    dataset.add_prompts(prompts(7))
    assert [len(part) for part in read_listing(dataset.folder).additions] == [3, 2, 2]


def test_every_line_is_one_prompt(dataset: TrajectoryDataset) -> None:
    lines = (dataset.folder / "prompts.jsonl").read_text().split("\n")
    told = [json.loads(line)["text"] if line else "" for line in lines]
    assert told == ["clip 0", "clip 1", "clip 2", "", "clip 3", "clip 4", "", ""]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 0}, "format 0, older than the 2 that this version reads; record it again"),
        ({"format": 3}, "format 3, newer than the 2 that this version reads; update AccVideo"),
        (
            {"seed": None},
            r"of an older version \(it lacks seed\); choose another folder, or record",
        ),
        ({"format": None, "cfg": None}, r"older version \(it lacks format\)"),
    ],
)
def test_other_versions_say_so_in_one_sentence(
    dataset: TrajectoryDataset, change: dict, match: str
) -> None:
    """None takes a field out."""
    path = dataset.folder / "dataset.json"
    data = {**read_json(path), **change}
    write_json(path, {key: data[key] for key in data if change.get(key, data) is not None})
    for look in (TrajectoryDataset.open, lambda f: TrajectoryDataset.create(f, INFO)):
        with pytest.raises(AccVideoError, match=match):
            look(dataset.folder)


def test_of_two_datasets_begun_at_once_one_is_refused(tmp_path: Path) -> None:
    """While it waits for the other's dataset.json, the second has seen an empty folder."""
    pytest.importorskip("fcntl")
    folder = tmp_path / "clips"
    refused: list[str] = []

    def begin() -> None:
        try:
            TrajectoryDataset.create(folder, replace(INFO, seed=4))
        except AccVideoError as error:
            refused.append(str(error))

    second = threading.Thread(target=begin)
    with files.locked(folder / ".prompts.lock"):
        second.start()
        time.sleep(0.1)
        write_json(folder / "dataset.json", INFO.as_dict())
    second.join()
    assert len(refused) == 1 and "seed 4 instead of 3" in refused[0]
    assert TrajectoryDataset.open(folder).info == INFO

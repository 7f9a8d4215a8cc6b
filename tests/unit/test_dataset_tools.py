"""Merge, subset, split and mend: the same records, whole, in other datasets or made again."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accvideo_core.conditioning import Prompt
from accvideo_core.errors import AccVideoError
from accvideo_core.files import read_json
from accvideo_core.guidance import Cfg
from accvideo_core.models.loading import Teacher
from accvideo_core.models.video_model import VideoModel
from accvideo_core.monitor import Cancelled, Monitor, Progress, silent
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record, record_id
from accvideo_core.trajectories.listing import read_listing
from accvideo_core.trajectories.mend import mend
from accvideo_core.trajectories.tools import Choice, for_validation, merge, split, subset
from tests.analytic import condition, gaussian_model, prompts

MODEL = gaussian_model()
MANY = prompts(12)


def recorded(
    folder: Path, given: list[Prompt], model: VideoModel = MODEL, **changes: object
) -> TrajectoryDataset:
    settings = {"frames": 5, "height": 16, "width": 16, "steps": 4, "kept": 4, "batch_size": 2}
    return record(model, given, RecordSpec(**{**settings, **changes}), folder)  # type: ignore


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def content(folder: Path) -> dict[str, bytes]:
    """Records and prompts by path."""
    whole = snapshot(folder)
    return {name: whole[name] for name in whole if name.startswith(("records", "prompts/"))}


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def stop_after(count: int) -> Monitor:
    calls: list[Progress] = []

    def monitor(progress: Progress) -> None:
        calls.append(progress)
        if len(calls) > count:
            raise Cancelled

    return monitor


def no_link(*_args: object, **_options: object) -> None:
    raise OSError(errno.EXDEV, "another disk")


def flip_last_byte(path: Path) -> None:
    """Damage a file without reaching those that share its bytes by a hard link."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_a_merge_of_parts_is_the_whole(tmp_path: Path) -> None:
    """Two recordings that share prompts hold, merged, what one recording of all holds."""
    whole = recorded(tmp_path / "whole", MANY[:6], samples_per_prompt=2)
    one = recorded(tmp_path / "one", MANY[:4], samples_per_prompt=2)
    two = recorded(tmp_path / "two", MANY[2:6])
    three = recorded(tmp_path / "three", MANY[4:6], samples_per_prompt=2)
    made = merge([one, two, three], tmp_path / "made")
    assert content(made.folder) == content(whole.folder)
    assert made.batches() == whole.batches() and made.samples_per_prompt == 2
    assert made.info == whole.info and made.verify() == [] and hidden(tmp_path) == []
    assert [p.text for p in made.prompts()] == [p.text for p in MANY[:6]]
    assert read_json(made.folder / "origin.json")["made_by"] == "merge"
    # It is a dataset like any other: recording goes on in it.
    grown = recorded(made.folder, MANY[:6], samples_per_prompt=3)
    assert len(grown) == 18 and grown.verify() == []


def test_groups_stay_together_whatever_the_batch_sizes(tmp_path: Path) -> None:
    one = recorded(tmp_path / "one", MANY[:3], batch_size=3)
    two = recorded(tmp_path / "two", MANY[3:8], batch_size=2)
    made = merge([two, one], tmp_path / "made")
    assert made.info.batch_size == 3
    assert made.batches() == [*two.batches(), *one.batches()]
    for id in made.ids():
        made.record_path(id).unlink()
    record(MODEL, MANY[:8], RecordSpec(5, 16, 16, steps=4, kept=4, batch_size=3), made.folder)
    assert content(made.folder) == content(one.folder) | content(two.folder)


def test_files_are_linked_and_a_repair_leaves_the_other_name_alone(tmp_path: Path) -> None:
    one, two = recorded(tmp_path / "one", MANY[:2]), recorded(tmp_path / "two", MANY[2:4])
    made = merge([one, two], tmp_path / "made")
    for source in (one, two):
        for id in source.ids():
            assert made.record_path(id).samefile(source.record_path(id))
    before = snapshot(one.folder)
    id = one.ids()[0]
    flip_last_byte(made.record_path(id))
    made.repair(made.verify())
    assert not made.has(id) and snapshot(one.folder) == before


def test_without_hard_links_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_link)
    one, two = recorded(tmp_path / "one", MANY[:2]), recorded(tmp_path / "two", MANY[2:4])
    made = merge([one, two], tmp_path / "made")
    assert content(made.folder) == content(one.folder) | content(two.folder)
    id = one.ids()[0]
    assert not made.record_path(id).samefile(one.record_path(id)) and made.verify() == []


@pytest.mark.parametrize("links", [True, False])
def test_an_interrupted_merge_shows_nothing_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    one, two = recorded(tmp_path / "one", MANY[:3]), recorded(tmp_path / "two", MANY[3:6])
    out = tmp_path / "made"
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    for count in range(8):  # two comparisons and six records
        with pytest.raises(Cancelled):
            merge([one, two], out, stop_after(count))
        assert not out.exists()
    assert len(hidden(tmp_path)) == 1
    part = TrajectoryDataset.open(tmp_path / hidden(tmp_path)[0])
    times = {id: part.record_path(id).stat().st_mtime_ns for id in part.ids()}
    assert len(times) == 6
    made = merge([one, two], out)
    assert hidden(tmp_path) == [] and made.verify() == []
    assert {id: made.record_path(id).stat().st_mtime_ns for id in made.ids()} == times
    before = snapshot(out)
    merge([one, two], out)  # done already: nothing is made again
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 1}, "seed 1 instead of 0; more records of a prompt come from more samples"),
        ({"steps": 8}, "time_grid"),
        ({"kept": 2}, "kept"),
        ({"dtype": "float32"}, "dtype float32 instead of bfloat16"),
        ({"frames": 9}, "frames 9 instead of 5"),
        ({"width": 32}, "width 32 instead of 16"),
        ({"guidance": 4.0}, "guidance 4.0 instead of None"),
        ({"model": gaussian_model(std=0.26)}, "teacher "),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    tmp_path: Path, change: dict, difference: str
) -> None:
    one = recorded(tmp_path / "one", MANY[:2])
    two = recorded(tmp_path / "two", MANY[2:4], **change)
    with pytest.raises(AccVideoError, match=f"cannot be merged: the second has .*{difference}"):
        merge([one, two], tmp_path / "made")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_a_record_of_other_content_is_named(tmp_path: Path) -> None:
    one, two = recorded(tmp_path / "one", MANY[:2]), recorded(tmp_path / "two", MANY[1:3])
    shared = record_id(0, MANY[1].id, 0)
    flip_last_byte(two.record_path(shared))
    with pytest.raises(AccVideoError, match=f"record {shared} is in .* with different content"):
        merge([one, two], tmp_path / "made")
    assert not (tmp_path / "made").exists() and hidden(tmp_path) == []


def test_a_prompt_encoded_otherwise_is_named_and_rounding_is_not(tmp_path: Path) -> None:
    def encoded(folder: str, factor: float, more: Prompt) -> TrajectoryDataset:
        cond = condition()
        cond.text.mul_(factor)
        shared = Prompt.of("shared", cond)
        return recorded(tmp_path / folder, [shared, more], batch_size=1)

    one, close, far = (
        encoded(name, factor, more)
        for name, factor, more in (
            ("one", 1.0, MANY[0]),
            ("close", 1.0001, MANY[1]),
            ("far", 1.5, MANY[2]),
        )  # fmt: skip
    )
    made = merge([one, close], tmp_path / "made")
    shared = Prompt.of("shared", condition()).id
    assert made.prompt_path(shared).samefile(one.prompt_path(shared)) and len(made) == 3
    with pytest.raises(AccVideoError, match="prompt 'shared' was encoded otherwise in .*one .*far"):
        merge([one, far], tmp_path / "other")


def test_the_negative_prompt_comes_along(tmp_path: Path) -> None:
    negative = Prompt.of("bad", condition())
    settings = RecordSpec(5, 16, 16, steps=4, kept=2, cfg=Cfg(3.0))
    parts = [
        record(MODEL, given, settings, tmp_path / name, negative=negative)
        for name, given in (("one", MANY[:2]), ("two", MANY[2:4]))
    ]
    for made in (
        merge(parts, tmp_path / "made"),
        subset(parts[0], tmp_path / "few", Choice(records=1)),
    ):
        assert made.verify() == [] and made.prompt(negative.id).text == "bad"
        assert negative.id not in read_listing(made.folder).texts


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    whole = recorded(tmp_path / "whole", MANY[:4])
    out = subset(whole, tmp_path / "out", Choice(records=3)).folder
    before = snapshot(out)
    with pytest.raises(AccVideoError, match="out exists already; choose another name"):
        subset(whole, out, Choice(match="clip 1"))
    with pytest.raises(AccVideoError, match="whole exists already"):
        subset(whole, whole.folder, Choice(records=2))
    assert snapshot(out) == before and hidden(tmp_path) == []


def test_subsets_by_text_by_expression_and_by_number(tmp_path: Path) -> None:
    whole = recorded(tmp_path / "whole", MANY, samples_per_prompt=2)

    def taken(name: str, choice: Choice) -> tuple[TrajectoryDataset, set[tuple[str, int]]]:
        made = subset(whole, tmp_path / name, choice)
        assert made.verify() == [] and content(made.folder).items() <= content(whole.folder).items()
        texts = read_listing(made.folder).texts
        return made, {(texts[head.prompt_id], head.sample) for head in made.headers()}

    _, found = taken("text", Choice(texts=frozenset({"clip 3", "clip 7", "nothing"})))
    assert found == {("clip 3", 0), ("clip 3", 1), ("clip 7", 0), ("clip 7", 1)}
    _, found = taken("match", Choice(match=r"1\d$|^clip 2"))
    assert found == {(f"clip {n}", sample) for n in (2, 10, 11) for sample in (0, 1)}
    made, found = taken("number", Choice(records=5))
    assert found == {(f"clip {n}", 0) for n in range(5)} and made.samples_per_prompt == 1
    assert made.batches() == [*whole.batches()[:2], whole.batches()[2][:1]]
    made, found = taken("more", Choice(records=13))
    assert found == {(f"clip {n}", 0) for n in range(12)} | {("clip 0", 1)}
    _, found = taken("both", Choice(match="clip 1", records=2))
    assert found == {("clip 1", 0), ("clip 10", 0)}
    for choice in (Choice(match="cat"), Choice(texts=frozenset())):
        with pytest.raises(AccVideoError, match="no record of dataset 'whole' is chosen"):
            subset(whole, tmp_path / "none", choice)


def test_fewer_states_are_those_of_a_recording_of_fewer(tmp_path: Path) -> None:
    whole = recorded(tmp_path / "whole", MANY[:3])
    fewer = recorded(tmp_path / "fewer", MANY[:3], kept=(0, 2, 4))
    made = subset(whole, tmp_path / "made", Choice(kept=(0, 2, 4)))
    assert made.info == fewer.info and made.verify() == [] and made.ids() == fewer.ids()
    for id in made.ids():
        a, b = made.read(id), fewer.read(id)
        assert torch.equal(a.latents, b.latents) and a.times == b.times
    ends = subset(made, tmp_path / "ends", Choice(kept=(0, 4)))
    with pytest.raises(AccVideoError, match="state 2 is not stored .* choose among 0, 4"):
        subset(ends, tmp_path / "x", Choice(kept=(2,)))
    with pytest.raises(AccVideoError, match="kept states"):
        subset(whole, tmp_path / "x", Choice(kept=(2, 4)))


def test_a_split_has_every_record_once_and_no_prompt_twice(tmp_path: Path) -> None:
    whole = recorded(tmp_path / "whole", MANY, samples_per_prompt=2)
    train, held = split(whole, tmp_path / "train", tmp_path / "held", fraction=0.3)
    assert train.verify() == [] and held.verify() == []
    assert sorted([*train.ids(), *held.ids()]) == whole.ids()
    sides = [{head.prompt_id for head in side.headers()} for side in (train, held)]
    assert sides[0].isdisjoint(sides[1])
    assert [set(read_listing(side.folder).texts) for side in (train, held)] == sides
    before = snapshot(tmp_path)
    split(whole, tmp_path / "train", tmp_path / "held", fraction=0.3)
    assert snapshot(tmp_path) == before


def test_a_grown_dataset_keeps_earlier_prompts_on_their_side(tmp_path: Path) -> None:
    whole = recorded(tmp_path / "whole", MANY[:8])
    first = split(whole, tmp_path / "t", tmp_path / "v", fraction=0.4, seed=1)
    whole = recorded(tmp_path / "whole", MANY)
    second = split(whole, tmp_path / "t2", tmp_path / "v2", fraction=0.4, seed=1)
    for earlier, later in zip(first, second, strict=True):
        assert set(earlier.ids()) < set(later.ids())


def test_the_fraction_is_met_and_seeds_split_otherwise() -> None:
    ids = [f"{i:016x}" for i in range(20000)]
    for fraction in (0.05, 0.5):
        count = sum(for_validation(id, fraction, 0) for id in ids)
        spread = (20000 * fraction * (1 - fraction)) ** 0.5
        assert abs(count - 20000 * fraction) < 5 * spread
    # A greater fraction holds every prompt of a smaller one.
    assert all(for_validation(id, 0.5, 0) for id in ids if for_validation(id, 0.05, 0))
    both = sum(for_validation(id, 0.5, 0) and for_validation(id, 0.5, 1) for id in ids)
    assert abs(both - 5000) < 5 * (20000 * 0.25 * 0.75) ** 0.5


def test_a_split_that_stopped_between_its_sides_goes_on(tmp_path: Path) -> None:
    whole = recorded(tmp_path / "whole", MANY)
    sides = tmp_path / "train", tmp_path / "held"
    count = sum(not for_validation(p.id, 0.3, 0) for p in MANY)
    with pytest.raises(Cancelled):
        split(whole, *sides, 0.3, monitor=stop_after(count))
    assert sides[0].exists() and not sides[1].exists()
    split(whole, *sides, 0.3)
    assert sides[1].exists() and hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda d, p: merge([d], p / "x"), "1 dataset was given to merge; give at least two"),
        (lambda d, p: split(d, p / "a", p / "b", 0.0), "fraction is 0.0"),
        (lambda d, p: split(d, p / "a", p / "a"), "name two folders"),
        (lambda d, p: split(d, p / "a", p / "b", 1e-9), "falls to validation with fraction 1e-09"),
        (lambda d, p: split(d, p / "a", p / "b", 0.999999), "falls to training"),
        (lambda d, p: Choice(match="("), "is no regular expression"),
        (lambda d, p: Choice(records=0), "records is 0"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, work, message: str) -> None:
    dataset = recorded(tmp_path / "d", MANY[:2])
    with pytest.raises(AccVideoError, match=message) as caught:
        work(dataset, tmp_path)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_truncated_record_does_not_travel(tmp_path: Path) -> None:
    one, two = recorded(tmp_path / "one", MANY[:2]), recorded(tmp_path / "two", MANY[2:4])
    os.truncate(two.record_path(two.ids()[0]), 100)
    with pytest.raises(AccVideoError, match="truncated"):
        merge([one, two], tmp_path / "made")
    with pytest.raises(AccVideoError, match="truncated"):
        split(two, tmp_path / "a", tmp_path / "b")


class Texts(Teacher):
    """A teacher that encodes "clip 0", "clip 1", ... as `tests.analytic.prompts` does."""

    def encode_prompts(self, texts, guidance=None):
        return [Prompt.of(text, condition()) for text in texts]


TEACHER = Texts(MODEL, Path())


def test_mending_makes_exactly_what_was_damaged(tmp_path: Path) -> None:
    dataset = recorded(tmp_path / "d", MANY[:5], samples_per_prompt=2)
    before = snapshot(dataset.folder)
    ids = [record_id(0, MANY[i].id, sample) for i, sample in ((0, 0), (3, 1))]
    flip_last_byte(dataset.record_path(ids[0]))
    os.truncate(dataset.record_path(ids[1]), 7)
    dataset.prompt_path(MANY[0].id).unlink()
    times = {p: p.stat().st_mtime_ns for p in dataset.folder.rglob("*") if p.is_file()}
    calls: list[Progress] = []
    assert mend(dataset, dataset.verify(), TEACHER, monitor=calls.append) == []
    assert snapshot(dataset.folder) == before and dataset.verify() == []
    damaged = {dataset.record_path(id) for id in ids}
    made = {p for p in times if p.stat().st_mtime_ns != times[p]}
    assert made == damaged
    assert [p.step for p in calls] == list(range(1, 9)) and calls[-1].total == 8


def test_mending_wants_the_same_teacher(tmp_path: Path) -> None:
    dataset = recorded(tmp_path / "d", MANY[:2])
    flip_last_byte(dataset.record_path(dataset.ids()[0]))
    before = snapshot(dataset.folder)
    other = replace(TEACHER, model=gaussian_model(std=0.3))
    with pytest.raises(AccVideoError, match="give the teacher it was recorded from"):
        mend(dataset, dataset.verify(), other)
    assert snapshot(dataset.folder) == before


def test_what_cannot_be_encoded_again_is_left_and_said(tmp_path: Path) -> None:
    """A prompt with an image: its id follows from the image too, which a text does not give."""
    image = Prompt("00ff00ff00ff00ff", "clip of an image", condition())
    dataset = recorded(tmp_path / "d", [MANY[0], image, MANY[1]], batch_size=1)
    flip_last_byte(dataset.prompt_path(image.id))
    for prompt in (image, MANY[1]):
        flip_last_byte(dataset.record_path(record_id(0, prompt.id, 0)))
    notes = mend(dataset, dataset.verify(), TEACHER)
    assert len(notes) == 1 and f"prompt {image.id} cannot be encoded again" in notes[0]
    left = {(fault.kind, fault.id) for fault in dataset.verify()}
    assert left == {("prompt", image.id), ("record", record_id(0, image.id, 0))}


def test_a_damaged_negative_prompt_is_encoded_again(tmp_path: Path) -> None:
    negative = Prompt.of("bad", condition())
    settings = RecordSpec(5, 16, 16, steps=4, kept=2, cfg=Cfg(3.0))
    dataset = record(MODEL, MANY[:2], settings, tmp_path / "d", silent, negative)
    before = snapshot(dataset.folder)
    flip_last_byte(dataset.prompt_path(negative.id))
    flip_last_byte(dataset.record_path(dataset.ids()[0]))
    faults = dataset.verify()
    assert len(mend(dataset, faults, TEACHER)) == 1 and len(dataset.verify()) == 2
    assert mend(dataset, faults, TEACHER, negative) == []
    assert snapshot(dataset.folder) == before

"""A dataset on disk: what is written is read back, and what does not belong is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.errors import AccVideoError
from accvideo_core.files import read_json, write_json, write_safetensors
from accvideo_core.trajectories import DatasetInfo, Trajectory, TrajectoryDataset, record_id
from tests.analytic import SPEC, condition, prompts

INFO = DatasetInfo(
    family="analytic",
    teacher="cafe",
    teacher_source="analytic",
    latent_spec=SPEC,
    frames=5,
    height=16,
    width=16,
    time_grid=(1.0, 0.9, 0.7, 0.4, 0.0),
    kept=(0, 2, 4),
    guidance=None,
    seed=3,
    batch_size=2,
    dtype="bfloat16",
)


def trajectory(prompt: Prompt, sample: int = 0, info: DatasetInfo = INFO) -> Trajectory:
    id = record_id(info.seed, prompt.id, sample)
    generator = torch.Generator().manual_seed(int(id[:8], 16))
    latents = torch.randn(len(info.kept), *info.shape, generator=generator).bfloat16()
    return Trajectory(id, latents, info.times, info.seed, prompt.id, sample)


@pytest.fixture
def dataset(tmp_path: Path) -> TrajectoryDataset:
    made = TrajectoryDataset.create(tmp_path / "clips", INFO)
    made.add_prompts(prompts(3))
    for prompt in prompts(3):
        made.write(trajectory(prompt))
    return made


def record_file(dataset: TrajectoryDataset, index: int = 0) -> Path:
    id = dataset.ids()[index]
    return dataset.folder / "records" / id[:2] / f"{id}.safetensors"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_records_round_trip_bit_for_bit(dataset: TrajectoryDataset) -> None:
    opened = TrajectoryDataset.open(dataset.folder)
    assert opened.info == INFO and len(opened) == 3
    for prompt in prompts(3):
        written = trajectory(prompt)
        found = opened.read(written.id)
        assert torch.equal(found.latents, written.latents)
        assert found.latents.dtype == torch.bfloat16 and found.times == (1.0, 0.7, 0.0)
        assert (found.prompt_id, found.sample, found.seed) == (prompt.id, 0, 3)
    assert opened.verify() == []


def test_ids_are_sorted_and_follow_from_the_files_alone(dataset: TrajectoryDataset) -> None:
    expected = sorted(record_id(3, prompt.id, 0) for prompt in prompts(3))
    assert dataset.ids() == expected
    records = dataset.folder / "records"
    (records / "zz").mkdir()
    for name in (f".{expected[0]}.safetensors.12345678.tmp", "notes.txt", "X.safetensors"):
        (records / expected[0][:2] / name).write_text("")
    (records / "zz" / f"{expected[0]}.safetensors").write_text("a record in another's folder")
    assert dataset.ids() == expected and dataset.verify() == []


def test_load_all_takes_the_states_asked_for(dataset: TrajectoryDataset) -> None:
    ids = dataset.ids()[::-1]
    states = dataset.load_all(ids, [2, 0])
    assert states.shape == (3, 2, 2, 2, 2, 2) and states.dtype == torch.float32
    for row, id in zip(states, ids, strict=True):
        assert torch.equal(row, dataset.read(id).latents[[2, 0]].float())


def test_prompts_keep_text_condition_and_order(tmp_path: Path) -> None:
    dataset = TrajectoryDataset.create(tmp_path / "clips", INFO)
    cond = Condition(
        torch.randn(1, 4, 3).bfloat16(),
        torch.tensor([[True, True, False, False]]),
        torch.randn(1, 2),
        guidance=torch.tensor([6.0]),
    )
    given = [Prompt.of('say "hi"\n\u4f60\u597d', cond), Prompt.of("", cond), *prompts(2)]
    dataset.add_prompt(given[0])
    dataset.add_prompts(given)
    found = dataset.prompts()
    assert [(p.id, p.text) for p in found] == [(p.id, p.text) for p in given]
    for old, new in zip(given, found, strict=True):
        a, b = old.condition.tensors(), new.condition.tensors()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = (dataset.folder / "prompts.jsonl").read_text().split("\n")
    assert [json.loads(line)["id"] for line in lines if line] == [p.id for p in given]


def test_batches_never_cross_an_addition(tmp_path: Path) -> None:
    dataset = TrajectoryDataset.create(tmp_path / "clips", INFO)
    ids = [p.id for p in prompts(6)]
    dataset.add_prompts(prompts(3))
    before = dataset.batches()
    assert before == [(ids[0], ids[1]), (ids[2],)]
    dataset.add_prompts(prompts(3))
    assert dataset.batches() == before
    dataset.add_prompts(prompts(6))
    assert dataset.batches() == [*before, (ids[3], ids[4]), (ids[5],)]


@pytest.mark.parametrize("lost", [1, 20, 41, 42, 43, 60, 84, 85])
def test_an_interrupted_addition_is_continued(tmp_path: Path, lost: int) -> None:
    """However much of the end of prompts.jsonl is lost, adding again gives the same batches."""
    dataset = TrajectoryDataset.create(tmp_path / "clips", INFO)
    dataset.add_prompts(prompts(5))
    whole = dataset.batches()
    path = dataset.folder / "prompts.jsonl"
    os.truncate(path, path.stat().st_size - lost)
    dataset.add_prompts(prompts(5))
    assert dataset.batches() == whole
    assert TrajectoryDataset.open(dataset.folder).verify() == []


def test_another_encoding_of_a_known_prompt_is_refused(dataset: TrajectoryDataset) -> None:
    before = snapshot(dataset.folder)
    close, far = condition(), condition()
    close.text.mul_(1.01)
    far.text.add_(0.5)
    dataset.add_prompts([Prompt.of("clip 0", close)])
    for other in (far, condition(length=4), condition(offset=1.0)):
        with pytest.raises(AccVideoError, match="'clip 0' was encoded otherwise"):
            dataset.add_prompts([Prompt.of("new", other), Prompt.of("clip 0", other)])
    assert snapshot(dataset.folder) == before


def test_create_opens_what_is_there_only_with_the_same_settings(dataset: TrajectoryDataset) -> None:
    before = snapshot(dataset.folder)
    again = TrajectoryDataset.create(dataset.folder, replace(INFO, versions={"torch": "9"}))
    assert again.info == INFO
    other = replace(INFO, teacher="f00d", seed=4, frames=9)
    with pytest.raises(AccVideoError) as caught:
        TrajectoryDataset.create(dataset.folder, other)
    message = str(caught.value)
    for part in ("teacher f00d instead of cafe", "seed 4 instead of 3", "frames 9 instead of 5"):
        assert part in message
    assert "under another name" in message and snapshot(dataset.folder) == before


def test_a_folder_with_other_things_in_it_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(AccVideoError, match="holds 'holiday.jpg'; choose another name"):
        TrajectoryDataset.create(tmp_path, INFO)
    assert os.listdir(tmp_path) == ["holiday.jpg"]


def test_open_says_what_is_wrong_with_a_folder(dataset: TrajectoryDataset, tmp_path: Path) -> None:
    with pytest.raises(AccVideoError, match="is no trajectory dataset"):
        TrajectoryDataset.open(tmp_path)
    path = dataset.folder / "dataset.json"
    data = read_json(path)
    for changed, match in (
        ({**data, "format": 3}, "format 3, newer than the 2"),
        ({**data, "dtype": "int4"}, "dtype 'int4' is unknown"),
        ({"format": 2}, "does not describe a trajectory dataset"),
        ([], "does not describe a trajectory dataset"),
    ):
        write_json(path, changed)
        with pytest.raises(AccVideoError, match=match):
            TrajectoryDataset.open(dataset.folder)
    path.write_text("{")
    with pytest.raises(AccVideoError, match="is not JSON"):
        TrajectoryDataset.open(dataset.folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"frames": 6}, "6 frames do not fit"),
        ({"height": 17}, "height 17 is not a multiple"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown"),
        ({"kept": (0, 5)}, r"kept states \[0, 5\]"),
        ({"kept": (2, 4)}, "from 0"),
        ({"kept": (0, 2, 2)}, "rising"),
        ({"kept": (0,)}, "at least two"),
        ({"time_grid": (0.0, 1.0)}, "must fall strictly"),
    ],
)
def test_impossible_settings_are_refused(change: dict, match: str) -> None:
    with pytest.raises(AccVideoError, match=match):
        replace(INFO, **change)


WRONG: dict[str, Callable[[Trajectory], Trajectory]] = {
    "shape": lambda t: replace(t, latents=t.latents[:, :, :1]),
    "dtype": lambda t: replace(t, latents=t.latents.float()),
    "times": lambda t: replace(t, times=(1.0, 0.6, 0.0)),
    "seed": lambda t: replace(t, seed=4),
    "id": lambda t: replace(t, sample=7),
    "NaN": lambda t: replace(t, latents=t.latents * float("nan")),
    "infinite": lambda t: replace(t, latents=t.latents / 0),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_does_not_belong_is_not_written(dataset: TrajectoryDataset, fault: str) -> None:
    before = snapshot(dataset.folder)
    with pytest.raises(AccVideoError, match=fault):
        dataset.write(WRONG[fault](trajectory(prompts(1)[0], sample=1)))
    assert snapshot(dataset.folder) == before


def test_verify_finds_every_planted_fault_and_nothing_else(tmp_path: Path) -> None:
    dataset = TrajectoryDataset.create(tmp_path / "clips", INFO)
    given = prompts(9)
    dataset.add_prompts(given[:8])
    for prompt in given:
        dataset.write(trajectory(prompt))
    paths = [dataset.record_path(record_id(3, p.id, 0)) for p in given]
    prompt_files = [dataset.prompt_path(p.id) for p in given]

    os.truncate(paths[0], paths[0].stat().st_size - 1)
    data = bytearray(paths[1].read_bytes())
    data[-5] ^= 4
    paths[1].write_bytes(data)
    paths[2].write_bytes(paths[3].read_bytes())  # a copy under another's name
    meta = {"seed": "3", "prompt_id": given[4].id, "sample": "0", "times": "[1.0,0.7,0.0]"}
    good = trajectory(given[4]).latents
    write_safetensors(paths[4], {"latents": good * float("nan")}, {**meta, "teacher": "cafe"})
    write_safetensors(paths[5], {"latents": good}, {**meta, "teacher": "f00d"})
    write_safetensors(paths[6], {"latents": good}, meta)
    prompt_files[7].write_bytes(b"")
    # Prompt 8 was never added: its records have no condition and no line.

    faults = dataset.verify()
    named = [
        (paths[0], "truncated"),
        (paths[1], "checksum"),
        (paths[2], "its id is"),
        (paths[4], "NaN or infinite"),
        (paths[5], "recorded from teacher f00d instead of cafe"),
        (paths[6], "is not a trajectory"),
        (prompt_files[7], "truncated"),
        (prompt_files[8], "cannot read"),
    ]
    for path, words in named:
        assert [f for f in faults if str(path) in f.text and words in f.text], (path.name, words)
    assert any(f"prompt {given[8].id} is not in prompts.jsonl" in f.text for f in faults)
    assert len(faults) == len(named) + 1
    remedies = ("delete it", "check the path", "record it again")
    assert all(any(remedy in str(f) for remedy in remedies) for f in faults)


def test_hostile_ids_reach_no_file(dataset: TrajectoryDataset) -> None:
    for id in ("../../dataset", "/etc/passwd", "", "a\0"):
        with pytest.raises(AccVideoError, match="use a plain name"):
            dataset.read(id)
        with pytest.raises(AccVideoError, match="use a plain name"):
            dataset.add_prompt(Prompt(id, "x", condition()))


def test_a_missing_record_is_named(dataset: TrajectoryDataset) -> None:
    record_file(dataset).unlink()
    assert len(dataset) == 2
    with pytest.raises(AccVideoError, match="cannot read"):
        dataset.read(record_id(3, "nobody", 0))

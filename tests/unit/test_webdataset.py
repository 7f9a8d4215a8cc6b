"""The export: read back with nothing but tarfile, and with the webdataset package."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.errors import AccVideoError
from accvideo_core.files import locked, read_json
from accvideo_core.guidance import Cfg
from accvideo_core.monitor import Cancelled, Progress
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record
from accvideo_core.trajectories.webdataset import Export, export_webdataset
from tests.analytic import condition, gaussian_model

NAMES = ["json", "txt", "latents.safetensors", "condition.safetensors"]


def given(count: int) -> list[Prompt]:
    """Prompts of 1, 2, 3, ... tokens, with a pooled vector."""
    made = []
    for i in range(count):
        text = condition(length=i + 1).text.bfloat16()
        mask = torch.ones(1, i + 1, dtype=torch.bool)
        made.append(Prompt.of(f"clip \u00e9 {i}", Condition(text, mask, torch.ones(1, 1) * i)))
    return made


def recorded(folder: Path, count: int = 5, **changes: object) -> TrajectoryDataset:
    settings = {"frames": 5, "height": 16, "width": 16, "steps": 4, "kept": 4, "batch_size": 2}
    spec = RecordSpec(**{"cfg": Cfg(3.0), **settings, **changes})  # type: ignore[arg-type]
    negative = Prompt.of("bad", given(2)[1].condition)
    return record(gaussian_model(), given(count), spec, folder, negative=negative)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryDataset:
    return recorded(tmp_path_factory.mktemp("webdataset") / "clips")


def plain(paths: list[Path]) -> dict[str, dict[str, bytes]]:
    """Samples by key, as the WebDataset convention has it: a key ends at the first dot."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for entry in tar:
                key, _, name = entry.name.partition(".")
                file = tar.extractfile(entry)
                assert file is not None and (not samples or key >= list(samples)[-1])
                samples.setdefault(key, {})[name] = file.read()
    return samples


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_plain_tarfile_reads_every_sample(dataset: TrajectoryDataset, tmp_path: Path) -> None:
    samples = plain(export_webdataset(dataset, tmp_path / "out", Export(conditions=True)))
    assert list(samples) == dataset.ids()
    for id, files in samples.items():
        assert list(files) == NAMES
        found, facts = dataset.read(id), json.loads(files["json"])
        assert torch.equal(load(files["latents.safetensors"])["latents"], found.latents)
        prompt = dataset.prompt(found.prompt_id)
        assert facts["prompt"] == files["txt"].decode() == prompt.text
        assert facts["times"] == list(found.times) and facts["seed"] == 0
        assert facts["sample"] == found.sample and facts["cfg"]["scale"] == 3.0
        tensors, expected = load(files["condition.safetensors"]), prompt.condition.tensors()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    about = read_json(tmp_path / "out" / "export.json")
    assert about["dataset"] == json.loads(json.dumps(dataset.info.as_dict()))
    assert read_json(tmp_path / "out" / "shards.json") == {"00000.tar": 5}
    assert load((tmp_path / "out" / "negative.safetensors").read_bytes())["text"].shape == (1, 2, 2)


def test_numpy_reads_the_states_without_loss(dataset: TrajectoryDataset, tmp_path: Path) -> None:
    how = Export(tensors="npy", conditions=True, text_length=8)
    samples = plain(export_webdataset(dataset, tmp_path / "out", how))
    for id, files in samples.items():
        arrays = {
            name: np.load(io.BytesIO(data), allow_pickle=False)
            for name, data in files.items()
            if name.endswith(".npy")
        }
        found = dataset.read(id)
        states = np.concatenate([arrays["path.npy"], arrays["latent.npy"][None]])
        assert arrays["path.npy"].shape == (4, 2, 2, 2, 2) and states.dtype == np.float32
        assert torch.equal(torch.from_numpy(states), found.latents.float())
        cond = dataset.prompt(found.prompt_id).condition
        length = cond.text.shape[1]
        text = torch.from_numpy(arrays["txt_emb.npy"])
        assert text.shape == (8, 2) and torch.equal(text[:length], cond.text[0].float())
        assert text[length:].abs().sum() == 0 and arrays["mask.npy"].sum() == length
        assert cond.pooled is not None and arrays["pooled.npy"] == cond.pooled[0]
    assert np.load(tmp_path / "out" / "negative.txt_emb.npy").shape == (8, 2)


@pytest.mark.parametrize("tensors", ["safetensors", "npy"])
def test_the_webdataset_package_reads_every_sample(
    dataset: TrajectoryDataset, tmp_path: Path, tensors: str
) -> None:
    webdataset = pytest.importorskip("webdataset")
    shards = export_webdataset(dataset, tmp_path / "out", Export(1, tensors))
    assert len(shards) == 5
    reader = webdataset.WebDataset([str(p) for p in shards], shardshuffle=False).decode()
    samples = list(reader)
    assert [sample["__key__"] for sample in samples] == dataset.ids()
    for sample in samples:
        found = dataset.read(sample["__key__"])
        assert sample["json"]["prompt"] == sample["txt"]
        if tensors == "npy":
            assert np.array_equal(sample["latent.npy"], found.latents[-1].float().numpy())
        else:
            assert torch.equal(load(sample["latents.safetensors"])["latents"], found.latents)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"conditions": True},
        {"tensors": "npy"},
        {"tensors": "npy", "conditions": True},
        {"tensors": "npy", "conditions": True, "text_length": 99},
    ],
)
@pytest.mark.parametrize("size", [1, 25_000, 60_000, 10**9])
def test_no_tar_is_larger_than_asked(
    dataset: TrajectoryDataset, tmp_path: Path, size: int, how: dict
) -> None:
    shards = export_webdataset(dataset, tmp_path / "out", Export(size, **how))
    counts = read_json(tmp_path / "out" / "shards.json")
    assert list(counts) == [path.name for path in shards] and sum(counts.values()) == 5
    for path in shards:
        assert len(plain([path])) == counts[path.name]
        assert path.stat().st_size <= size or counts[path.name] == 1
    assert len(shards) == {1: 5, 10**9: 1}.get(size, len(shards))
    assert list(plain(shards)) == dataset.ids()


def test_the_same_records_give_the_same_bytes(dataset: TrajectoryDataset, tmp_path: Path) -> None:
    again = recorded(tmp_path / "clips")
    for source, name in ((dataset, "a"), (again, "b")):
        export_webdataset(source, tmp_path / name, Export(30_000, conditions=True))
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "00000.tar") as tar:
        for entry in tar:
            assert (entry.mtime, entry.uid, entry.gid) == (0, 0, 0)
            assert (entry.uname, entry.gname) == ("", "")


def test_cancel_leaves_whole_tars_and_the_export_goes_on(
    dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    how, out = Export(25_000), tmp_path / "out"
    export_webdataset(dataset, tmp_path / "whole", how)
    whole = snapshot(tmp_path / "whole")
    stages: set[int] = set()
    for stop in range(12):
        calls: list[Progress] = []

        def cancel(progress: Progress, stop: int = stop, calls: list[Progress] = calls) -> None:
            calls.append(progress)
            if len(calls) > stop:
                raise Cancelled

        try:
            export_webdataset(dataset, out, how, cancel)
        except Cancelled:
            made = snapshot(out)
            assert "shards.json" not in made and made.items() <= whole.items()
            stages.add(len(made))
    assert stages >= {2, 3}  # with the lock file
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    steps: list[tuple[int, int]] = []
    export_webdataset(dataset, out, how, lambda p: steps.append((p.step, p.total)))
    assert snapshot(out) == whole and steps[-1] == (5, 5)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_other_exports_and_other_things_are_not_overwritten(tmp_path: Path) -> None:
    clips = recorded(tmp_path / "clips", 2)
    out = tmp_path / "out"
    export_webdataset(clips, out, Export())
    before = snapshot(out)
    with pytest.raises(AccVideoError, match="holds an export of other records, or one made other"):
        export_webdataset(clips, out, Export(conditions=True))
    recorded(tmp_path / "clips", 3)
    with pytest.raises(AccVideoError, match="choose another folder"):
        export_webdataset(clips, out, Export())
    assert snapshot(out) == before
    with pytest.raises(AccVideoError, match="is no export but holds 'dataset.json'"):
        export_webdataset(clips, clips.folder, Export())
    assert not (clips.folder / ".export.lock").exists()


def test_a_damaged_record_is_not_exported(tmp_path: Path) -> None:
    clips = recorded(tmp_path / "clips", 3)
    path = clips.record_path(clips.ids()[1])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AccVideoError, match="checksum"):
        export_webdataset(TrajectoryDataset.open(clips.folder), tmp_path / "out", Export(1))
    assert snapshot(tmp_path / "out").keys() == {".export.lock", "00000.tar", "export.json"}


def test_what_a_killed_export_left_goes_at_once(dataset: TrajectoryDataset, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".00000.tar.0a1b2c3d.tmp").write_bytes(bytes(1000))
    export_webdataset(dataset, out, Export())
    assert snapshot(out).keys() == {".export.lock", "00000.tar", "export.json", "shards.json"}


def test_a_second_export_waits_for_the_first_and_has_nothing_left_to_do(
    dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    pytest.importorskip("fcntl")
    out, other = tmp_path / "out", tmp_path / "other"
    export_webdataset(dataset, other, Export())
    steps: list[int] = []
    second = threading.Thread(
        target=lambda: export_webdataset(dataset, out, Export(), lambda p: steps.append(p.step))
    )
    with locked(out / ".export.lock"):
        second.start()
        time.sleep(0.1)
        assert steps == []
        for name, data in snapshot(other).items():
            (out / name).write_bytes(data)
        made = (out / "00000.tar").stat().st_mtime_ns
    second.join()
    assert steps == [len(dataset)] and (out / "00000.tar").stat().st_mtime_ns == made
    assert snapshot(out) == snapshot(other)


def test_a_disk_without_locks_takes_an_export_and_keeps_what_may_be_in_the_making(
    dataset: TrajectoryDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_args: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    out = tmp_path / "out"
    out.mkdir()
    (out / ".00000.tar.0a1b2c3d.tmp").touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert len(export_webdataset(dataset, out, Export())) == 1
    assert (out / ".00000.tar.0a1b2c3d.tmp").exists()


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    for words, message in (
        ({"shard_size": 0}, "shard_size is 0"),
        ({"tensors": "pth"}, "tensors 'pth' is unknown; use safetensors or npy"),
        ({"text_length": 5}, "text_length is for npy"),
    ):
        with pytest.raises(AccVideoError, match=message):
            Export(**words)
    clips = recorded(tmp_path / "clips", 3)
    with pytest.raises(AccVideoError, match="has 3 tokens, more than the text length 2"):
        how = Export(tensors="npy", conditions=True, text_length=2)
        export_webdataset(clips, tmp_path / "out", how)
    short = recorded(tmp_path / "short", 1, kept=(0, 2))
    with pytest.raises(AccVideoError, match="no finished video; export as safetensors"):
        export_webdataset(short, tmp_path / "x", Export(tensors="npy"))
    for id in short.ids():
        short.record_path(id).unlink()
    with pytest.raises(AccVideoError, match="'short' has no records"):
        export_webdataset(short, tmp_path / "x", Export())
    assert not (tmp_path / "x").exists()

"""`accvideo dataset ...` in the terminal, on a teacher known in closed form."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from accvideo_core.cli import main
from accvideo_core.conditioning import Prompt
from accvideo_core.dataset_commands import byte_size
from accvideo_core.errors import AccVideoError
from accvideo_core.models import loading
from accvideo_core.models.loading import Teacher
from accvideo_core.monitor import Cancelled
from accvideo_core.terminal import Terminal
from accvideo_core.trajectories import TrajectoryDataset
from tests.analytic import condition, gaussian_model

WORDS = ["cat", "dog", "red cat", "red dog", "bird", "fish"]


class SmallVAE:
    """Grey frames: a latent pixel is one of 8 x 8, a latent frame (but the first) is 4."""

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        grey = x[:, :1].repeat_interleave(8, 3).repeat_interleave(8, 4)
        video = torch.cat([grey[:, :, :1], grey[:, :, 1:].repeat_interleave(4, 2)], dim=2)
        return (video / 8 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).repeat(1, 1, 1, 1, 3)


class SmallTeacher(Teacher):
    """The closed-form teacher, with a text encoder that says the same of every text."""

    @property
    def vae(self):
        return SmallVAE()

    def check_encoders(self):
        pass

    def encode_each(self, given, frames=1, guidance=None):
        return (Prompt.of(text, condition()) for text, _image in given)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    teacher = SmallTeacher(gaussian_model(), tmp_path)
    monkeypatch.setattr(loading, "load_teacher", lambda *_args, **_options: teacher)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def clips(here: Path) -> TrajectoryDataset:
    record("clips", *WORDS)
    return TrajectoryDataset.open(here / "clips")


def record(name: str, *words: str, more: tuple[str, ...] = ()) -> None:
    texts = [part for word in words for part in ("--prompt", word)]
    size = ["--frames", "5", "--height", "16", "--width", "16", "--steps", "4", "--keep", "2"]
    assert main(["record", name, *size, *texts, "--batch", "2", *more]) == 0


def damage(dataset: TrajectoryDataset) -> list[str]:
    """Flip a bit of one record and cut another off; their ids."""
    ids = dataset.ids()[1:3]
    data = bytearray(dataset.record_path(ids[0]).read_bytes())
    data[-1] ^= 1
    dataset.record_path(ids[0]).write_bytes(data)
    os.truncate(dataset.record_path(ids[1]), 50)
    return ids


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def prompts_in(name: str) -> set[str]:
    return {prompt.text for prompt in TrajectoryDataset.open(Path(name)).prompts()}


def test_verify_names_every_fault_and_repair_mends_them(capsys, clips: TrajectoryDataset) -> None:
    before = snapshot(clips.folder)
    assert main(["dataset", "verify", "clips"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "clips has 6 records and no fault"
    ids = damage(clips)
    assert main(["dataset", "verify", "clips"]) == 1
    *faults, last = capsys.readouterr().out.splitlines()
    assert last == "clips has 2 faults" and len(faults) == 2
    assert ids[0] in faults[0] and "checksum" in faults[0]
    assert ids[1] in faults[1] and "truncated" in faults[1]
    assert main(["dataset", "verify", "clips", "--quick"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "clips has 1 fault"
    assert main(["dataset", "verify", "clips", "--repair"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "clips has 6 records and no fault" and len(said) == 4
    assert snapshot(clips.folder) == before


def test_repair_wants_the_teacher_that_recorded(
    capsys, clips: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(clips)
    before = snapshot(clips.folder)
    other = SmallTeacher(gaussian_model(std=0.3), Path())
    monkeypatch.setattr(loading, "load_teacher", lambda *_args, **_options: other)
    assert main(["dataset", "verify", "clips", "--repair"]) == 2
    assert "accvideo dataset: dataset 'clips' was recorded from" in capsys.readouterr().err
    assert snapshot(clips.folder) == before


def test_stats_are_printed_and_make_a_page(
    capsys, clips: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["dataset", "stats", "clips", "--out", "page", "--samples", "4"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["records"].startswith("6 of 6 prompts") and said["measured"] == "4 records"
    assert said["prompt"] == "lengths 1 to 2 words, median 1"
    assert said["motion"].count(" to ") == 1 and "MB a record" in said["storage"]
    facts = json.loads(Path("page/stats.json").read_text())
    assert facts["records"] == 6 and facts["figures"]["saturation"]["mean"] == 0  # grey frames
    assert said["page"] == "page/index.html"
    assert len(list(Path("page/previews").glob("*.mp4"))) == 6
    # Another teacher decodes nothing, and is an error when it was asked for.
    other = SmallTeacher(gaussian_model(std=0.3), Path())
    monkeypatch.setattr(loading, "load_teacher", lambda *_args, **_options: other)
    assert main(["dataset", "stats", "clips"]) == 0
    out, err = capsys.readouterr()
    assert "clips are not decoded; give the --teacher (analytic)" in err
    assert "latent motion" in out and "saturation" not in out
    assert main(["dataset", "stats", "clips", "--teacher", "x"]) == 2
    assert "name its own teacher" in capsys.readouterr().err


def test_a_record_is_looked_into(
    capsys, clips: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["inspect", "clips", "--record", "2", "--out", "look"]) == 0
    out = capsys.readouterr().out
    assert f"record {clips.ids()[2]}, sample 0" in out and "bend: " in out
    assert {p.name for p in Path("look").iterdir()} == {"curves.json", "curves.png", "states.png"}
    for which, sentence in (("6", "has no record '6'; give a number from 0 to 5"), ("", "--out")):
        words = ["--record", which, "--out", "look"] if which else ["--record", "first"]
        assert main(["inspect", "clips", *words]) == 2
        assert sentence in capsys.readouterr().err
    # Another teacher cannot decode the states; their curves need none.
    other = SmallTeacher(gaussian_model(std=0.3), Path())
    monkeypatch.setattr(loading, "load_teacher", lambda *_args, **_options: other)
    assert main(["inspect", "clips", "--record", "random", "--out", "plain"]) == 0
    assert "states are not decoded; give the --teacher (analytic)" in capsys.readouterr().err
    assert {p.name for p in Path("plain").iterdir()} == {"curves.json", "curves.png"}


def test_merge_subset_and_split(capsys, clips: TrajectoryDataset) -> None:
    record("more", "tree", "house")
    assert main(["dataset", "merge", "clips", "more", "all"]) == 0
    assert "8 records of 8 prompts are in all" in capsys.readouterr().out
    assert main(["dataset", "subset", "all", "red", "--match", "^red"]) == 0
    assert prompts_in("red") == {"red cat", "red dog"}
    Path("few.txt").write_text("dog\ntree\nzebra\n")
    assert main(["dataset", "subset", "all", "few", "--prompts", "few.txt"]) == 0
    assert prompts_in("few") == {"dog", "tree"}
    assert "1 of 3 prompts in few.txt are not in all, such as 'zebra'" in capsys.readouterr().err
    assert main(["dataset", "subset", "all", "ends", "--kept", "0,4", "--records", "3"]) == 0
    made = TrajectoryDataset.open(Path("ends"))
    assert made.info.kept == (0, 4) and len(made) == 3 and made.info.times == (1.0, 0.0)
    assert main(["dataset", "split", "all", "train", "held", "--fraction", "0.4"]) == 0
    assert prompts_in("train") | prompts_in("held") == {*WORDS, "tree", "house"}
    assert prompts_in("train").isdisjoint(prompts_in("held"))
    for name in ("all", "red", "few", "ends", "train", "held"):
        assert main(["dataset", "verify", name]) == 0


def test_a_side_of_a_split_is_trained_on_like_any_dataset(clips: TrajectoryDataset) -> None:
    assert main(["dataset", "split", "clips", "train", "held", "--fraction", "0.4"]) == 0
    record("train", *sorted(prompts_in("train")), more=("--samples", "2"))
    train = TrajectoryDataset.open(Path("train"))
    assert len(train) == 2 * len(prompts_in("train")) and train.verify() == []


def test_export_writes_tars(capsys, clips: TrajectoryDataset) -> None:
    words = ["dataset", "export", "clips", "tars", "--shard-size", "20KB"]
    assert main([*words, "--tensors", "npy", "--conditions", "--text-length", "5"]) == 0
    said = capsys.readouterr().out
    counts = json.loads(Path("tars/shards.json").read_text())
    assert f"6 records are in {len(counts)} tars in tars" in said and sum(counts.values()) == 6
    assert main(words) == 2
    assert "holds an export of other records" in capsys.readouterr().err


def test_cancel_exits_130_and_the_same_command_goes_on(
    capsys, clips: TrajectoryDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_self: Terminal, _progress: object) -> None:
        raise Cancelled

    commands = [["subset", "clips", "out", "--records", "3"], ["export", "clips", "tars"]]
    with monkeypatch.context() as patch:
        patch.setattr(Terminal, "__call__", stop)
        for words in commands:
            assert main(["dataset", *words]) == 130
    assert not Path("out").exists() and not list(Path("tars").glob("*.tar"))
    for words in commands:
        assert main(["dataset", *words]) == 0
    assert len(TrajectoryDataset.open(Path("out"))) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "none"], "none is no trajectory dataset"),
        (["merge", "clips", "out"], "1 dataset was given to merge"),
        (["merge", "clips", "other", "out"], "the second has seed 1 instead of 0"),
        (["subset", "clips", "out"], "nothing is chosen; give at least one of --prompts"),
        (["subset", "clips", "out", "--kept", "0,3"], "state 3 is not stored"),
        (["subset", "clips", "out", "--kept", "0"], "at least two"),
        (["subset", "clips", "out", "--kept", "x"], "'x' is not a whole number"),
        (["subset", "clips", "out", "--match", "["], "is no regular expression"),
        (["subset", "clips", "out", "--prompts", "none.txt"], "none.txt"),
        (["subset", "clips", "clips", "--records", "1"], "clips exists already"),
        (["split", "clips", "a", "b", "--fraction", "2"], "fraction is 2.0"),
        (["split", "clips", "a", "a"], "name two folders"),
        (["export", "clips", "out", "--shard-size", "big"], "'big' is no size"),
        (["export", "clips", "out", "--text-length", "9"], "text_length is for npy"),
    ],
)
def test_every_error_is_one_line_and_exit_code_2(
    capsys, clips: TrajectoryDataset, words: list[str], message: str
) -> None:
    record("other", "tree", more=("--seed", "1"))
    capsys.readouterr()
    assert main(["dataset", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("accvideo dataset: ") and message in error[-1]
    assert not Path("out").exists() and not Path("a").exists()


def test_sizes_are_read_as_people_write_them() -> None:
    right = {"1GB": 10**9, "500 MB": 5 * 10**8, "2GiB": 2**31, "1.5k": 1500, "7": 7, "3B": 3}
    assert {text: byte_size(text) for text in right} == right
    for text in ("", "GB", "-1GB", "1PB", "one", "1GG"):
        with pytest.raises(AccVideoError, match="is no size; write it like 1GB"):
            byte_size(text)


@pytest.mark.parametrize("action", ["verify", "stats", "merge", "subset", "split", "export"])
def test_every_action_has_help_with_an_example(capsys, action: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(["dataset", action, "--help"])
    assert done.value.code == 0
    assert f"example:\n  accvideo dataset {action} clips" in capsys.readouterr().out


def test_a_folder_that_moves_is_the_same_dataset(clips: TrajectoryDataset) -> None:
    """What was made may be moved and its sources deleted: linked files are its own."""
    assert main(["dataset", "subset", "clips", "few", "--records", "2"]) == 0
    shutil.rmtree("clips")
    shutil.move("few", "moved")
    assert main(["dataset", "verify", "moved"]) == 0

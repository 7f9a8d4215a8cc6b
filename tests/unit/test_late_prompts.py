"""Late prompts with images: how often they are encoded, in what order, and under which ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_wan
from PIL import Image
from torch import Tensor

from accvideo_core.conditioning import AnyPrompt, LatePrompt, encoded
from accvideo_core.errors import AccVideoError
from accvideo_core.models.loading import Teacher, load_teacher
from accvideo_core.models.vae import VideoVAE
from accvideo_core.monitor import Cancelled, Monitor, Progress, silent
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record
from accvideo_core.trajectories.prompts import PromptEntry, encode_entries

TEXT = "a red square moving left"
SIZE = (5, 32, 48)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_teacher(tiny_wan.save_pipeline("wan_i2v", tmp_path_factory.mktemp("wan") / "wan"))


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The red of every image that the VAE has seen."""
    seen: list[float] = []
    encode = VideoVAE.encode

    def counted(self: VideoVAE, frames: Tensor) -> Tensor:
        seen.append(round(float(frames[0, 0, 0, 0, 0]) * 255))
        return encode(self, frames)

    monkeypatch.setattr(VideoVAE, "encode", counted)
    return seen


@pytest.fixture
def entries(tmp_path: Path) -> list[PromptEntry]:
    """Five images of one caption."""
    for red in range(5):
        Image.new("RGB", SIZE[:0:-1], (red, 0, 0)).save(tmp_path / f"{red}.png")
    return [PromptEntry(TEXT, tmp_path / f"{red}.png", red) for red in range(5)]


def late(teacher: Teacher, entries: list[PromptEntry]) -> tuple[AnyPrompt, ...]:
    return encode_entries(teacher, entries, SIZE, later=True).prompts


def work(
    teacher: Teacher, entries: list[PromptEntry], folder: Path, monitor: Monitor = silent
) -> TrajectoryDataset:
    spec = RecordSpec(*SIZE, steps=2, kept=1, batch_size=2)
    negative = teacher.encode_negative()
    return record(teacher.model, late(teacher, entries), spec, folder, monitor, negative)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stopping(stage: str, step: int) -> Callable[[Progress], None]:
    def monitor(progress: Progress) -> None:
        if (progress.stage, progress.step) == (stage, step):
            raise Cancelled

    return monitor


def test_ids_follow_from_text_and_file_as_they_always_did(
    teacher: Teacher, entries: list[PromptEntry]
) -> None:
    """Another rule would record every prompt of an older dataset again."""
    given = [*entries[:2], PromptEntry("square", None, 0)]
    files = [(TEXT + "\0").encode() + path.read_bytes() for path in _images(given)]
    expected = [hashlib.sha256(data).hexdigest()[:16] for data in (*files, b"square")]
    assert [prompt.id for prompt in late(teacher, given)] == expected
    at_once = encode_entries(teacher, given, SIZE).prompts
    assert [prompt.id for prompt in at_once] == expected


def _images(entries: list[PromptEntry]) -> list[Path]:
    return [entry.image for entry in entries if entry.image is not None]


def test_images_are_encoded_once_each_in_their_order_and_one_at_a_time(
    teacher: Teacher, entries: list[PromptEntry], looked: list[float], tmp_path: Path
) -> None:
    prompts = late(teacher, entries)
    assert all(isinstance(prompt, LatePrompt) for prompt in prompts) and looked == []
    for number, prompt in enumerate(encoded(prompts)):
        assert looked == list(range(number + 1)) and prompt.id == prompts[number].id
        assert prompt.condition.image is not None
    looked.clear()
    steps: list[Progress] = []
    dataset = work(teacher, entries, tmp_path / "clips", steps.append)
    assert len(dataset) == 5 and looked == [0, 1, 2, 3, 4]
    told = [(each.step, each.total) for each in steps if each.stage == "encode"]
    assert told == [(number, 5) for number in range(1, 6)]
    assert steps[-1].stage == "record"


def test_what_was_encoded_before_an_interruption_is_not_encoded_again(
    teacher: Teacher, entries: list[PromptEntry], looked: list[float], tmp_path: Path
) -> None:
    whole = snapshot(work(teacher, entries, tmp_path / "whole").folder)
    looked.clear()
    torn = tmp_path / "torn"
    with pytest.raises(Cancelled):
        work(teacher, entries, torn, stopping("encode", 2))
    with pytest.raises(Cancelled):
        work(teacher, entries, torn, stopping("record", 1))
    assert looked == [0, 1, 0, 2, 3, 4]  # the third is a look at whether the encoder is the same
    dataset = work(teacher, entries, torn)
    assert looked[6:] == [] and snapshot(torn) == whole

    id = late(teacher, entries)[3].id
    dataset.prompt_path(id).unlink()
    work(teacher, entries, torn)
    assert looked[6:] == [0, 3] and snapshot(torn) == whole


def test_more_images_are_added_and_those_before_are_left_alone(
    teacher: Teacher, entries: list[PromptEntry], looked: list[float], tmp_path: Path
) -> None:
    dataset = work(teacher, entries[:3], tmp_path / "clips")
    before, _ = snapshot(dataset.folder), looked.clear()
    work(teacher, entries[::-1], dataset.folder)
    after = snapshot(dataset.folder)
    assert looked == [2, 4, 3] and len(dataset) == 5
    assert all(after[name] == before[name] for name in before if name.endswith(".safetensors"))


def test_another_image_encoder_is_noticed(
    teacher: Teacher, entries: list[PromptEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(teacher, entries[:1], tmp_path / "clips")
    encode = VideoVAE.encode
    monkeypatch.setattr(VideoVAE, "encode", lambda self, frames: encode(self, frames) * 2)
    with pytest.raises(AccVideoError, match="was encoded otherwise"):
        work(teacher, entries, tmp_path / "clips")


def test_images_are_read_before_and_told_of(
    teacher: Teacher, entries: list[PromptEntry], looked: list[float]
) -> None:
    images = _images(entries)
    images[1].write_bytes(b"no image")
    images[2].write_bytes(images[2].read_bytes()[:60])
    images[4].unlink()
    steps: list[Progress] = []
    made = encode_entries(teacher, entries, SIZE, later=True, monitor=steps.append)
    assert len(made.prompts) == 2 and looked == []
    (note,) = made.notes
    assert note.startswith("left out 3 images that cannot be read (") and "1.png" in note
    assert [(each.stage, each.step, each.total) for each in steps] == [
        ("read images", number, 5) for number in range(1, 6)
    ]


def test_an_image_that_changes_while_others_are_recorded_is_refused(
    teacher: Teacher, entries: list[PromptEntry]
) -> None:
    prompts = encoded(late(teacher, entries))
    next(prompts)
    images = _images(entries)
    images[1].write_bytes(images[0].read_bytes())
    with pytest.raises(AccVideoError, match="1.png is not the image that it was .*start again"):
        next(prompts)


def test_what_cannot_be_encoded_is_refused_before_a_folder_is_made(
    teacher: Teacher, entries: list[PromptEntry]
) -> None:
    with pytest.raises(AccVideoError, match="width 50 is not a multiple of 16"):
        encode_entries(teacher, entries, (5, 32, 50), later=True)
    alone = Teacher(teacher.model, Path("nowhere"))
    with pytest.raises(AccVideoError, match="no text encoders"):
        encode_entries(alone, entries, SIZE, later=True)
    with pytest.raises(AccVideoError, match="no text encoders"):
        encode_entries(alone, [PromptEntry("square", None, 0)], later=True)

"""Folders of videos as datasets, on a teacher whose VAE and text encoder are known."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

from accvideo_core.errors import AccVideoError
from accvideo_core.models.loading import Teacher
from accvideo_core.monitor import Cancelled, Progress
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record
from accvideo_core.trajectories.clips import Cutting
from accvideo_core.trajectories.ingest import SKIPPED_FILE, VIDEOS_FILE, ingest
from tests import analytic
from tests.known_teacher import SPEC, footage, snapshot, video, work
from tests.video_files import grey_clip, write_frames, write_h264, write_sound


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def levels(dataset: TrajectoryDataset) -> dict[str, list[list[int]]]:
    """Text -> what its clips' two latent frames were made of, by number of clip."""
    found: dict[str, list] = {}
    for prompt in dataset.prompts():
        id = next(h.id for h in dataset.headers() if h.prompt_id == prompt.id)
        values = dataset.read(id).latents[0, 0, :, 0, 0].float() * 255
        found.setdefault(prompt.text, []).append(values.round().int().tolist())
    return found


def test_clips_and_captions_become_records_of_one_state(tmp_path: Path) -> None:
    video(tmp_path / "in", "one", 11, "first")
    video(tmp_path / "in" / "below", "two", 24, "second")
    done = work(tmp_path / "in", tmp_path / "out")
    dataset = TrajectoryDataset.open(tmp_path / "out")
    assert (len(dataset), done.videos, done.skipped, done.notes) == (6, 2, (), ())
    assert dataset.info.times == (0.0,) and dataset.info.shape == (2, 2, 2, 2)
    assert levels(dataset) == {
        "first": [[0, 4], [5, 9]],
        "second": [[0, 4], [5, 9], [10, 14], [15, 19]],
    }
    found = dataset.read(dataset.ids()[0])
    assert found.latents.shape == (1, 2, 2, 2, 2) and found.latents.dtype == torch.bfloat16
    assert found.rounding is not None and found.rounding < 0.01
    assert dataset.prompt(found.prompt_id).condition.text.max() in (5, 6)
    assert dataset.verify() == []
    told = lines(tmp_path / "out" / VIDEOS_FILE)
    assert {(line["video"], line["clips"]) for line in told} == {
        ("one.mkv", 2),
        ("below/two.mkv", 4),
    }
    assert lines(tmp_path / "out" / SKIPPED_FILE) == []


def test_settings_reach_the_clips(tmp_path: Path) -> None:
    video(tmp_path / "in", "a", 40)
    cutting = Cutting(fps=4, stride=2, spacing=0.5)
    spec = replace(SPEC, cutting=cutting, clips=3, dtype="float32", guidance=4.0)
    done = work(tmp_path / "in", tmp_path / "out", spec)
    assert levels(done.dataset) == {"a clip": [[0, 16], [4, 20], [8, 24]]}
    info = TrajectoryDataset.open(tmp_path / "out").info
    assert (info.cutting, info.dtype, info.guidance) == (cutting, "float32", 4.0)
    assert done.dataset.prompts()[0].guidance == 4.0


def test_image_families_are_given_the_first_frame_of_every_clip(tmp_path: Path) -> None:
    video(tmp_path / "in", "told", 10, "words")
    video(tmp_path / "in", "silent", 12, None)
    done = work(tmp_path / "in", tmp_path / "out", images=True)
    images = {"": [], "words": []}
    for prompt in done.dataset.prompts():
        assert prompt.condition.image is not None
        images[prompt.text].append(round(float(prompt.condition.image[0, 0]) * 255))
    assert images == {"": [0, 5], "words": [0, 5]}
    assert done.notes == ("1 of 2 videos have no caption and get an empty one",)


def test_captions_stand_beside_videos_or_in_lists(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number, name in enumerate(("text", "caption", "both", "listed", "none", "empty")):
        video(folder, name, 5 + number, None)
    (folder / "text.txt").write_text("﻿of a\ntext file \n")
    (folder / "caption.caption").write_text("of a caption file")
    (folder / "both.txt").write_text("its own")
    (folder / "empty.txt").write_text(" \n")
    listed = [("listed", "of the list"), ("both", "of the list too"), ("gone", "of no video")]
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{n}.mkv", "text": t}) + "\n" for n, t in listed)
    )
    done = work(folder, tmp_path / "out")
    texts = sorted(prompt.text for prompt in done.dataset.prompts())
    assert set(texts) == {"of a text file", "of a caption file", "its own", "of the list"}
    assert done.notes == ("left out 1 caption of no video that is there",)
    assert [one.name for one in done.skipped] == ["empty.mkv", "none.mkv"]
    assert all("it has no caption; write it into" in one.reason for one in done.skipped)
    given = work(folder, tmp_path / "more", replace(SPEC, caption="any"))
    assert given.skipped == () and "any" in {p.text for p in given.dataset.prompts()}


def broken(folder: Path) -> dict[str, str]:
    """Files that cannot be used, and the reason of each."""
    folder.mkdir()
    noise = torch.randint(0, 256, (40, 64, 64, 3), dtype=torch.uint8)
    (folder / "a.mp4").write_bytes(np.random.default_rng(0).bytes(3000))
    part = write_h264(folder / "b.mp4", noise, first=True)
    os.truncate(part, part.stat().st_size // 2)
    write_sound(folder / "c.mp4")
    video(folder, "d", 4)
    (folder / "e.mp4").mkdir()
    picture = Image.new("RGB", (32, 32))
    picture.save(folder / "f.png")
    (folder / "f.png").rename(folder / "f.mp4")
    (folder / "g.mp4").write_bytes(b"")
    (folder / "h\nx.mkv").write_bytes(b"junk")
    video(folder, "i", 10).with_suffix(".txt").write_bytes(b"\xff\xfe")
    return {
        "a.mp4": "it is not a video that can be read",
        "b.mp4": "it breaks off after",
        "c.mp4": "it has no video stream",
        "d.mkv": "it lasts 0.50 s, less than the 0.62 s of a clip (5 frames at 8 a second)",
        "f.mp4": "it lasts",
        "g.mp4": "it is not a video that can be read",
        "h\nx.mkv": "it is not a video that can be read",
        "i.mkv": "i.txt line 1 holds the byte 0xFF",
    }


def test_what_is_broken_is_left_out_with_its_reason(tmp_path: Path) -> None:
    reasons = broken(tmp_path / "in")
    Image.new("RGB", (64, 64)).save(tmp_path / "in" / "picture.png")
    video(tmp_path / "in" / ".hidden", "x")
    video(tmp_path / "in", ".x")
    (tmp_path / "in" / "notes.doc").write_text("unrelated")
    video(tmp_path / "in", "good", 10, "good")
    done = work(tmp_path / "in", tmp_path / "out")
    assert [one.name for one in done.skipped] == [*reasons]
    for one in done.skipped:
        assert reasons[one.name] in one.reason
        assert "\n" not in str(one)
    assert levels(done.dataset) == {"good": [[0, 4], [5, 9]]}
    told = lines(tmp_path / "out" / SKIPPED_FILE)
    assert [(line["video"], line["reason"]) for line in told] == [
        (one.name, one.reason) for one in done.skipped
    ]


def test_a_video_damaged_in_the_middle_gives_the_clips_before(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (60, 64, 64, 3), dtype=torch.uint8)
    path = write_frames(tmp_path / "in" / "a.mkv", noise, codec="mjpeg", pix_fmt="yuvj420p")
    data = bytearray(path.read_bytes())
    middle = data.index(b"\xff\xd8", len(data) // 2)  # where one picture begins
    data[middle : middle + 600] = bytes(600)
    path.write_bytes(data)
    spec = replace(SPEC, caption="noise", height=64, width=64)
    done = work(tmp_path / "in", tmp_path / "out", spec)
    (one,) = done.skipped
    assert one.name == "a.mkv" and "it is damaged after" in one.reason
    assert 0 < len(one.clips) < 12 and len(done.dataset) == 12 - len(one.clips)
    assert one.clips == tuple(range(len(done.dataset), 12))
    assert "a.mkv, clips" in str(one) and done.dataset.verify() == []


def test_where_nothing_can_be_used_one_sentence_says_why(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AccVideoError, match="there is no folder .*none; check the path"):
        work(tmp_path / "none", out)
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    with pytest.raises(AccVideoError, match=r"holds no videos \(\.mp4 .*give a folder of videos"):
        work(tmp_path / "in", out)
    (tmp_path / "in" / "a.mp4").write_bytes(b"junk")
    video(tmp_path / "in", "b", 3)
    with pytest.raises(
        AccVideoError, match="none of the 2 videos .* can be used; a.mp4: it is not"
    ):
        work(tmp_path / "in", out)
    assert not out.exists()


def test_a_damaged_list_of_captions_is_named(tmp_path: Path) -> None:
    video(tmp_path / "in", "a")
    (tmp_path / "in" / "captions.jsonl").write_text("{no json\n")
    with pytest.raises(AccVideoError, match="captions.jsonl line 1 is not JSON"):
        work(tmp_path / "in", tmp_path / "out")


def test_other_settings_and_other_datasets_are_left_alone(tmp_path: Path) -> None:
    video(tmp_path / "in", "a")
    out = tmp_path / "out"
    work(tmp_path / "in", out)
    before = snapshot(out)
    for other in (replace(SPEC, width=32), replace(SPEC, cutting=Cutting(fps=4))):
        with pytest.raises(AccVideoError, match=r"cannot be continued with (width|cutting)"):
            work(tmp_path / "in", out, other)
    prompts = analytic.prompts(1)
    with pytest.raises(AccVideoError, match="cannot be continued with time_grid"):
        record(analytic.gaussian_model(), prompts, RecordSpec(5, 16, 16, steps=4, kept=4), out)
    assert snapshot(out) == before
    settings = RecordSpec(5, 16, 16, steps=4, kept=4)
    recorded = record(analytic.gaussian_model(), prompts, settings, tmp_path / "rec").folder
    before = snapshot(recorded)
    with pytest.raises(AccVideoError, match="cannot be continued with time_grid"):
        work(tmp_path / "in", recorded)
    with pytest.raises(AccVideoError, match="is no dataset but holds 'a.mkv'"):
        work(tmp_path / "in", tmp_path / "in")
    assert snapshot(recorded) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 6}, "6 frames do not fit this model"),
        ({"height": 20}, "height 20 is not a multiple of 8"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
    ],
)
def test_impossible_sizes_are_refused_at_once(tmp_path: Path, changes, message: str) -> None:
    video(tmp_path / "in", "a")
    with pytest.raises(AccVideoError, match=message):
        work(tmp_path / "in", tmp_path / "out", replace(SPEC, **changes))
    assert not (tmp_path / "out").exists()
    with pytest.raises(AccVideoError, match="clips is 0; it must be at least 1"):
        replace(SPEC, clips=0)


def test_a_teacher_without_vae_is_refused(tmp_path: Path) -> None:
    video(tmp_path / "in", "a")
    alone = Teacher(analytic.gaussian_model(), tmp_path / "in")
    with pytest.raises(AccVideoError, match="holds the network alone and no VAE"):
        alone.check_vae()
    with pytest.raises(AccVideoError, match="the network alone and no text encoders"):
        ingest(alone, tmp_path / "in", SPEC, tmp_path / "out")


def test_interruption_order_and_workers_change_no_byte(tmp_path: Path) -> None:
    folder = footage(tmp_path / "in")
    whole = snapshot(work(folder, tmp_path / "whole").dataset.folder)
    assert len([name for name in whole if name.startswith("records")]) == 20

    # Cancelled at every step, and gone on with.
    torn, at = tmp_path / "torn", 0
    while True:
        seen = 0

        def stop(_progress: Progress, limit: int = at) -> None:
            nonlocal seen
            seen += 1
            if seen > limit:
                raise Cancelled

        try:
            work(folder, torn, monitor=stop)
            break
        except Cancelled:
            at += 1
            if (torn / "dataset.json").exists():
                assert TrajectoryDataset.open(torn).verify() == []
    assert at > 10 and snapshot(torn) == whole

    # Videos come one after the other, in the other order.
    slow, some = tmp_path / "slow", tmp_path / "some"
    some.mkdir()
    for path in sorted(folder.glob("*.mkv"), reverse=True):
        for file in (path, path.with_suffix(".txt")):
            shutil.copy(file, some / file.name)
        work(some, slow)
    assert snapshot(slow) == whole

    shared = tmp_path / "shared"
    threads = [Thread(target=work, args=(folder, shared)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert snapshot(shared) == whole


def test_more_clips_of_each_add_to_what_is_there(tmp_path: Path) -> None:
    folder, out = footage(tmp_path / "in", 2), tmp_path / "out"
    first = snapshot(work(folder, out, replace(SPEC, clips=1)).dataset.folder)
    more = snapshot(work(folder, out).dataset.folder)
    assert snapshot(work(folder, tmp_path / "at once").dataset.folder) == more
    same = {name for name in first if name.startswith(("records", "prompts/"))}
    assert len(same) == 4 and all(more[name] == first[name] for name in same)


def test_a_renamed_video_is_the_same_and_a_copy_is_left_out(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    path = video(folder, "a")
    ids = work(folder, out).dataset.ids()
    for suffix in (".mkv", ".txt"):
        shutil.copy(path.with_suffix(suffix), folder / f"b{suffix}")
    done = work(folder, out)
    assert done.dataset.ids() == ids
    assert [str(one) for one in done.skipped] == ["b.mkv: it is the same video as a.mkv"]
    (folder / "b.txt").write_text("another caption")
    assert len(work(folder, out).dataset) == 2 * len(ids)


def test_a_video_that_is_changed_meanwhile_is_left_out(tmp_path: Path) -> None:
    folder = footage(tmp_path / "in", 2)

    def change(progress: Progress) -> None:
        if progress.stage == "ingest" and progress.step == 0:
            (folder / "v0.mkv").write_bytes(b"something else")

    done = work(folder, tmp_path / "out", monitor=change)
    (one,) = done.skipped
    assert one.name == "v0.mkv" and "was changed meanwhile" in one.reason


def test_small_and_slow_videos_are_used_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_frames(folder / "a.mkv", grey_clip(10, 8, 10))
    write_frames(folder / "b.mkv", grey_clip(10, 16, 20), fps=2)
    spec = replace(SPEC, caption="a clip", cutting=Cutting(fps=4))
    done = work(folder, tmp_path / "out", spec)
    assert done.notes == (
        "1 video smaller than 16 x 16 will be enlarged (a.mkv)",
        "1 video with fewer frames a second than asked for will have some twice (b.mkv)",
    )


def test_the_monitor_hears_of_videos_clips_and_notes(tmp_path: Path) -> None:
    heard: list[Progress] = []
    write_frames(tmp_path / "in" / "a.mkv", grey_clip(10, 8, 8))
    spec = replace(SPEC, caption="a clip")
    work(tmp_path / "in", tmp_path / "out", spec, heard.append)
    assert [(p.stage, p.step, p.total) for p in heard] == [
        ("scan", 1, 1), ("ingest", 0, 2), ("ingest", 1, 2), ("ingest", 2, 2)
    ]  # fmt: skip
    assert "enlarged" in heard[1].notes[0]
    assert heard[-1].metrics["records_done"] == 2
    assert heard[-1].preview is not None and heard[-1].preview().shape == (1, 2, 2, 2, 2)


def test_a_dataset_inside_the_folder_is_no_footage(tmp_path: Path) -> None:
    video(tmp_path / "in", "a")
    out = tmp_path / "in" / "out"
    video(out / "previews", "b")
    (out / "dataset.json").write_text("{}")
    with pytest.raises(AccVideoError, match="does not describe a trajectory dataset"):
        work(tmp_path / "in", out)
    (out / "dataset.json").unlink()
    shutil.rmtree(out)
    work(tmp_path / "in", out)
    video(out / "previews", "b")
    assert work(tmp_path / "in", out).videos == 1

"""Real networks: what is ingested decodes to the videos, and the terminal's way through it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accvideo_core.cli import main
from accvideo_core.evaluate import world
from accvideo_core.images import fitted
from accvideo_core.latents import key_generator
from accvideo_core.models.loading import Teacher, load_teacher
from accvideo_core.models.tiny import embedded_teacher_path
from accvideo_core.trajectories import TrajectoryDataset
from accvideo_core.trajectories.footage import IngestSpec
from accvideo_core.trajectories.ingest import VIDEOS_FILE, ingest
from tests import tiny_hunyuan_i2v, tiny_wan
from tests.video_files import grey_clip, write_frames

CLIPS = 4


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(embedded_teacher_path())


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Procedural clips as lossless files with their captions, and their frames [N, T, H, W, 3]."""
    folder = tmp_path_factory.mktemp("world")
    specs = world.sample_specs(CLIPS, key_generator("ingest"))
    clips = world.render(specs, key_generator("clips")).permute(0, 2, 3, 4, 1) / 2 + 0.5
    pixels = (clips * 255).round().byte()
    for number, (spec, frames) in enumerate(zip(specs, pixels, strict=True)):
        write_frames(folder / f"{number}.mkv", frames, fps=world.FPS)
        (folder / f"{number}.txt").write_text(world.prompt(spec))
    return folder, pixels.float() / 255


def in_order(dataset: TrajectoryDataset) -> list[str]:
    """Records by their videos' names."""
    lines = (dataset.folder / VIDEOS_FILE).read_text().splitlines()
    prompt_of = {line["video"]: f"{line['id']}-0000" for line in map(json.loads, lines)}
    record_of = {head.prompt_id: head.id for head in dataset.headers()}
    return [record_of[prompt_of[name]] for name in sorted(prompt_of)]


def test_decoded_latents_are_the_videos(
    tmp_path: Path, teacher: Teacher, videos: tuple[Path, Tensor]
) -> None:
    folder, frames = videos
    spec = IngestSpec(frames=17, height=32, width=32, dtype="float32")
    dataset = ingest(teacher, folder, spec, tmp_path / "clips").dataset
    latents = dataset.load_all(in_order(dataset), [0])[:, 0]
    direct = torch.cat([teacher.vae.encode(clip[None]) for clip in frames])
    assert torch.equal(latents, direct)
    error = (teacher.vae.decode(latents) - frames).square().flatten(1).mean(1)
    assert float(-10 * error.log10().mean()) > 26, "28.2 dB over 32 clips"
    texts = {path.read_text() for path in folder.glob("*.txt")}
    encoded = {prompt.text: prompt for prompt in teacher.encode_prompts(sorted(texts))}
    assert {prompt.text for prompt in dataset.prompts()} == texts
    for prompt in dataset.prompts():
        for name, x in encoded[prompt.text].condition.tensors().items():
            assert torch.equal(prompt.condition.tensors()[name], x), name


@pytest.mark.parametrize("name", ["wan_i2v", "wan22_ti2v", tiny_hunyuan_i2v.CONCAT])
def test_image_families_get_frame_and_text_as_their_own_encoders_give_them(
    tmp_path: Path, name: str
) -> None:
    if name in tiny_wan.IMAGE_FAMILIES:
        source = tiny_wan.save_pipeline(name, tmp_path / "teacher")
    else:
        source = tiny_hunyuan_i2v.save_pipeline(tmp_path / "teacher", name)
    teacher = load_teacher(source)
    size = teacher.model.latent_spec.stride_hw * teacher.model.latent_spec.patch * 2
    path = write_frames(tmp_path / "in" / "a.mkv", grey_clip(12, size, size + 6) * 20)
    path.with_suffix(".caption").write_text("a red circle")
    spec = IngestSpec(frames=5, height=size, width=size, dtype="float32")
    dataset = ingest(teacher, tmp_path / "in", spec, tmp_path / "out").dataset
    assert len(dataset) == 2
    for number, prompt in enumerate(dataset.prompts()):
        assert prompt.id.endswith(f"-{number:04d}") and prompt.text == "a red circle"
        pixels = grey_clip(12, size, size + 6)[5 * number : 5 * number + 5] * 20
        clip = torch.stack([fitted(frame.float() / 255, size, size) for frame in pixels])
        expected = teacher.encode_image("a red circle", clip[0], 5).condition
        assert expected.image is not None
        for field, x in expected.tensors().items():
            assert torch.equal(prompt.condition.tensors()[field], x), field
        id = next(head.id for head in dataset.headers() if head.prompt_id == prompt.id)
        assert torch.equal(dataset.read(id).latents, teacher.vae.encode(clip[None]))


def test_the_terminal_ingests_and_every_command_knows_the_dataset(
    tmp_path: Path, videos: tuple[Path, Tensor], capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    folder.mkdir()
    for path in videos[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "bad.mp4").write_bytes(b"junk")

    def run(*words: str | Path) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        told = capsys.readouterr()
        return code, told.out, told.err

    assert run("ingest", folder, "none", "--fps", "0")[0] == 2
    code, out, err = run("ingest", folder, "clips")
    assert code == 0 and f"{CLIPS} clips are in clips, of {CLIPS} videos\n1 was left out" in out
    assert "left out bad.mp4: it is not a video that can be read" in err
    assert run("dataset", "verify", "clips")[1] == f"clips has {CLIPS} records and no fault\n"
    assert "frames at their own rate" in run("inspect", "clips", "--verify")[1]
    code, out, _ = run("dataset", "stats", "clips", "--out", "page")
    assert code == 0 and "frames at their own rate" in out and "bend" not in out
    code, _, err = run("inspect", "clips", "--record", "first", "--out", "look")
    assert code == 2 and "no way from noise to data" in err
    assert run("inspect", "clips", "--features", "--out", "look")[0] == 0
    for tensors in ("npy", "safetensors"):
        assert run("dataset", "export", "clips", tensors, "--tensors", tensors)[0] == 0
    for steps in ("2", "1"):
        code, _, err = run("distill", "clips", "run", "--set", f"student_steps={steps}")
        assert code == 2 and "choose a recipe for videos" in err and len(err.splitlines()) == 1
    assert not Path("run").exists()

    dataset = TrajectoryDataset.open(Path("clips"))
    first = dataset.record_path(dataset.ids()[0])
    whole = first.read_bytes()
    os.truncate(first, 60)
    code, out, _ = run("dataset", "verify", "clips", "--repair")
    assert code == 0 and "ingest the same videos again" in out and not first.exists()
    assert run("ingest", folder, "clips")[0] == 0
    assert first.read_bytes() == whole

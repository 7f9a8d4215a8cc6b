"""Options of speed on the terminal: what they leave as it is, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tiny_wan
import torch

from accvideo_core.cli import main
from accvideo_core.models import loading
from accvideo_core.models.vae import VideoVAE
from accvideo_core.trajectories.store import TrajectoryDataset
from accvideo_core.video import read_video
from tests.tiny_decoders import weights, write

SIZE = ["--frames", "5", "--height", "16", "--width", "16", "--steps", "2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_random_pipeline(tmp_path_factory.mktemp("models") / "teacher")


def sample(out: Path, teacher: Path, *more: str) -> int:
    prompts = ["--prompt", "a red circle", "--prompt", "a blue square moving left"]
    return main(["sample", str(out), "--teacher", str(teacher), *SIZE, *prompts, *more])


def record(out: Path, teacher: Path, *more: str) -> int:
    words = ["record", str(out), "--teacher", str(teacher), *SIZE, "--prompt", "a red circle"]
    return main([*words, "--samples", "2", "--keep", "2", "--store", "float32", *more])


def clips(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: read_video(path)[0] for path in folder.glob("*.mp4")}


def same_video(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they differ by what coding makes of a few numbers that were rounded otherwise."""
    return bool((a - b).abs().mean() < 0.1 / 255 and (a - b).abs().max() < 10 / 255)


def states(folder: Path) -> list[torch.Tensor]:
    dataset = TrajectoryDataset.open(folder)
    return [dataset.read(each).latents for each in dataset.ids()]


def test_exact_speed_gives_the_same_videos(teacher: Path, tmp_path: Path) -> None:
    assert sample(tmp_path / "plain", teacher) == 0
    fast = ["--attention", "math", "--swap-blocks", "2", "--cfg-batch", "in-turn"]
    assert sample(tmp_path / "fast", teacher, *fast) == 0
    plain, found = clips(tmp_path / "plain"), clips(tmp_path / "fast")
    assert len(plain) == 2 and found.keys() == plain.keys()
    assert all(same_video(found[name], x) for name, x in plain.items())


def test_a_faster_vae_shows_the_same_videos(teacher: Path, tmp_path: Path) -> None:
    assert sample(tmp_path / "plain", teacher) == 0
    assert sample(tmp_path / "last", teacher, "--vae-speed", "channels_last") == 0
    plain, found = clips(tmp_path / "plain"), clips(tmp_path / "last")
    assert len(plain) == 2 and found.keys() == plain.keys()
    assert all(same_video(found[name], x) for name, x in plain.items())


def test_a_second_run_reads_its_prompts_from_the_cache(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ["--text-cache", str(tmp_path / "prompts")]
    assert sample(tmp_path / "first", teacher, *cache) == 0

    def never(*_: object) -> None:
        raise AssertionError("text encoders are loaded")

    monkeypatch.setattr(loading, "load_text_pipeline", never)
    assert sample(tmp_path / "second", teacher, *cache) == 0
    first, second = clips(tmp_path / "first"), clips(tmp_path / "second")
    assert len(first) == 2 and first.keys() == second.keys()
    assert all(torch.equal(second[name], x) for name, x in first.items())


def test_a_tiny_decoder_takes_the_place_of_the_vae(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "wan"
    tiny_wan.save_pipeline("wan_t2v", folder)
    file = write(tmp_path / "taew2_1.safetensors", weights(tiny_wan.channels("wan_t2v"), 1))

    def never(*_: object) -> None:
        raise AssertionError("the VAE decodes")

    monkeypatch.setattr(VideoVAE, "_decode", never)
    assert sample(tmp_path / "out", folder, "--tiny-vae", str(file)) == 0
    found = clips(tmp_path / "out")
    assert len(found) == 2 and all(len(video) == 5 for video in found.values())
    assert all(video.std() > 0.01 for video in found.values())


def test_records_are_the_same_bytes_without_speed_and_nearly_with_it(
    teacher: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        assert record(tmp_path / name, teacher) == 0
    files = [
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.safe*")}
        for name in ("one", "two")
    ]
    assert len(files[0]) == 3 and files[0] == files[1]
    assert record(tmp_path / "fast", teacher, "--swap-blocks", "2", "--attention", "math") == 0
    for found, plain in zip(states(tmp_path / "fast"), states(tmp_path / "one"), strict=True):
        assert (found - plain).abs().max() < 1e-5 * plain.abs().max()


def test_a_comparison_is_the_same_with_swapped_blocks(teacher: Path, tmp_path: Path) -> None:
    words = ["--teacher", str(teacher), *SIZE, "--prompt", "a red circle", "--samples", "1"]
    tables = []
    for name, more in (("plain", []), ("fast", ["--swap-blocks", "3", "--attention", "math"])):
        assert main(["compare", str(tmp_path / name), *words, *more]) == 0
        table = (tmp_path / name / "table.txt").read_text()
        tables.append([line.split()[:4] for line in table.splitlines()])
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--attention", "quick"], ("speed.attention is 'quick'", "sdpa", "flex")),
        (["--sparse", "much"], ("speed.sparse is 'much'", "radial")),
        (["--cfg-batch", "both"], ("speed.cfg_batch is 'both'", "in turn")),
        (["--swap-blocks", "9"], ("speed.swap_blocks is 9", "choose at most")),
        (["--steps", "0"], ("steps is 0", "at least 1 step")),
        (["--vae-speed", "quick"], ("VAE speed 'quick'", "channels_last or compiled")),
        (["--tiny-vae", "gone.pth"], ("gone.pth",)),
        (["--cuda-graphs"], ("CUDA graphs need an NVIDIA GPU", "cpu")),
        (["--cuda-graphs", "--swap-blocks", "2"], ("leave one of the two out",)),
        (["--fp8", "--swap-blocks", "2"], ("--weights fp8",)),
        (["--sequence-parallel", "2"], ("does not divide the 1 processes",)),
    ],
)
def test_what_cannot_be_is_one_sentence(
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: tuple[str, ...],
) -> None:
    assert sample(tmp_path / "out", teacher, *more) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("accvideo sample: ") and all(word in last for word in words), last
    assert not (tmp_path / "out").exists()


def test_what_would_change_a_dataset_is_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record(tmp_path / "clips", teacher, "--attention", "sage") == 2
    assert "attention 'sage' changes what the teacher answers" in capsys.readouterr().err
    assert not (tmp_path / "clips").exists()

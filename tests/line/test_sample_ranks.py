"""Sampling in two processes (gloo, CPU) against one: the same videos, each written once."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from accvideo_core import ranks as processes
from accvideo_core.cli import main
from accvideo_core.conditioning import Condition
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.guidance import Cfg, guided
from accvideo_core.models.context_parallel import divided
from accvideo_core.ranks import ALONE, Ranks
from accvideo_core.sampling import sample
from accvideo_core.speed import Speed, sped_up
from accvideo_core.video import read_video
from tests import tiny, tiny_hunyuan_i2v
from tests.divisible import divisible
from tests.processes import Pair

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)

TIMES = (1.0, 0.7, 0.0)
CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
SIZE = ["--frames", "5", "--height", "16", "--width", "16", "--steps", "2"]
PROMPTS = ["--prompt", "a red circle", "--prompt", "a blue square", "--prompt", "a circle"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("pair")) as both:
        yield both


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_random_pipeline(tmp_path_factory.mktemp("models") / "teacher")


# The latents --------------------------------------------------------------------------------------


def latents(ranks: Ranks, name: str, lora: bool, speed: Speed) -> Any:
    """What is sampled in a process: of the teacher under guidance, or of a (random) student."""
    model, x, cond = divisible(name, 2)
    network = model
    if lora:
        info = StudentInfo(name, "", TIMES, None, LoraSpec(rank=2), model.latent_spec, 5, 16, 16)
        student = Student.create(model, info)
        generator = torch.Generator().manual_seed(5)
        for p in student.trainable().values():
            torch.nn.init.normal_(p, std=0.2, generator=generator)
        network = student.model
    network = divided(network, x.shape[1:], ranks)
    negative = tiny_negative(cond)
    with sped_up(network, speed) as fast:
        who = fast if lora else guided(fast, negative, Cfg(3.0))
        return sample(who, cond, x, TIMES).numpy()


def tiny_negative(cond: Condition) -> Any:
    from accvideo_core.conditioning import Prompt

    return Prompt("negative", "", cond.select(0).without_image())


WAYS = [
    ("hunyuan_video", False),
    ("hunyuan_video", True),
    *((name, False) for name in tiny_hunyuan_i2v.KINDS),
    ("wan_t2v", False),
    ("wan_t2v", True),
    ("wan22_i2v", False),
    ("wan22_ti2v", False),
]


@pytest.mark.parametrize(("name", "lora"), WAYS)
def test_processes_that_divide_tokens_sample_what_one_does(
    pair: Pair, name: str, lora: bool
) -> None:
    expected = latents(ALONE, name, lora, Speed())
    for found in pair(latents, name, lora, Speed(), sequence=2):
        assert abs(found - expected).max() < 1e-6 * abs(expected).max()


@pytest.mark.parametrize("name", ["hunyuan_video", "wan_t2v"])
def test_divided_tokens_go_with_swapped_blocks(pair: Pair, name: str) -> None:
    expected = latents(ALONE, name, True, Speed())
    for found in pair(latents, name, True, Speed(swap_blocks=2), sequence=2):
        assert abs(found - expected).max() < 1e-6 * abs(expected).max()


# The command --------------------------------------------------------------------------------------


def command(ranks: Ranks, words: list[str]) -> tuple[int, str]:
    """`accvideo ...` in a process of many, as torchrun would have started it."""

    @contextmanager
    def joined(*_: Any) -> Iterator[Ranks]:
        yield ranks

    told, before = io.StringIO(), processes.joined
    processes.joined = joined  # type: ignore[assignment]
    try:
        with redirect_stderr(told):
            return main(words), told.getvalue()
    finally:
        processes.joined = before


def clips(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: read_video(path)[0] for path in folder.glob("*.mp4")}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Videos of the same names, but for what coding makes of numbers rounded otherwise."""
    if found.keys() != expected.keys():
        return False
    apart = [(found[name] - x).abs() for name, x in expected.items()]
    return all(bool(x.mean() < 0.1 / 255 and x.max() < 10 / 255) for x in apart)


@pytest.fixture(scope="module")
def alone(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The clips of one process: 3 prompts, 2 samples of each."""
    out = tmp_path_factory.mktemp("alone")
    assert main(words_for(out, teacher)) == 0
    found = clips(out)
    assert len(found) == 6
    return found


def words_for(out: Path, teacher: Path) -> list[str]:
    return ["sample", str(out), "--teacher", str(teacher), *SIZE, *PROMPTS, "--samples", "2"]


def test_processes_divide_the_clips_among_them(
    pair: Pair, teacher: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    (code, first), (other_code, second) = pair(command, words_for(tmp_path, teacher))
    assert code == other_code == 0
    assert same(clips(tmp_path), alone)
    assert first.count(".mp4") == second.count(".mp4") == 3
    assert "sample  [" in first and "sample  [" not in second  # one progress line for all


def test_processes_divide_a_clip_and_write_it_once(
    pair: Pair, teacher: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    words = [*words_for(tmp_path, teacher), "--sequence-parallel", "2"]
    (code, first), (other_code, second) = pair(command, words, sequence=2)
    assert code == other_code == 0
    assert same(clips(tmp_path), alone)
    assert first.count(".mp4") + second.count(".mp4") == 6


# What goes wrong ----------------------------------------------------------------------------------


def test_a_failure_of_one_process_ends_all_with_one_sentence(
    teacher: Path, alone: dict[str, torch.Tensor], tmp_path: Path, root: Path
) -> None:
    taken = tmp_path / min(name for name in alone if name.startswith("a_red_circle"))
    taken.mkdir()
    # The first process cannot write this clip, while the other one waits for it at the next.
    words = [*words_for(tmp_path, teacher), "--sequence-parallel", "2", "--batch", "1"]
    done = torchrun(root, *words)
    assert done.returncode != 0
    assert done.stderr.count("accvideo sample:") == 1
    assert taken.name in next(x for x in done.stderr.splitlines() if "accvideo sample:" in x)
    assert [path.name for path in tmp_path.iterdir()] == [taken.name]


def torchrun(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *two, "-m", "accvideo_core.cli", *words],
        cwd=root, capture_output=True, text=True, timeout=240, env=os.environ | CPU,
    )  # fmt: skip

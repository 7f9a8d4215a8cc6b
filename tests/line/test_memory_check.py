"""Runs that do not fit are refused with a remedy; the plan is told before anything happens."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import analytic
import pytest
import torch
from memory_cases import SHORT, recorded, small
from torch import Tensor

from accvideo_core.cli import main
from accvideo_core.conditioning import Condition
from accvideo_core.distill.trainer import distill, memory_plan
from accvideo_core.errors import AccVideoError
from accvideo_core.models import VideoModel, loading
from accvideo_core.models.footprint import free_memory, tensor_bytes
from accvideo_core.trajectories.record import RecordSpec, record
from accvideo_core.trajectories.store import TrajectoryDataset


@pytest.fixture(scope="module")
def teacher() -> VideoModel:
    return small()


@pytest.fixture(scope="module")
def dataset(teacher: VideoModel, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryDataset:
    return recorded(teacher, tmp_path_factory.mktemp("data") / "clips", 5, 64)


def test_too_little_memory_is_refused_and_the_remedy_fits(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    frugal = replace(SHORT, accumulate=2, gradient_checkpointing=True)
    enough = memory_plan(teacher, dataset, frugal).peak
    own = tensor_bytes(teacher.module.parameters())
    with pytest.raises(AccVideoError) as refused:
        distill(teacher, dataset, SHORT, tmp_path / "run", free_memory=enough - own)
    needed = memory_plan(teacher, dataset, SHORT).peak
    assert str(refused.value) == (
        f"by its memory plan this run needs {needed / 1e6:.1f} MB, and cpu has "
        f"{enough / 1e6:.1f} MB for it; set accumulate to 2 and gradient_checkpointing to True"
    )
    assert not (tmp_path / "run").exists()
    result = distill(teacher, dataset, frugal, tmp_path / "run", free_memory=enough - own)
    assert len(result.losses) == 2


def test_a_full_student_that_cannot_fit_is_told_to_use_adapters_and_smaller_videos(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    recipe = replace(SHORT, lora=None)
    with pytest.raises(AccVideoError, match=r"lora to rank 32.*, and choose smaller or shorter"):
        distill(teacher, dataset, recipe, tmp_path / "run", free_memory=0)
    assert not (tmp_path / "run").exists()


def test_the_plan_is_logged_where_nobody_asks_for_it(
    teacher: VideoModel,
    dataset: TrajectoryDataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        distill(teacher, dataset, replace(SHORT, train_steps=1), tmp_path / "run")
    assert memory_plan(teacher, dataset, SHORT).table() in caplog.text


class Picky(analytic.GaussianFlow):
    """Looks at values in a way that no shape tells."""

    def flow(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return super().flow(x, t, cond) + 0 * x[x > 0].sum()


def test_a_network_that_cannot_be_planned_is_trained_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = analytic.analytic_model(Picky(0.5, 0.25))
    spec = RecordSpec(5, 16, 16, steps=2, kept=2, dtype="float32")
    dataset = record(teacher, analytic.prompts(2), spec, tmp_path / "data")
    recipe = replace(SHORT, lora=None)
    assert len(distill(teacher, dataset, recipe, tmp_path / "run").losses) == 2
    assert "the memory of this run cannot be planned" in caplog.text


def test_main_memory_tells_what_is_free() -> None:
    if not Path("/proc/meminfo").is_file():
        pytest.skip("this system has no /proc/meminfo")
    free = free_memory(torch.device("cpu"))
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert free is not None and 0 < free < total
    assert free_memory(torch.device("meta")) is None


# The terminal ---------------------------------------------------------------------------------


@pytest.fixture
def terminal(
    teacher: VideoModel,
    dataset: TrajectoryDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    loaded = loading.Teacher(teacher, tmp_path)
    monkeypatch.setattr(loading, "load_teacher", lambda *_a, **_o: loaded)
    changes = ["student_steps=2", "train_steps=1", "batch_size=2", "lora.rank=4", "ema=null"]
    sets = [word for change in changes for word in ("--set", change)]
    return ["distill", str(dataset.folder), str(tmp_path / "run"), *sets]


def test_plan_is_printed_on_request_and_nothing_is_trained(
    terminal: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*terminal, "--plan"]) == 0
    here = capsys.readouterr().out
    assert main([*terminal, "--plan", "cuda"]) == 0
    there = capsys.readouterr().out
    assert here.startswith("memory plan (cpu)\n") and there.startswith("memory plan (cuda)\n")
    assert "  peak " in here and "blocks" in here
    assert not (tmp_path / "run").exists()


def test_plan_is_printed_before_training(
    terminal: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(terminal) == 0
    said = capsys.readouterr()
    assert said.err.startswith("memory plan (cpu)\n") and "distill" in said.err
    assert "student after 1 updates" in said.out


def test_plan_of_settings_that_no_run_could_have_is_refused(
    terminal: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    swapping = ["--set", "swap_blocks=3", "--set", "gradient_checkpointing=true"]
    assert main([*terminal, *swapping, "--plan", "cuda"]) == 2
    assert "swap_blocks is 3, but the network has 2 blocks" in capsys.readouterr().err


def test_plan_of_no_device_is_refused(
    terminal: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*terminal, "--plan", "gpu"]) == 2
    assert "--plan gpu is no device; write cuda, mps or cpu" in capsys.readouterr().err

"""The training loop under the options that save memory: the same run, resumed with others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from updates import ALL, CHECKPOINTING

from accvideo_core.conditioning import Prompt
from accvideo_core.distill import memory
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.student import LoraSpec
from accvideo_core.distill.trainer import TrainResult, distill
from accvideo_core.errors import AccVideoError
from accvideo_core.models import VideoModel
from accvideo_core.models.packing import pack_weights
from accvideo_core.monitor import Cancelled, Progress
from accvideo_core.trajectories.record import RecordSpec, record
from accvideo_core.trajectories.store import TrajectoryDataset

RECIPE = Recipe(
    student_steps=2,
    adversarial=True,
    lora=LoraSpec(rank=2),
    train_steps=4,
    batch_size=2,
    lr=1e-2,
    head_width=16,
    **CHECKPOINTING,
)


@pytest.fixture(autouse=True)
def offload_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "OFFLOADED_BYTES", 0)


@pytest.fixture(scope="module")
def teacher() -> VideoModel:
    return tiny.video_model()


@pytest.fixture(scope="module")
def dataset(teacher: VideoModel, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryDataset:
    prompts = [Prompt.of(f"clip {i}", tiny.condition(1, seed=10 + i)) for i in range(2)]
    spec = RecordSpec(5, 16, 16, samples_per_prompt=2, steps=4, kept=4, dtype="float32")
    return record(teacher, prompts, spec, tmp_path_factory.mktemp("data") / "clips")


Run = Callable[..., TrainResult]


@pytest.fixture
def run(teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path) -> Run:
    def go(name: str, recipe: Recipe, teacher: VideoModel = teacher, **more: Any) -> TrainResult:
        return distill(teacher, dataset, recipe, tmp_path / name, **more)

    return go


def assert_same(a: TrainResult, b: TrainResult) -> None:
    """The same losses and weights, bit for bit."""
    assert a.losses == b.losses
    other = b.student.state_dict()
    assert all(torch.equal(x, other[name]) for name, x in a.student.state_dict().items())


def cancel_at(step: int) -> Callable[[Progress], None]:
    def monitor(progress: Progress) -> None:
        assert progress.preview is not None and progress.preview().isfinite().all()
        if progress.step == step:
            raise Cancelled

    return monitor


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_a_run_goes_on_with_more_memory_saved_and_the_same_bits(run: Run, optimizer: str) -> None:
    """As one does that has run out of memory."""
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="8-bit AdamW needs bitsandbytes")
    recipe = replace(RECIPE, optimizer=optimizer)
    whole = run("whole", recipe)
    with pytest.raises(Cancelled):
        run("parts", replace(recipe, **ALL), monitor=cancel_at(2))
    assert_same(run("parts", recipe), whole)
    assert len(set(whole.losses)) == 4


def test_the_callers_teacher_is_as_before(run: Run, teacher: VideoModel) -> None:
    values = {name: p.clone() for name, p in teacher.module.named_parameters()}
    parameters = [id(p) for p in teacher.module.parameters()]
    with pytest.raises(Cancelled):
        run("run", replace(RECIPE, **ALL), monitor=cancel_at(1))
    assert [id(p) for p in teacher.module.parameters()] == parameters
    assert all(torch.equal(p, values[name]) for name, p in teacher.module.named_parameters())
    for module in teacher.module.modules():
        assert not module._forward_pre_hooks and "forward" not in vars(module)
        assert not getattr(module, "gradient_checkpointing", False)


@pytest.mark.parametrize("how", ["fp8", "nf4"])
def test_a_packed_teacher_serves_a_dataset_of_the_unpacked_one(run: Run, how: str) -> None:
    if how == "nf4":
        pytest.importorskip("bitsandbytes", reason="NF4 weights need bitsandbytes")
    packed = pack_weights(tiny.video_model(), how)
    result = run("lora", replace(RECIPE, **ALL), packed)
    plain = run("plain", RECIPE)
    assert result.losses == pytest.approx(plain.losses, rel=0.5) and result.losses != plain.losses
    assert result.student.info.base == plain.student.info.base
    full = replace(RECIPE, lora=None)
    with pytest.raises(AccVideoError, match="which cannot be trained in full; train a LoRA"):
        run("full", full, packed)


def test_full_fine_tuning_saves_activations(run: Run) -> None:
    recipe = replace(RECIPE, lora=None, lr=1e-3, gradient_checkpointing=False)
    options = {**CHECKPOINTING, "offload_activations": True}
    plain, saving = run("plain", recipe), run("saving", replace(recipe, **options))
    assert saving.losses == pytest.approx(plain.losses, rel=1e-5)

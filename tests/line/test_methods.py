"""Every method of the table through the one training loop: resume, looks, files, and learning."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny
import torch
from torch import Tensor

from accvideo_core.arguments import sampling_of
from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.distill.checkpoint import load_checkpoint
from accvideo_core.distill.memory_plan import MemoryPlan
from accvideo_core.distill.metrics import read_metrics
from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.specs import ConsistencySpec, LaddSpec, SfvSpec, UfogenSpec
from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.distill.trainer import TrainResult, distill
from accvideo_core.errors import AccVideoError
from accvideo_core.evaluate import world
from accvideo_core.export import load_student, save_student
from accvideo_core.latents import key_generator
from accvideo_core.models import VideoModel
from accvideo_core.models.footprint import tensor_bytes
from accvideo_core.models.loading import load_teacher
from accvideo_core.models.tiny import embedded_teacher_path
from accvideo_core.monitor import Cancelled, Progress
from accvideo_core.sampling import SamplePlan, sample
from accvideo_core.trajectories.record import RecordSpec, record
from accvideo_core.trajectories.store import TrajectoryDataset

_BASE = Recipe(
    student_steps=2,
    lora=LoraSpec(rank=4),
    train_steps=3,
    batch_size=2,
    accumulate=2,
    lr=1e-2,
    head_lr=1e-2,
    ema=0.5,
    gan_loss="hinge",
    head_kind="spatial_temporal",
    head_conditioning=True,
    head_width=16,
    r1="features",
    r1_weight=0.1,
)
RECIPES = {
    "sf_v": replace(_BASE, sf_v=SfvSpec(), student_steps=1),
    "ladd": replace(_BASE, ladd=LaddSpec()),
    "ufogen": replace(_BASE, ufogen=UfogenSpec()),
    "consistency": replace(_BASE, consistency=ConsistencySpec(steps=10, skip=2)),
}


@pytest.fixture(scope="module")
def teacher() -> VideoModel:
    return tiny.video_model()


@pytest.fixture(scope="module")
def dataset(teacher: VideoModel, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryDataset:
    """Six clips of two prompts, of which only noise and result are stored."""
    prompts = [
        Prompt.of(f"clip {i}", tiny.condition(1, length=3 + i, seed=10 + i)) for i in range(2)
    ]
    spec = RecordSpec(
        5, 16, 16, samples_per_prompt=3, steps=4, kept=1, batch_size=6, dtype="float32"
    )
    return record(teacher, prompts, spec, tmp_path_factory.mktemp("methods") / "clips")


def weights(result: TrainResult) -> dict[str, Tensor]:
    return result.student.state_dict()


def asking(steps: int) -> Namespace:
    """The options of a command that samples a student in so many steps."""
    return Namespace(steps=steps, preset=None, shift=None)


def cancel_at(step: int) -> Any:
    def monitor(progress: Progress) -> None:
        if progress.step == step:
            raise Cancelled

    return monitor


@pytest.mark.parametrize("name", ["sf_v", "consistency"])
def test_cancelled_and_resumed_equals_uninterrupted(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path, name: str
) -> None:
    recipe = RECIPES[name]
    whole = distill(teacher, dataset, recipe, tmp_path / "whole")
    with pytest.raises(Cancelled):
        distill(teacher, dataset, recipe, tmp_path / "parts", monitor=cancel_at(1))
    parts = distill(teacher, dataset, recipe, tmp_path / "parts")
    assert parts.losses == whole.losses and len(set(whole.losses)) == 3
    assert all(torch.equal(x, weights(parts)[key]) for key, x in weights(whole).items())


@pytest.mark.parametrize("name", RECIPES)
def test_the_student_its_heads_and_their_memory_are_as_told(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path, name: str
) -> None:
    recipe, plans = replace(RECIPES[name], train_steps=1), list[MemoryPlan]()
    result = distill(teacher, dataset, recipe, tmp_path / "run", on_plan=plans.append)
    student, trained = result.student, weights(result)
    untrained = Student.create(teacher, student.info, recipe.seed).state_dict()
    assert any(not torch.equal(x, untrained[key]) for key, x in trained.items())

    found = load_checkpoint(tmp_path / "run")
    assert found is not None and ("heads" in found[1]) == recipe.has_heads
    heads = [x for n, x in found[1].get("heads", {}).items() if n.startswith("value:")]
    assert plans[0].heads == tensor_bytes(heads) and plans[0].activations > 0

    grid = teacher.family.time_grid
    assert student.key_times == grid(recipe.student_steps) and student.info.solver == "renoise"
    save_student(student, tmp_path / "student.safetensors")
    again = load_student(tmp_path / "student.safetensors", teacher)
    assert (again.info.solver, again.key_times) == ("renoise", student.key_times)
    cond, noise = tiny.condition(2).with_guidance(6.0), tiny.latents(2)
    known = cast(Any, SimpleNamespace(model=teacher))
    for steps in (1, 2, 4, 8):
        how = sampling_of(asking(steps), known, again, SamplePlan(5, 16, 16))
        assert how.times == grid(steps)
        x = sample(again, cond, noise, how.times, solver=how.solver)
        assert torch.isfinite(x).all() and x.shape == noise.shape


@pytest.mark.parametrize("name", ["sf_v", "consistency"])
def test_parts_of_a_batch_change_only_the_last_bits(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path, name: str
) -> None:
    recipe = replace(RECIPES[name], train_steps=1, clip=None)
    rows = []
    for parts in (1, 2):
        result = distill(teacher, dataset, replace(recipe, accumulate=parts), tmp_path / str(parts))
        rows += read_metrics(result.metrics_file)
    assert rows[0].keys() == rows[1].keys()
    for figure, value in rows[0].items():
        if figure not in ("seconds", "reconstruction"):  # a root of a mean is not one's mean
            assert rows[1][figure] == pytest.approx(value, rel=2e-3, abs=1e-5), figure


def test_students_saved_before_there_were_samplers_take_euler() -> None:
    info = StudentInfo("hunyuan_video", "f", (1.0, 0.0), 6.0, None, tiny.SPEC, 5, 16, 16)
    metadata = info.as_metadata()
    assert json.loads(metadata.pop("accvideo.solver")) == "euler"
    assert StudentInfo.from_metadata(metadata) == info


def test_a_run_begun_before_there_were_methods_goes_on(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    recipe = replace(_BASE, student_steps=1, train_steps=2)
    distill(teacher, dataset, recipe, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    for name in RECIPES:
        assert config["recipe"].pop(name) is None
    del config["student"]["solver"]
    path.write_text(json.dumps(config))
    more = distill(teacher, dataset, replace(recipe, train_steps=3), tmp_path / "run")
    assert len(more.losses) == 3
    with pytest.raises(AccVideoError, match="was started with recipe.lr 0.01 and cannot go on"):
        distill(teacher, dataset, replace(recipe, lr=1e-3), tmp_path / "run")


def test_looks_and_previews_begin_with_recorded_noise(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    previews: list[Tensor] = []

    def monitor(progress: Progress) -> None:
        if progress.preview is not None:
            previews.append(progress.preview())

    recipe = replace(RECIPES["sf_v"], train_steps=2, validate_every=1)
    distill(teacher, dataset, recipe, tmp_path / "run", monitor=monitor)
    rows = [json.loads(x) for x in (tmp_path / "run/validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["latent_mse"] > 0 and row["motion"] > 0 for row in rows)
    assert "real_accuracy_k0" in rows[-1]
    assert len(previews) == 2 and previews[0].shape == (2, *dataset.info.shape)


def test_a_students_times_must_reach_the_data(
    teacher: VideoModel, dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    recipe = replace(RECIPES["sf_v"], key_times=(1.0, 0.5))
    with pytest.raises(AccVideoError, match="key_times end at 0.5, but SF-V trains students that"):
        distill(teacher, dataset, recipe, tmp_path / "run")


def test_one_step_of_sf_v_comes_nearer_to_the_data(tmp_path: Path) -> None:
    """The embedded teacher, four clips: one step from fresh noise, before and after training."""
    teacher = load_teacher(embedded_teacher_path())
    texts = world.sample_prompts(4, key_generator("methods"))
    spec = RecordSpec(
        *(world.FRAMES, world.SIZE, world.SIZE), samples_per_prompt=1, steps=5, kept=1,
        batch_size=4, dtype="float32",
    )  # fmt: skip
    dataset = record(teacher.model, teacher.encode_prompts(texts), spec, tmp_path / "clips")
    recipe = replace(
        RECIPES["sf_v"], sf_v=SfvSpec(recon_weight=1.0), train_steps=16, batch_size=4,
        accumulate=1, lr=3e-3, head_lr=1e-3, ema=None, lora=LoraSpec(rank=16),
        head_kind="spatial", feature_blocks=(1,),
    )  # fmt: skip
    result = distill(teacher.model, dataset, recipe, tmp_path / "run")
    records = [dataset.read(id) for id in dataset.ids()]
    data = torch.stack([one.latents[-1].float() for one in records])
    conds = [dataset.prompt(one.prompt_id).condition for one in records]
    cond = Condition.cat(conds).with_guidance(dataset.info.guidance)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    before, after = (
        (sample(model, cond, noise, (1.0, 0.0)) - data).square().mean().item()
        for model in (teacher.model, result.student)
    )
    assert after < 0.95 * before

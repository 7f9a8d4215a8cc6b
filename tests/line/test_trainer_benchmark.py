"""The benchmark of training compares like with like."""

from __future__ import annotations

from pathlib import Path

import pytest

from accvideo_core.distill.batch import KeyStates
from accvideo_core.distill.metrics import read_metrics
from accvideo_core.distill.trainer import distill
from benchmarks.fastgen_trainer import STEPS, FastGenTraining
from benchmarks.plain_trainer import PlainAdversarial
from benchmarks.training_cases import CASES, Samples, make_dataset, make_model, make_recipe

TINY = CASES["tiny"]


def test_the_plain_loop_computes_what_distill_computes(tmp_path: Path) -> None:
    """The same batches give the same losses, update by update, over more than a sweep."""
    model = make_model(TINY)
    dataset = make_dataset(TINY, model, tmp_path / "data")
    recipe = make_recipe(TINY, train_steps=7)
    rows = read_metrics(distill(model, dataset, recipe, tmp_path / "run").metrics_file)
    states = KeyStates(dataset, recipe.times(dataset.info.time_grid))
    loop = PlainAdversarial(model, dataset, recipe)
    loop.build_heads(states.batch(8, recipe.seed, "calibration", model.device))
    for step, row in enumerate(rows):
        losses = loop.update(states.batch(TINY.batch, recipe.seed, step, model.device))
        assert losses == pytest.approx({name: row[name] for name in losses}, rel=1e-4)
    assert len({row["k"] for row in rows}) == recipe.student_steps


def test_copies_are_copies(tmp_path: Path) -> None:
    model = make_model(TINY)
    dataset = make_dataset(TINY, model, tmp_path / "data")
    loop = PlainAdversarial(model, dataset, make_recipe(TINY), copies=3)
    networks = [loop.backbone, loop.student, *loop.held]
    places = [
        {p.data_ptr() for name, p in one.module.named_parameters() if "lora" not in name}
        for one in networks
    ]
    assert len(networks) == 3 and len(set.union(*places)) == sum(map(len, places))


def test_a_folder_without_fastgen_is_named(tmp_path: Path) -> None:
    model = make_model(TINY)
    samples = Samples(make_dataset(TINY, model, tmp_path / "data"), STEPS, model.device)
    with pytest.raises(SystemExit, match="elsewhere is no checkout of FastGen"):
        FastGenTraining("kd", tmp_path / "elsewhere", model, samples, 2, tmp_path)

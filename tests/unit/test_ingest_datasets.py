"""Ingested videos as datasets: mended, merged, cut and split."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accvideo_core.errors import AccVideoError
from accvideo_core.trajectories import RecordSpec, record
from accvideo_core.trajectories.clips import Cutting
from accvideo_core.trajectories.tools import Choice, merge, split, subset
from tests import analytic
from tests.known_teacher import SPEC, footage, snapshot, video, work


def test_damage_is_found_and_made_again(tmp_path: Path) -> None:
    folder = footage(tmp_path / "in", 3)
    dataset = work(folder, tmp_path / "out").dataset
    whole = snapshot(dataset.folder)
    ids, prompts = dataset.ids(), list(dataset.prompts())
    os.truncate(dataset.record_path(ids[0]), 60)
    os.truncate(dataset.prompt_path(prompts[1].id), 60)
    (dataset.folder / "prompts.jsonl").write_bytes(b"")
    faults = dataset.verify()
    assert {fault.kind for fault in faults} == {"record", "prompt", "line"}
    dataset.repair(faults)
    work(folder, dataset.folder)
    assert snapshot(dataset.folder) == whole and dataset.verify() == []


def test_datasets_of_videos_are_merged_cut_and_split(tmp_path: Path) -> None:
    one = work(footage(tmp_path / "a", 4), tmp_path / "one").dataset
    video(tmp_path / "b", "other", 17, "other")
    two = work(tmp_path / "b", tmp_path / "two").dataset
    both = merge([one, two], tmp_path / "both")
    assert both.ids() == sorted({*one.ids(), *two.ids()}) and both.verify() == []
    work(tmp_path / "b", both.folder)
    assert len(both) == len(one) + len(two), "nothing of it is new"
    few = subset(both, tmp_path / "few", Choice(match="other"))
    assert few.ids() == two.ids()
    sides = split(both, tmp_path / "train", tmp_path / "val", 0.5, seed=1)
    texts = [{prompt.text for prompt in side.prompts()} for side in sides]
    assert not texts[0] & texts[1], "clips of one video are on both sides"
    other = work(tmp_path / "b", tmp_path / "x", replace(SPEC, cutting=Cutting(4))).dataset
    with pytest.raises(AccVideoError, match="cannot be merged: the second has cutting"):
        merge([one, other], tmp_path / "y")


def test_the_last_states_of_trajectories_are_such_a_dataset_too(tmp_path: Path) -> None:
    spec = RecordSpec(5, 16, 16, steps=4, kept=4)
    recorded = record(analytic.gaussian_model(), analytic.prompts(3), spec, tmp_path / "rec")
    clean = subset(recorded, tmp_path / "clean", Choice(kept=(4,)))
    assert clean.info.times == (0.0,) and clean.verify() == []
    for id in clean.ids():
        assert torch.equal(clean.read(id).latents[0], recorded.read(id).latents[-1])

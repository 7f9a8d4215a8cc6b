"""Looks at fixed clips: which clips they are, exact figures, pictures, and memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from watched import RECIPE, Watched, decode, info_of, recorded, still

from accvideo_core.distill.optimiser import Average, Role
from accvideo_core.distill.recipes import PRESETS
from accvideo_core.distill.watch import LOOKS_FILE, Watch
from accvideo_core.distill.watch_clips import SHOWN, fixed_clips, pairs_of, relative, see
from accvideo_core.distill.watch_pictures import write_look
from accvideo_core.errors import AccVideoError
from accvideo_core.trajectories.store import TrajectoryDataset
from accvideo_core.video import read_video


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryDataset:
    return recorded(tmp_path_factory.mktemp("data") / "clips", samples=2)


@pytest.fixture
def watched(dataset: TrajectoryDataset, tmp_path: Path) -> Watched:
    return Watched(dataset, tmp_path / "run")


def test_clips_are_pairs_of_one_prompt_and_the_first_by_id(
    dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    clips = fixed_clips(dataset, 5, info_of(dataset))
    assert pairs_of(clips) == [(0, 1), (2, 3)]
    assert len({clip.prompt_id for clip in clips}) == 3 and len({clip.id for clip in clips}) == 5
    again = fixed_clips(TrajectoryDataset.open(dataset.folder), 5, info_of(dataset))
    assert [clip.id for clip in again] == [clip.id for clip in clips]
    first = clips[0]
    states = dataset.read(first.id).latents
    assert torch.equal(first.noise[0], states[0]) and torch.equal(first.result[0], states[-1])
    assert first.text == dataset.prompt(first.prompt_id).text

    single = recorded(tmp_path / "single", samples=1)
    clips = fixed_clips(single, 4, info_of(single))
    assert [clip.id for clip in clips] == single.ids() and not pairs_of(clips)
    assert pairs_of(fixed_clips(dataset, 1, info_of(dataset))) == []


def test_a_student_like_the_teacher_has_figures_of_one(watched: Watched) -> None:
    assert watched.look(0) == ""
    row = watched.row
    assert row["step"] == 0 and row["latent_mse"] == pytest.approx(0, abs=1e-12)
    for name in ("motion", "saturation", "contrast", "diversity"):
        assert row[name] == pytest.approx(1, abs=1e-4)
    assert watched.look(100) == ""


def test_pairs_that_look_alike_lower_diversity(watched: Watched) -> None:
    one = watched.watch.clips[0].result
    watched.look(100, lambda result: one)
    assert watched.row["diversity"] == 0


def test_without_a_decoder_figures_are_of_latents(
    dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    watched = Watched(dataset, tmp_path / "run", decode=None)
    watched.look(0)
    assert "saturation" not in watched.row and "contrast" not in watched.row
    assert watched.row["motion"] == pytest.approx(1, abs=1e-4)
    watched.look(100, lambda x: x.mean(dim=2, keepdim=True) + (x - x.mean(dim=2, keepdim=True)) / 2)
    assert watched.row["motion"] == pytest.approx(0.5, abs=1e-4)
    assert watched.row["diversity"] < 1 and watched.watch.picture is None


def test_pictures_stand_beside_one_another(watched: Watched) -> None:
    assert watched.watch.picture is None
    watched.look(0)
    watched.look(100, still)
    folder = watched.watch.folder / "samples"
    assert watched.watch.picture == watched.seen[-1].picture == folder / "00000100.png"
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000000.mp4", "00000000.png", "00000100.mp4", "00000100.png"
    ]  # fmt: skip
    frames, fps = read_video(folder / "00000100.mp4")
    assert fps == 8 and frames.shape == (2, 2 * (128 + 20) + 4, 4 * 128 + 2 * 4 + 16, 3)
    first, second = frames[:, 20:148]
    teacher, student = slice(0, 128), slice(132, 260)
    assert (first[:, student] - second[:, student]).abs().max() < 0.05
    assert (first[:, teacher] - second[:, teacher]).abs().max() > 0.2
    assert (first[:, teacher] - first[:, student]).abs().mean() < 0.02


def test_large_clips_are_averaged_down_and_play_in_their_time(tmp_path: Path) -> None:
    video = torch.zeros(1, 50, 30, 2 * SHOWN + 1, 3)
    video[..., 1::2, :] = 1.0
    spec = tiny.SPEC
    picture = see(torch.zeros(1, 4, 13, 4, 4), 49, spec, lambda _x: video).picture
    assert picture.shape == (50, 10, 171, 3) and picture.dtype == torch.uint8
    assert 80 < picture.float().mean() < 175
    write_look(tmp_path, 7, [picture], [picture], ["a prompt"])
    frames, fps = read_video(tmp_path / "00000007.mp4")
    assert (len(frames), fps) == (50, 10.0)


def test_a_clip_without_colour_has_no_saturation_to_compare() -> None:
    shades = torch.linspace(0.2, 0.8, 4).reshape(1, 4, 1, 1, 1).expand(1, 4, 8, 8, 3)
    seen = see(torch.zeros(1, 4, 1, 4, 4), 1, tiny.SPEC, lambda _x: shades)
    assert relative([seen], [seen], []) == {"motion": 1.0}


def role_of_three() -> Role:
    return Role({"p": nn.Parameter(torch.zeros(3))}, 0.1, (0.9, 0.999), RECIPE)


def test_a_look_that_runs_out_of_memory_makes_room(
    dataset: TrajectoryDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away: list[str] = []
    role = role_of_three()

    class Aside:
        def __enter__(self) -> None:
            away.append("out")

        def __exit__(self, *_: object) -> None:
            away.append("in")

    monkeypatch.setattr(role, "aside", Aside)

    def tight(x: Tensor) -> Tensor:
        if away[-1:] != ["out"]:
            raise torch.cuda.OutOfMemoryError("planted")
        return decode(x)

    watched = Watched(dataset, tmp_path / "run", decode=tight)
    assert watched.look(0, roles=[role]) == "" and away == ["out", "in"]
    assert watched.row["motion"] == pytest.approx(1, abs=1e-4)
    watched.look(100, roles=[role])
    assert away == ["out", "in"] * 2


def test_a_look_that_finds_no_room_at_all_is_left_out(
    dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    def impossible(x: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("planted")

    watched = Watched(dataset, tmp_path / "run", decode=impossible)
    assert "the look at update 0 ran out of memory" in watched.look(0, roles=[role_of_three()])
    assert watched.look(100) == "" and not (tmp_path / "run" / LOOKS_FILE).exists()


class Elsewhere(Tensor):
    """A tensor that says it lies on a GPU, until it is moved."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def to(self, device: Any) -> Tensor:  # type: ignore[override]
        assert torch.device(device).type == "cpu"
        return self.as_subclass(Returning)


class Returning(Tensor):
    """The same tensor in main memory, which can be moved back."""

    def to(self, device: Any) -> Tensor:  # type: ignore[override]
        assert device == torch.device("cuda", 0)
        return self.as_subclass(Elsewhere)


def test_optimiser_state_comes_back_to_its_device() -> None:
    role = role_of_three()
    role.backward((role.parameters["p"] - 1).square().sum())
    role.step(1.0)
    state = role.optimizer.state[role.parameters["p"]]
    moments = {name: x for name, x in state.items() if name.startswith("exp_avg")}
    before = {name: x.clone() for name, x in moments.items()}
    for name, x in moments.items():
        state[name] = x.as_subclass(Elsewhere)
    with pytest.raises(KeyError), role.aside():
        assert all(state[name].device.type == "cpu" for name in moments)
        raise KeyError
    assert all(state[name].device.type == "cuda" for name in moments)
    for name, x in before.items():
        assert torch.equal(state[name].as_subclass(Tensor), x)


def test_averaged_values_are_in_place_for_the_block_alone() -> None:
    role = role_of_three()
    average = Average(role, 0.9)
    average.values["p"].fill_(1 / 3)
    with pytest.raises(KeyError), average.in_place():
        assert role.parameters["p"].tolist() == pytest.approx([1 / 3] * 3)
        assert average.values["p"].tolist() == [0, 0, 0]
        raise KeyError
    assert role.parameters["p"].tolist() == [0, 0, 0]
    assert torch.equal(average.values["p"], torch.full((3,), 1 / 3))


def test_what_cannot_be_looked_at_is_refused(dataset: TrajectoryDataset, tmp_path: Path) -> None:
    def watch(of: TrajectoryDataset = dataset, info: Any = None, by: Any = None, **more: Any):
        return Watch(info or info_of(of), of, replace(RECIPE, best_by=by), tmp_path, **more)

    with pytest.raises(AccVideoError, match="best_by is saturation, .* without a decoder have no"):
        watch(by="saturation")
    single = recorded(tmp_path / "single", samples=1)
    with pytest.raises(AccVideoError, match="best_by is diversity, .* no two of them are samples"):
        watch(single, by="diversity", decode=decode)
    with pytest.raises(AccVideoError, match="recorded with another teacher .* choose one of"):
        watch(info=info_of(dataset, base="0" * 16))
    with pytest.raises(AccVideoError, match="with guidance 6.0, but .* learns guidance 1.0"):
        watch(info=info_of(dataset, guidance=1.0))
    noisy = recorded(tmp_path / "noisy", samples=1, steps=4, kept=(0, 2))
    with pytest.raises(AccVideoError, match="'noisy' cannot be looked at: key time 0.0000 is not"):
        watch(noisy)
    empty = TrajectoryDataset.create(tmp_path / "empty", dataset.info)
    with pytest.raises(AccVideoError, match="'empty' holds no trajectories to look at"):
        watch(empty)


def test_clips_and_frames_that_are_not_finite_stop_the_run(
    dataset: TrajectoryDataset, tmp_path: Path
) -> None:
    watched = Watched(dataset, tmp_path / "run")
    with pytest.raises(AccVideoError, match="NaN or infinite values after update 0; load"):
        watched.look(0, lambda x: x * float("nan"))
    watched.look(0)
    with pytest.raises(AccVideoError, match="after update 100; .* below 5e-06, .*no check"):
        watched.look(100, lambda x: x / 0)
    assert [row["step"] for row in watched.watch.rows()] == [0]
    dark = Watched(dataset, tmp_path / "dark", decode=lambda x: decode(x) * float("nan"))
    with pytest.raises(AccVideoError, match="the VAE decodes finite latents to NaN"):
        dark.look(0)


def test_lines_of_looks_are_json_that_plots_read(watched: Watched) -> None:
    watched.look(0)
    watched.look(100, still)
    lines = (watched.watch.folder / LOOKS_FILE).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [0, 100] and all(row["seconds"] > 0 for row in rows)
    assert [set(row) - {"notes", "standing", "clips"} for row in rows] == [
        {"step", "seconds", "latent_mse", "motion", "saturation", "contrast", "diversity"}
    ] * 2


def test_recipes_for_real_models_watch_and_tiny_ones_need_not() -> None:
    every = {name: recipe.validate_every for name, recipe in PRESETS.items()}
    assert len(every) > 8
    for name, updates in every.items():
        assert updates == (0 if name.startswith("tiny") else 100), name


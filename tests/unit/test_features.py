"""Feature maps: what is coloured how, where the heads look, and how a clip comes to its states."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from accvideo_core.cli import main
from accvideo_core.conditioning import Prompt
from accvideo_core.errors import AccVideoError
from accvideo_core.evaluate.feature_pictures import feature_facts, feature_sheet, write_features
from accvideo_core.evaluate.features import (
    KeyStates,
    blocks_of,
    feature_maps,
    neighbour_contrast,
    principal_colours,
    sample_states,
    shown_blocks,
)
from accvideo_core.flow import time_grid
from accvideo_core.models.tiny import embedded_teacher_path
from accvideo_core.monitor import Progress
from accvideo_core.sampling import sample
from accvideo_core.trajectories.record import RecordSpec, record
from tests.analytic import condition as gaussian_condition
from tests.analytic import gaussian_model
from tests.tiny import condition, latents, video_model

GRID = time_grid(6, 7.0)


def states() -> KeyStates:
    """Three times of a tiny clip."""
    return KeyStates((0.9, 0.5, 0.0), torch.cat([latents(1, seed) for seed in range(3)]),
                     condition(1))  # fmt: skip


def test_states_are_the_samplers_at_the_key_times():
    model, noise, cond = video_model(), latents(1), condition(1)
    seen: list[Progress] = []
    found = sample_states(model, cond, noise, GRID, 3, seen.append)
    assert found.times == (GRID[2], GRID[4], GRID[6])
    assert [(p.step, p.total) for p in seen] == [(i, 6) for i in range(1, 7)]
    torch.testing.assert_close(found.latents[-1:], sample(model, cond, noise, GRID))
    torch.testing.assert_close(found.latents[:1], sample(model, cond, noise, GRID[:3]))
    with pytest.raises(AccVideoError, match="4 student steps do not divide the 6 teacher steps"):
        sample_states(model, cond, noise, GRID, 4)


def test_components_become_colours_whatever_their_scale():
    """Three orthogonal directions of three sizes: one colour channel each, largest first."""
    ramp = torch.linspace(0, 1, 9)
    tokens = torch.zeros(1, 9, 9, 5)
    tokens[0, ..., 4] = 9 * ramp[:, None]
    tokens[0, ..., 1] = 3 * ramp[None, :]
    colours, share = principal_colours(tokens)
    assert share == pytest.approx(1.0) and colours.shape == (1, 9, 9, 3)
    assert (colours[0, :, :, 0].diff(dim=0)[1:-1] > 0.1).all()
    assert (colours[0, :, :, 0].diff(dim=1).abs() < 1e-4).all()
    assert (colours[0, :, :, 1].diff(dim=1)[:, 1:-1] > 0.1).all()
    assert (colours[0, :, :, 2] == 0.5).all(), "what only rounding makes is drawn grey"
    flat, none = principal_colours(torch.ones(1, 4, 4, 2))
    assert (flat == 0.5).all() and none == 0.0


def test_contrast_tells_smooth_from_fine():
    ramp = torch.linspace(0, 1, 16)[None, :, None, None].expand(2, 16, 16, 3)
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    noise = torch.randn(4, 32, 32, 8, generator=torch.Generator().manual_seed(0))
    assert neighbour_contrast(ramp) < 0.05
    assert neighbour_contrast(noise) == pytest.approx(1.0, abs=0.05)
    assert neighbour_contrast(board[None, ..., None].float()) == pytest.approx(2.0, abs=0.05)
    # By hand: 1 x 3 tokens 0, 1, 3: squares 1 + 4, variance (16/9 + 1/9 + 25/9) / 2 = 7/3.
    line = torch.tensor([0.0, 1.0, 3.0]).reshape(1, 1, 3, 1)
    assert neighbour_contrast(line) == pytest.approx(5 / (2 * 2 * 7 / 3))
    assert neighbour_contrast(torch.ones(1, 1, 1, 4)) == 0.0


def test_maps_are_of_the_features_that_the_heads_get():
    model, clip = video_model(), states()
    maps = feature_maps(model, clip, [3, 1], frames=2)
    assert [(one.t, one.block) for one in maps] == [
        (t, block) for t in clip.times for block in (3, 1)
    ]
    assert maps[0].colours.shape == (2, 2, 2, 3)
    (tokens,) = model.features(clip.latents[1:2], 0.5, clip.cond, [1])
    scaled = tokens[0] / tokens[0].std(dim=(0, 1, 2))
    assert maps[3].contrast == pytest.approx(neighbour_contrast(scaled), rel=1e-4)
    assert torch.allclose(maps[3].colours, principal_colours(scaled)[0], atol=1e-4)
    # 4 blocks: the last one for t > 0, the third of them (two thirds) for t = 0.
    assert [one.tapped for one in feature_maps(model, clip, [2, 3])] == [
        False, True, False, True, True, False
    ]  # fmt: skip


def test_blocks_are_chosen_over_the_depth_and_where_the_heads_look(
    monkeypatch: pytest.MonkeyPatch,
):
    model = video_model()
    assert shown_blocks(model, (0.9, 0.0)) == (0, 1, 2, 3)
    monkeypatch.setattr(type(model), "num_blocks", 60)
    assert shown_blocks(model, (0.9, 0.0)) == (0, 12, 24, 35, 39, 47, 59)
    assert blocks_of(" 19, 39,59") == (19, 39, 59) and blocks_of(" ") is None
    with pytest.raises(AccVideoError, match="'a,b' are not numbers with commas"):
        blocks_of("a,b")
    with pytest.raises(AccVideoError, match="name one twice"):
        feature_maps(model, states(), [1, 1])


def test_a_look_is_cancelled_between_times():
    def stop(progress: Progress) -> None:
        assert (progress.stage, progress.step, progress.total) == ("features", 1, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        feature_maps(video_model(), states(), [0], monitor=stop)


def colours(picture: Image.Image) -> dict[object, int]:
    """Pixels of every colour."""
    return {colour: count for count, colour in picture.getcolors(1 << 20) or ()}


def test_sheet_has_a_row_a_time_and_a_red_frame_where_heads_look(tmp_path: Path):
    maps = feature_maps(video_model(), states(), [2, 3])
    blue = torch.tensor([0.2, 0.4, 0.8]).expand(3, 5, 16, 16, 3)
    sheet, plain = feature_sheet(maps, blue), feature_sheet(maps)
    fewer = feature_sheet([one for one in maps if one.t > 0], blue[:2])
    assert sheet.height == plain.height > fewer.height
    assert colours(sheet)[(51, 102, 204)] == 3 * 128 * 128
    assert (51, 102, 204) not in colours(plain)

    def framed(picture: Image.Image) -> int:
        return colours(picture).get((214, 39, 40), 0)

    nowhere = [replace(one, tapped=False) for one in maps]
    frame = framed(sheet) / 3  # one for each time
    assert framed(feature_sheet(nowhere)) == 0 < framed(fewer) == 2 * frame
    with pytest.raises(AccVideoError, match="no feature maps to draw"):
        feature_sheet([])
    paths = write_features(maps, None, tmp_path, {"prompt": "a cat"})
    told = json.loads(paths[0].read_text())
    assert told["prompt"] == "a cat" and len(told["maps"]) == 6
    assert told["maps"][1]["contrast"] == maps[1].contrast
    with Image.open(paths[1]) as picture:
        assert picture.size == plain.size


def test_facts_star_the_heads_block():
    lines = feature_facts(feature_maps(video_model(), states(), [2, 3])).splitlines()
    assert lines[1].split() == ["t", "block", "2", "block", "3"]
    assert ["*" in cell for cell in lines[2].split()] == [False, False, True]
    assert ["*" in cell for cell in lines[4].split()] == [False, True, False]


def test_features_from_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Of a clip that a teacher samples, and of a record of its dataset."""
    monkeypatch.chdir(tmp_path)
    size = ["--frames", "5", "--height", "16", "--width", "16"]
    look = ["inspect", str(embedded_teacher_path()), "--features", "0,5", *size]
    assert main([*look, "--prompt", "a red circle", "--student-steps", "2", "--out", "one"]) == 0
    assert "block 5" in capsys.readouterr().out
    told = json.loads(Path("one/features.json").read_text())
    assert told["prompt"] == "a red circle" and len(told["maps"]) == 2 * 2
    record = ["record", "clips", "--prompt", "a blue square", "--steps", "4", "--keep", "2"]
    assert main([*record, *size]) == 0
    assert main(["inspect", "clips", "--features", "--out", "two"]) == 0
    told = json.loads(Path("two/features.json").read_text())
    assert told["prompt"] == "a blue square"
    assert {one["t"] for one in told["maps"]} == {time_grid(4, 7.0)[2], 0.0}


def test_what_cannot_be_looked_into_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    prompt = Prompt.of("a cat", gaussian_condition())
    record(gaussian_model(), [prompt], RecordSpec(5, 16, 16, steps=4, kept=2), Path("clips"))
    for path, words, message in (
        ("clips", ["--out", "two"], "was recorded from another teacher than"),
        (embedded_teacher_path(), ["--out", "two"], "give --prompt TEXT, or a dataset"),
        ("clips", [], "--features needs a folder for its picture; give --out FOLDER"),
    ):
        assert main(["inspect", str(path), "--features", *words]) == 2
        assert message in capsys.readouterr().err

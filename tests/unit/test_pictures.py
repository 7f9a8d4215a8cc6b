"""Contact sheets and curves: what is shown where, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from accvideo_core.errors import AccVideoError
from accvideo_core.evaluate.pictures import contact_sheet, loss_curves

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def flat(*colours: tuple[int, int, int]) -> torch.Tensor:
    """One clip of one colour each, [N, 5, 8, 8, 3]."""
    return torch.tensor(colours).float().div(255)[:, None, None, None].expand(-1, 5, 8, 8, 3)


def boxes(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """Bounding box of the pixels of exactly this colour."""
    mask = (torch.tensor(list(image.tobytes())).reshape(image.height, image.width, 3)
            == torch.tensor(colour)).all(dim=2)
    if not mask.any():
        return None
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def test_rows_are_prompts_and_columns_are_contenders():
    sheet = contact_sheet({"a": flat(RED, GREEN), "b": flat(BLUE, BLUE)}, ["first", "second"])
    red, green, blue = (boxes(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert red and green and blue
    assert red[0] == green[0] and red[3] <= green[1]
    assert blue[0] > red[2] and (blue[1], blue[3]) == (red[1], green[3])


def test_small_frames_are_enlarged_and_large_ones_reduced():
    for size, shown in ((8, 64), (20, 60), (64, 64), (200, 50)):
        frames = flat(RED).repeat_interleave(25, 2).repeat_interleave(25, 3)[:, :, :size, :size]
        box = boxes(contact_sheet({"a": frames}, ["p"], frames_per_clip=1), RED)
        assert box and (box[2] - box[0], box[3] - box[1]) == (shown, shown)


def test_first_and_last_frame_are_among_those_shown():
    frames = flat(GREEN).clone()
    frames[0, 0], frames[0, -1] = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])
    sheet = contact_sheet({"a": frames}, ["p"], frames_per_clip=3)
    red, green, blue = (boxes(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert red and green and blue and red[2] < green[0] and green[2] < blue[0]


def test_long_labels_stay_in_their_place():
    long = "word " * 60
    sheet = contact_sheet({"n" * 300: flat(RED)}, [long], frames_per_clip=1)
    short = contact_sheet({"n": flat(RED)}, ["p"], frames_per_clip=1)
    assert sheet.size == short.size and boxes(sheet, RED) == boxes(short, RED)


@pytest.mark.parametrize(
    ("clips", "prompts", "message"),
    [
        ({}, ["p"], "at least one contender"),
        ({"a": flat(RED)}, [], "one prompt"),
        ({"a": flat(RED)}, ["p", "q"], r"clips of a .* 2 prompts"),
        ({"a": flat(RED), "b": flat(RED)[:, :2]}, ["p"], "clips of b"),
    ],
)
def test_clips_that_do_not_fit_are_refused(clips, prompts, message):
    with pytest.raises(AccVideoError, match=message):
        contact_sheet(clips, prompts)


def metrics_file(path: Path, values: list[float], key: str = "loss") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"step": i + 1, key: value, "lr": 0.1}) for i, value in enumerate(values)]
    path.write_text("\n".join(rows) + "\n")
    return path


def ink(image: Image.Image, colour: tuple[int, int, int], box: tuple[int, int, int, int]) -> bool:
    """Whether a box of the picture holds a pixel near this colour."""
    part = image.crop(box)
    pixels = torch.tensor(list(part.tobytes())).reshape(-1, 3)
    return bool(((pixels - torch.tensor(colour)).abs().amax(dim=1) < 40).any())


def test_a_falling_loss_is_drawn_from_top_left_to_bottom_right(tmp_path: Path):
    path = metrics_file(tmp_path / "run" / "metrics.jsonl", [2.0**-i for i in range(20)])
    picture = loss_curves({"run": path})
    width, height = picture.size
    blue = (31, 119, 180)
    assert ink(picture, blue, (70, 50, width // 3, height // 2))
    assert ink(picture, blue, (2 * width // 3, height // 2, width, height))
    assert not ink(picture, blue, (2 * width // 3, 50, width, height // 2))


def test_one_panel_for_each_loss_and_one_colour_for_each_run(tmp_path: Path):
    first = metrics_file(tmp_path / "one" / "metrics.jsonl", [1.0, 0.5, 0.2])
    second = metrics_file(tmp_path / "two" / "metrics.jsonl", [0.7, 0.7, 0.7], key="adv_loss")
    picture = loss_curves([first, second])
    assert picture.width == 2 * loss_curves([first]).width
    half = picture.width // 2
    assert ink(picture, (214, 39, 40), (0, 40, half, picture.height))  # adv_loss comes first
    assert ink(picture, (31, 119, 180), (half, 40, picture.width, picture.height))


def test_the_terms_of_an_objective_are_drawn_rather_than_their_sum(tmp_path: Path):
    path = tmp_path / "run" / "metrics.jsonl"
    metrics_file(path, [1.0, 0.5])
    rows = [{"step": 1, "loss": 2.0, "trajectory": 1.0, "generator": 0.7, "discriminator": 1.4}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    terms = ["trajectory", "generator", "discriminator"]
    assert loss_curves([path]).tobytes() == loss_curves([path], keys=terms).tobytes()


def test_a_long_legend_wraps_and_the_panel_moves_down(tmp_path: Path):
    files = [metrics_file(tmp_path / str(i) / "m.jsonl", [1.0, 0.5 - i / 50]) for i in range(7)]
    runs = {f"a run with a long name {i}": file for i, file in enumerate(files)}
    picture = loss_curves(runs)
    assert picture.height > loss_curves({"a": tmp_path / "0" / "m.jsonl"}).height
    legend = (20, 0, picture.width, picture.height - 300)
    assert ink(picture, (227, 119, 194), legend)  # the seventh colour is not cut off


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [-1.0, 2.0], [1e-9, 1e9], [1.0, 1.0000001]])
def test_odd_values_are_drawn(tmp_path: Path, values: list[float]):
    assert loss_curves([metrics_file(tmp_path / "r" / "m.jsonl", values)]).width == 560


def test_torn_lines_and_infinite_values_are_left_out(tmp_path: Path):
    path = metrics_file(tmp_path / "r" / "m.jsonl", [1.0, 0.5])
    clean = loss_curves([path]).tobytes()
    path.write_text(path.read_text() + '{"step": 3, "loss": NaN}\n{"step": 4, "lo')
    assert loss_curves([path]).tobytes() == clean


def test_missing_files_and_figures_are_named(tmp_path: Path):
    with pytest.raises(AccVideoError, match="no metrics file"):
        loss_curves([tmp_path / "metrics.jsonl"])
    path = metrics_file(tmp_path / "r" / "m.jsonl", [1.0], key="speed")
    with pytest.raises(AccVideoError, match="no loss to draw; they hold lr, speed"):
        loss_curves([path])
    with pytest.raises(AccVideoError, match="no nothing_like_it to draw"):
        loss_curves([path], keys=["nothing_like_it"])

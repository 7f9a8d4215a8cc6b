"""The procedural world: captions, and what the rendered clips show."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from accvideo_core.errors import AccVideoError
from accvideo_core.evaluate import world
from accvideo_core.evaluate.world import ClipSpec


def clips(spec: ClipSpec, count: int = 8, seed: int = 0) -> torch.Tensor:
    return world.render([spec] * count, torch.Generator().manual_seed(seed))


def centre(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean x, mean y and area in pixels of everything bright, each [B, T]."""
    mass = (video.amax(1) > 0).float()
    area = mass.sum((2, 3)).clamp(min=1)
    ruler = torch.arange(world.SIZE) + 0.5
    return (mass.sum(2) * ruler).sum(-1) / area, (mass.sum(3) * ruler).sum(-1) / area, area


def test_caption_reads_as_documented() -> None:
    spec = ClipSpec("circle", "red", "moving left", "striped")
    assert world.prompt(spec) == "a red circle moving left on a striped background"


def test_parse_inverts_prompt_for_the_whole_grammar() -> None:
    specs = world.all_specs()
    assert len(set(specs)) == len(specs) == 3 * 6 * 7 * 3
    assert [world.parse(text) for text in world.all_prompts()] == specs


def test_parse_forgives_case_and_spaces() -> None:
    assert world.parse("  A red  circle GROWING on a plain background ").motion == "growing"


@pytest.mark.parametrize(
    "text", ["", "a circle", "a purple circle growing on a plain background", "red"]
)
def test_parse_refuses_what_is_not_in_the_grammar(text: str) -> None:
    with pytest.raises(AccVideoError, match="not in the grammar"):
        world.parse(text)


def test_unknown_attribute_is_refused_by_name() -> None:
    with pytest.raises(AccVideoError, match="colour 'pink'.*choose one of red"):
        ClipSpec("circle", "pink", "growing", "plain")


def test_vocabulary_is_exactly_the_words_of_all_prompts() -> None:
    words = {word for text in world.all_prompts() for word in text.split()}
    assert set(world.VOCABULARY) == words
    assert len(world.VOCABULARY) == len(words)


def test_sampled_prompts_are_distinct_until_the_grammar_is_used_up() -> None:
    texts = world.sample_prompts(400, torch.Generator().manual_seed(0))
    assert len(set(texts[:378])) == 378
    assert len(texts) == 400


def test_equal_generators_draw_equal_clips() -> None:
    specs = world.sample_specs(6, torch.Generator().manual_seed(3))
    one, two, other = (
        world.render(specs, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_clips_have_the_documented_shape_and_range() -> None:
    specs = world.sample_specs(16, torch.Generator().manual_seed(0))
    video = world.render(specs, torch.Generator().manual_seed(0))
    assert video.shape == (16, 3, world.FRAMES, world.SIZE, world.SIZE)
    assert video.dtype == torch.float32
    assert -1 <= video.min() < video.max() <= 1


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moving left", 0, -1), ("moving right", 0, 1), ("moving up", 1, -1), ("moving down", 1, 1)],
)
def test_shapes_move_the_way_the_caption_says(motion: str, axis: int, sign: int) -> None:
    track = centre(clips(ClipSpec("square", "white", motion, "plain")))
    moved = track[axis][:, -1] - track[axis][:, 0]
    across = track[1 - axis][:, -1] - track[1 - axis][:, 0]
    assert (sign * moved > 6).all()
    assert (across.abs() < 1.5).all()


def test_growing_and_shrinking_change_the_area_only() -> None:
    for motion, larger in (("growing", -1), ("shrinking", 0)):
        _, _, area = centre(clips(ClipSpec("circle", "white", motion, "plain")))
        assert (area[:, larger] > 2.5 * area[:, -1 - larger]).all()


def test_bouncing_goes_up_and_comes_back() -> None:
    _, y, _ = centre(clips(ClipSpec("circle", "white", "bouncing", "plain")))
    low, high, landed, again = y[:, 0], y[:, 5], y[:, 11], y[:, 16]  # y points down
    assert (low - high > 5).all()
    assert (landed - high > 5).all()
    assert (landed - again > 5).all()


def test_edges_are_sharp() -> None:
    """At most the ring of one pixel around a shape is neither shape nor background."""
    video = clips(ClipSpec("circle", "white", "moving left", "plain"))
    level = (video[:, 0] + 1) / 2
    between = ((level > world.DARK + 0.02) & (level < 0.98)).sum((2, 3))
    _, _, area = centre(video)
    assert (between < 2.2 * (torch.pi * area).sqrt() * 2).all()


def test_mosaic_cells_are_independent_fair_bits() -> None:
    video = clips(ClipSpec("circle", "red", "growing", "mosaic"), count=256)
    corner = video[:, :, :, : world.CELL, : world.CELL].flatten(1)
    levels = (corner + 1) / 2
    assert torch.allclose(levels, levels[:, :1].expand_as(levels))
    bright = (levels[:, 0] - world.GREY).abs() < 1e-5
    dark = (levels[:, 0] - world.DARK).abs() < 1e-5
    assert (bright | dark).all()
    assert 0.4 < bright.float().mean() < 0.6


def test_stripes_are_four_pixels_wide_in_both_directions() -> None:
    video = clips(ClipSpec("circle", "red", "shrinking", "striped"), count=64)
    last = (video[:, 0, -1] > (world.DARK + world.GREY) - 1).float()
    row, column = last[:, 0], last[:, :, 0]  # along the upper and the left border
    vertical = (row != row[:, :1]).any(1)
    assert 8 < vertical.sum() < 56
    line = torch.where(vertical[:, None], row, column)
    assert torch.equal(line[:, :-8], line[:, 8:])
    assert ((line[:, :-4] - line[:, 4:]).abs() == 1).all()


def test_background_does_not_move() -> None:
    video = clips(ClipSpec("circle", "red", "moving up", "mosaic"))
    border = video[..., 0]
    assert torch.equal(border[:, :, :1].expand_as(border), border)


def test_specs_are_frozen() -> None:
    spec = ClipSpec("circle", "red", "growing", "plain")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.colour = "blue"  # type: ignore[misc]

"""The image-to-video world: the first frame announces the motion, and its judge is not fooled."""

from __future__ import annotations

import pytest
import torch

from accvideo_core.evaluate import image_world, judge, world
from accvideo_core.evaluate.classifier import image_classifier_path, load_image_classifier
from accvideo_core.evaluate.image_world import EDGE, MOTIONS, STILL
from accvideo_core.evaluate.world import ClipSpec

LIT = {
    "moving left": "left",
    "moving right": "right",
    "moving up": "top",
    "moving down": "bottom",
    "growing": "left right top bottom",
    "shrinking": "",
    "bouncing": "top bottom",
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips(motion: str, count: int = 4, announced: str | None = None) -> torch.Tensor:
    specs = [ClipSpec("circle", "red", motion, "plain")] * count
    return image_world.render(
        specs, generator(), None if announced is None else [announced] * count
    )


def lit_edges(video: torch.Tensor) -> str:
    """The edges whose middle is lit in every frame of every clip."""
    light = (video[:, 0] < -0.5) & (video[:, 1] > 0.5) & (video[:, 2] > 0.5)  # [B, T, H, W]
    middle = slice(12, 20)
    sides = {
        "left": light[..., middle, :EDGE],
        "right": light[..., middle, -EDGE:],
        "top": light[..., :EDGE, middle],
        "bottom": light[..., -EDGE:, middle],
    }
    assert all(side.all() or not side.any() for side in sides.values())
    return " ".join(name for name, side in sides.items() if side.all())


def shape_mask(video: torch.Tensor) -> torch.Tensor:
    """Where the red shape is, [B, T, H, W]."""
    return (video[:, 0] > 0) & (video[:, 2] < 0)


def test_clips_have_the_stated_shape_and_range() -> None:
    video = image_world.render(world.sample_specs(3, generator()), generator())
    assert video.shape == (3, 3, image_world.FRAMES, image_world.SIZE, image_world.SIZE)
    assert video.dtype == torch.float32 and video.abs().max() <= 1


def test_equal_generators_draw_equal_clips() -> None:
    specs = world.sample_specs(6, generator(1))
    first, again = (image_world.render(specs, generator(2)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, image_world.render(specs, generator(3)))


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_every_motion_lights_its_own_edges(motion: str) -> None:
    assert lit_edges(clips(motion)) == LIT[motion]


def test_announced_edges_leave_the_motion_alone() -> None:
    told, plain = clips("moving left", announced="moving up"), clips("moving left")
    assert lit_edges(told) == "top"
    inner = (..., slice(EDGE, -EDGE), slice(EDGE, -EDGE))
    assert torch.equal(told[inner], plain[inner])


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moving left", 3, -1), ("moving right", 3, 1), ("moving up", 2, -1), ("moving down", 2, 1)],
)
def test_a_shape_moves_to_the_lit_edge(motion: str, axis: int, sign: int) -> None:
    mask = shape_mask(clips(motion)).float()
    ruler = torch.arange(image_world.SIZE).float()
    centre = (mask.sum(5 - axis) * ruler).sum(-1) / mask.sum((2, 3))
    assert ((centre[:, -1] - centre[:, 0]) * sign > 2).all()


def test_shapes_grow_where_all_edges_are_lit_and_shrink_where_none_is() -> None:
    grown, shrunk = (shape_mask(clips(m)).sum((2, 3)).float() for m in ("growing", "shrinking"))
    assert (grown[:, -1] > 1.4 * grown[:, 0]).all()
    assert (shrunk[:, 0] > 1.4 * shrunk[:, -1]).all()


def test_clips_are_those_of_the_text_world_between_the_edges() -> None:
    specs = [ClipSpec("square", "blue", m, "mosaic") for m in world.MOTIONS[:4]]
    inner = (..., slice(EDGE, -EDGE), slice(EDGE, -EDGE))
    source = generator(7)
    pace = image_world.SLOWEST + (1 - image_world.SLOWEST) * torch.rand(4, 1, generator=source)
    theirs = world.render(specs, source, pace * torch.linspace(0, 1, image_world.FRAMES))
    assert torch.equal(image_world.render(specs, generator(7))[inner], theirs[inner])


def test_the_first_frame_does_not_tell_the_pace() -> None:
    mask = shape_mask(clips("moving right", 64)).float()
    ruler = torch.arange(image_world.SIZE).float()
    centre = (mask.sum(2) * ruler).sum(-1) / mask.sum((2, 3))
    start, way = centre[:, 0], centre[:, -1] - centre[:, 0]
    assert way.max() > 2.5 * way.min()
    assert torch.corrcoef(torch.stack([start, way]))[0, 1].abs() < 0.7


def test_classifier_is_small_and_reads_all_attributes_of_real_clips() -> None:
    assert image_classifier_path().stat().st_size <= 1e6
    specs = world.sample_specs(192, generator(4))
    found = load_image_classifier().predict(image_world.render(specs, generator(5)))
    assert (found == world.labels(specs)).float().mean(0).min() >= 0.98


@pytest.mark.parametrize("motion", ["moving left", "growing"])
def test_classifier_sees_what_moves_and_not_what_was_announced(motion: str) -> None:
    classifier = load_image_classifier()
    turned = {"moving left": "moving right", "growing": "shrinking"}[motion]
    told, back = clips(motion, 8, announced="bouncing"), clips(motion, 8).flip(2)
    still = clips(motion, 8)[:, :, :1].expand(-1, -1, image_world.FRAMES, -1, -1)
    for video, wanted in ((told, motion), (back, turned), (still, STILL)):
        found = classifier.predict(video)[:, list(image_world.ATTRIBUTES).index("motion")]
        assert (found == MOTIONS.index(wanted)).float().mean() >= 0.875, wanted


def test_judge_passes_real_clips_and_not_clips_that_stand_still() -> None:
    one = judge.ImageJudge.of_clips(48, seed=3)
    real = one.real_frames(range(48))
    first = one.first_frames(range(48))
    assert torch.equal(first, real[:, 0])
    assert one.fits(one.plan) and one.plan.frames == image_world.FRAMES
    assert one.judge(real, range(48))[0]["all"].mean() >= 0.95
    still = first[:, None].expand_as(real)
    hits, _ = one.judge(still, range(48))
    assert hits["motion"].mean() <= 0.1 and hits["colour"].mean() >= 0.95

"""The discriminator's heads: any size of clip, what they judge apart, conditioning, determinism."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from accvideo_core.conditioning import Condition
from accvideo_core.distill.head import FeatureScale, Head, SpatialHead, TemporalHead
from accvideo_core.distill.heads import Heads, over_heads
from accvideo_core.distill.projection import Projection, frame_code, prompt_vector
from accvideo_core.distill.recipes import Recipe

WIDTHS = {1: 6, 3: 8}
BLOCKS = ((1,), (3,), (1, 3))
RECIPE = Recipe(head_width=16)
SIZES = [(1, 1, 1), (1, 2, 2), (3, 1, 5), (2, 6, 1), (4, 5, 3), (24, 34, 60)]


def features(
    block: int, size: tuple[int, int, int] = (2, 4, 4), batch: int = 3, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed + block)
    return torch.randn(batch, *size, WIDTHS[block], generator=generator)


def condition(batch: int = 3, pooled: bool = True, seed: int = 7) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, 4, 10, generator=generator)
    mask = torch.tensor([[True] * 2 + [False] * 2] * batch)
    vector = torch.randn(batch, 5, generator=generator) if pooled else None
    return Condition(text, mask, vector)


def head(kind: type[Head] = SpatialHead, prompt: int | None = None, width: int = 16) -> Head:
    torch.manual_seed(0)
    return kind(WIDTHS[1], width, prompt)


def calibrated(head: Head, *xs: Tensor) -> Head:
    scale = FeatureScale(head.mean)
    for x in xs:
        scale.add(x)
    head.calibrate(scale)
    return head


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("conditioning", [False, True])
def test_one_head_judges_clips_of_any_size(size: tuple[int, int, int], conditioning: bool) -> None:
    """The same weights, set up on another size; a logit for every 2 x 2 tokens, or every one."""
    recipe = replace(RECIPE, head_kind="spatial_temporal")
    heads = Heads(BLOCKS, WIDTHS, recipe, prompt=5 if conditioning else None)
    heads.calibrate([(k, [features(b) for b in blocks]) for k, blocks in enumerate(BLOCKS)])
    frames, rows, columns = size
    with torch.no_grad():
        spatial, temporal = heads(0, [features(1, size, batch=2)], condition(2))
    assert spatial.shape == (2, frames * max(1, rows // 2) * max(1, columns // 2))
    assert temporal.shape == (2, frames * rows * columns)
    assert torch.isfinite(spatial).all() and torch.isfinite(temporal).all()


@pytest.mark.parametrize("width", [1, 6, 8, 48, 100, 1024])
def test_any_width_has_groups_that_divide_it(width: int) -> None:
    groups = head(width=width).enter_norm.num_groups
    assert width % groups == 0 and (groups == 1 or width // groups >= 16)
    assert groups == {1024: 32, 48: 3, 100: 5}.get(width, 1)


def changed(judge: Head, moved: Tensor, x: Tensor) -> Tensor:
    """Which logits differ, [B, P]."""
    return (judge(moved) - judge(x)).abs() > 1e-6


def test_a_spatial_head_judges_frames_and_samples_apart() -> None:
    x = features(1)
    moved = x.clone()
    moved[1, 0] += torch.randn(4, 4, 6)
    found = changed(head(SpatialHead), moved, x).reshape(3, 2, -1).any(dim=2)
    assert found.tolist() == [[False, False], [True, False], [False, False]]


def test_a_temporal_head_judges_positions_apart_and_frames_together() -> None:
    x = features(1, (3, 2, 2))
    moved = x.clone()
    moved[1, 0, 0, 1] += torch.randn(6)
    found = changed(head(TemporalHead), moved, x).reshape(3, 2, 2, 3)
    assert found[1, 0, 1].all() and found.sum() == 3
    stirred = x[:, [1, 0, 2]]
    assert not torch.allclose(head(TemporalHead)(stirred).sum(1), head(TemporalHead)(x).sum(1))
    still = head(SpatialHead)
    torch.testing.assert_close(still(stirred).sum(1), still(x).sum(1))


@pytest.mark.parametrize("kind", [SpatialHead, TemporalHead])
def test_badly_scaled_channels_are_judged_alike(kind: type[Head]) -> None:
    """Calibrated heads see the same whatever the channels' offsets and scales."""
    x, fake = features(1), features(1, seed=50)
    scale = torch.tensor([0.05, 0.1, 1.0, 3.0, 30.0, 5.0])
    one = calibrated(head(kind), x[:1], x[1:])
    other = calibrated(head(kind), scale * x + 7)
    torch.testing.assert_close(other(scale * fake + 7), one(fake), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(one(2 * fake), one(fake), atol=1e-3)


def test_the_scale_of_samples_one_by_one_is_that_of_all() -> None:
    x = 3 * features(1, batch=7) + 100
    scale = FeatureScale(torch.zeros(6))
    for part in (x[:1], x[1:3], x[3:]):
        scale.add(part)
    variance, mean = torch.var_mean(x.double().flatten(0, -2), dim=0, correction=0)
    torch.testing.assert_close(scale.mean, mean.float())
    torch.testing.assert_close(scale.variance, variance.float(), rtol=1e-4, atol=0)


def test_a_dead_channel_is_not_blown_up() -> None:
    x = features(1) * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    judge = calibrated(head(), x)
    assert judge.std[-1] == pytest.approx(0.01, rel=0.2) and torch.isfinite(judge(x)).all()


@pytest.mark.parametrize("kind", ["spatial", "spatial_temporal"])
def test_only_the_heads_of_one_key_time_take_part(kind: str) -> None:
    heads = Heads(BLOCKS, WIDTHS, replace(RECIPE, head_kind=kind))
    each = 1 if kind == "spatial" else 2
    for k, blocks in enumerate(BLOCKS):
        heads.zero_grad()
        logits = heads(k, [features(block) for block in blocks], condition())
        assert len(logits) == len(heads.of(k)) == each * len(blocks)
        torch.cat(logits, dim=1).sum().backward()
        mine = {id(p) for head in heads.of(k) for p in head.parameters()}
        reached = {id(p) for p in heads.parameters() if p.grad is not None}
        assert reached == mine
    assert sum(len(heads.of(k)) for k in range(3)) == len(heads.heads) == 4 * each


def test_shared_heads_serve_every_key_time_that_looks_at_their_block() -> None:
    heads = Heads(BLOCKS, WIDTHS, replace(RECIPE, heads="shared"))
    assert set(heads.heads) == {"block1", "block3"}
    assert heads.of(0) == heads.of(2)[:1] and heads.of(1) == heads.of(2)[1:]
    # Key times 0 and 2 set the scale of block 1 together.
    heads.calibrate([(0, [features(1)]), (1, [features(3)]), (2, [features(1) + 2, features(3)])])
    torch.testing.assert_close(heads.of(0)[0].mean, features(1).mean((0, 1, 2, 3)) + 1)
    torch.testing.assert_close(heads.of(1)[0].mean, features(3).mean((0, 1, 2, 3)))


def test_heads_weigh_alike_however_many_patches_they_judge() -> None:
    many, few = torch.zeros(2, 100), torch.ones(2, 4)
    assert over_heads(torch.mean, [many, few]) == pytest.approx(0.5)


def test_conditioned_heads_tell_prompts_apart_and_plain_ones_do_not() -> None:
    x = features(1)
    for prompt, differs in ((5, True), (None, False)):
        heads = Heads(((1,),), WIDTHS, replace(RECIPE, head_kind="spatial_temporal"), prompt)
        pairs = zip(
            heads(0, [x], condition()), heads(0, [x], condition(seed=8)), strict=True
        )
        assert [not torch.allclose(a, b, atol=1e-4) for a, b in pairs] == [differs] * 2


def test_the_projection_is_the_inner_product_with_prompt_and_frame() -> None:
    torch.manual_seed(0)
    project = Projection(5, 16, frames=True)
    x, prompt = torch.randn(2 * 3, 16, 4, 2), torch.randn(2, 5)
    assert project.frame is not None
    for sample in range(2):
        for frame in range(3):
            embedded = project.prompt.weight @ prompt[sample]
            embedded = embedded + project.frame.weight @ frame_code(3)[frame]
            expected = torch.einsum("chw,c->hw", x[3 * sample + frame], embedded) / 4
            found = project(x, prompt)[3 * sample + frame, 0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frame_code(9)[:4], frame_code(4))
    assert len({tuple(row) for row in frame_code(50).tolist()}) == 50


def test_only_a_conditioned_spatial_head_knows_the_frame() -> None:
    still = features(1, (1, 4, 4)).expand(3, 4, 4, 4, 6)
    prompt = torch.zeros(3, 5)
    logits = head(SpatialHead, prompt=5)(still, prompt).reshape(3, 4, -1)
    assert not torch.allclose(logits[:, 1], logits[:, 0], atol=1e-3)
    plain = head(SpatialHead)(still).reshape(3, 4, -1)
    torch.testing.assert_close(plain[:, 1], plain[:, 0])


def test_the_prompt_vector_is_pooled_or_the_mean_of_valid_tokens() -> None:
    cond = condition()
    assert cond.pooled is not None
    scaled = replace(cond, pooled=1000 * cond.pooled)
    torch.testing.assert_close(prompt_vector(scaled), prompt_vector(cond), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(prompt_vector(cond).mean(1), torch.zeros(3), rtol=0, atol=1e-6)
    bare = condition(pooled=False)
    expected = torch.nn.functional.layer_norm(bare.text[:, :2].mean(1), (10,))
    torch.testing.assert_close(prompt_vector(bare), expected)
    torch.testing.assert_close(prompt_vector(bare.trim()), expected)


def test_weights_follow_from_the_seed_alone() -> None:
    recipe = replace(RECIPE, head_kind="spatial_temporal")
    before = torch.random.get_rng_state()
    first = Heads(BLOCKS, WIDTHS, recipe, prompt=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)
    again = Heads(BLOCKS, WIDTHS, recipe, prompt=5).state_dict()
    other = Heads(BLOCKS, WIDTHS, replace(recipe, seed=1), prompt=5).state_dict()
    for name, p in first.named_parameters():
        assert torch.equal(p, again[name])
        if p.dim() > 1:
            assert not torch.equal(p, other[name]), name
            assert p.abs().max() <= p[0].numel() ** -0.5

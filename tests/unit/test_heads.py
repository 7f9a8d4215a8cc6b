"""The discriminator's heads: shapes, independence of key times, determinism."""

from __future__ import annotations

import pytest
import torch

from accvideo_core.distill.heads import Head, TimestepHeads

SHAPES = {1: (4, 4, 6), 3: (2, 2, 8)}
BLOCKS = ((1,), (3,), (1, 3))


def features(block: int, batch: int = 3, frames: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + block)
    return torch.randn(batch, frames, *SHAPES[block], generator=generator)


@pytest.mark.parametrize(
    ("grid", "patches"), [((2, 2), 1), ((4, 4), 4), ((34, 60), 17 * 30), ((5, 3), 2), ((1, 3), 3)]
)
def test_patch_logits_of_any_grid(grid: tuple[int, int], patches: int) -> None:
    head = Head((*grid, 6), width=8)
    assert head(torch.randn(2, 3, *grid, 6)).shape == (2, 3 * patches)


@pytest.mark.parametrize("width", [1, 6, 8, 48, 100, 1024])
def test_any_width_has_groups_that_divide_it(width: int) -> None:
    groups = Head((2, 2, 4), width).enter_norm.num_groups
    assert width % groups == 0 and (groups == 1 or width // groups >= 16)
    assert groups == {1024: 32, 48: 3, 100: 5}.get(width, 1)


def test_frames_and_samples_are_judged_apart() -> None:
    head = Head(SHAPES[1], width=16)
    x = features(1)
    logits = head(x).reshape(3, 2, -1)
    moved = x.clone()
    moved[1, 0] += torch.randn(SHAPES[1])
    changed = (head(moved).reshape(3, 2, -1) - logits).abs().amax(dim=2) > 1e-6
    assert changed.tolist() == [[False, False], [True, False], [False, False]]


def test_badly_scaled_channels_are_judged_alike() -> None:
    """Calibrated heads see the same whatever the channels' offsets and scales."""
    one, other = Head(SHAPES[1], width=16), Head(SHAPES[1], width=16)
    other.load_state_dict(one.state_dict())
    x, fake = features(1), features(1, seed=50)
    scale = torch.tensor([0.05, 0.1, 1.0, 3.0, 30.0, 5.0])
    one.calibrate([x[:1], x[1:]])
    other.calibrate([scale * x + 7])
    torch.testing.assert_close(other(scale * fake + 7), one(fake), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(one(2 * fake), one(fake), atol=1e-3)


def test_a_dead_channel_is_not_blown_up() -> None:
    head = Head(SHAPES[1], width=16)
    x = features(1) * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    head.calibrate([x])
    assert head.std[-1] == pytest.approx(0.01, rel=0.2) and torch.isfinite(head(x)).all()


def test_only_the_heads_of_one_key_time_take_part() -> None:
    heads = TimestepHeads(BLOCKS, SHAPES, width=16, seed=0)
    assert heads(0, [features(1)]).shape == (3, 8)
    assert heads(2, [features(1), features(3)]).shape == (3, 8 + 2)
    for k, blocks in enumerate(BLOCKS):
        heads.zero_grad()
        heads(k, [features(block) for block in blocks]).sum().backward()
        mine = {id(p) for head in heads.of(k) for p in head.parameters()}
        reached = {id(p) for p in heads.parameters() if p.grad is not None}
        assert reached == mine
    assert sum(len(heads.of(k)) for k in range(3)) == len(heads.heads) == 4


def test_weights_follow_from_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    first = TimestepHeads(BLOCKS, SHAPES, width=16, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)
    again = TimestepHeads(BLOCKS, SHAPES, width=16, seed=0).state_dict()
    other = TimestepHeads(BLOCKS, SHAPES, width=16, seed=1).state_dict()
    for name, p in first.named_parameters():
        assert torch.equal(p, again[name])
        if p.dim() > 1:
            assert not torch.equal(p, other[name]), name
            assert p.abs().max() <= p[0].numel() ** -0.5

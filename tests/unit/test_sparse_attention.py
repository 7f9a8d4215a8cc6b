"""Sparse attention: which blocks see each other, and that no other ones do."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_families import NAMES, Case, case

from accvideo_core.errors import AccVideoError
from accvideo_core.models import FAMILIES, kernels, sparse
from accvideo_core.models import attention as module
from accvideo_core.models.attention import attention
from accvideo_core.models.kernels import KERNELS
from accvideo_core.models.sparse import (
    PATTERNS,
    Radial,
    block_mask,
    computed_share,
    token_mask,
)

CPU = torch.device("cpu")
FINE = Radial(block=4)
GRID = (12, 4, 8)
"""8 blocks of 4 tokens in a frame."""


def frames_of(pattern: Radial, grid: tuple[int, int, int]) -> torch.Tensor:
    """[T, T, n, n]: which blocks of a frame see which of another, blocks that divide frames."""
    per_frame = math.prod(grid[1:]) // pattern.block
    blocks = pattern.blocks(grid, 0)
    return blocks.unflatten(0, (-1, per_frame)).unflatten(2, (-1, per_frame)).transpose(1, 2)


# The pattern ----------------------------------------------------------------------------------


def test_a_frame_sees_itself_its_neighbours_and_the_first_one_wholly() -> None:
    seen = frames_of(FINE, GRID)
    for i in range(12):
        for j in {0, max(0, i - 1), i, min(11, i + 1)}:
            assert seen[i, j].all()


def test_the_window_halves_as_the_distance_doubles() -> None:
    seen = frames_of(Radial(window=1, block=4), GRID)
    reach = torch.arange(8)
    distance = (reach[:, None] - reach).abs()
    for frames, blocks in {2: 4, 3: 4, 4: 2, 7: 2, 8: 1, 10: 1}.items():
        assert seen[11, 11 - frames].equal(distance <= blocks)
        assert seen[11 - frames, 11].equal(distance <= blocks)


def test_a_narrower_window_halves_the_same() -> None:
    seen = frames_of(Radial(window=0.5, block=4), GRID)
    assert [int(seen[11, 11 - d, 3].sum()) for d in (2, 4)] == [5, 3]


def test_where_a_window_would_be_narrower_than_a_block_distances_are_left_out() -> None:
    # Half a window is 32 / 2^3 * 0.5 = 2 tokens at distances from 8 on: half a block.
    seen = frames_of(Radial(window=0.5, block=4), GRID)
    assert {d: bool(seen[11, 11 - d].any()) for d in (8, 9, 10)} == {8: True, 9: False, 10: True}


def test_text_sees_everything_and_is_seen_by_everything() -> None:
    blocks = FINE.blocks(GRID, text=6)
    assert blocks.shape == (98, 98)
    assert blocks[96:].all() and blocks[:, 96:].all()
    assert blocks[:96, :96].equal(FINE.blocks(GRID, text=0))
    # A block that holds the last of the video and the first of the text counts as text.
    uneven = Radial(block=5).blocks(GRID, text=6)
    assert uneven[76:].all() and uneven[:, 76:].all()
    assert not uneven[75].all()


def test_few_frames_are_dense() -> None:
    assert computed_share(Radial(), (2, 32, 32), 0) == 1


def test_the_share_falls_as_clips_grow_and_is_what_is_computed() -> None:
    shares = [computed_share(Radial(), (frames, 30, 52), 0) for frames in (3, 11, 21, 41)]
    assert shares == sorted(shares, reverse=True)
    share = computed_share(FINE, GRID, 4)  # whole blocks of text
    assert share == pytest.approx(1 - block_mask(FINE, GRID, 4, CPU).sparsity() / 100)
    assert share == pytest.approx(float(token_mask(FINE, GRID, 4, CPU).float().mean()))


@pytest.mark.parametrize(
    ("grid", "text", "share"),
    [((33, 45, 80), 60, 0.27), ((21, 30, 52), 0, 0.34), ((13, 30, 45), 226, 0.50)],
)
def test_the_share_of_the_released_sizes(
    grid: tuple[int, int, int], text: int, share: float
) -> None:
    # HunyuanVideo 720 x 1280 x 129, Wan 480 x 832 x 81, CogVideoX 480 x 720 x 49.
    assert computed_share(Radial(), grid, text) == pytest.approx(share, abs=0.01)


def test_a_mask_is_made_once_for_a_shape() -> None:
    assert block_mask(Radial(), GRID, 6, CPU) is block_mask(Radial(), GRID, 6, CPU)
    assert block_mask(Radial(), GRID, 6, CPU) is not block_mask(Radial(), GRID, 7, CPU)


def test_a_mask_that_is_made_in_inference_mode_serves_gradients_as_well() -> None:
    with torch.inference_mode():
        mask = token_mask(Radial(), GRID, 11, CPU)
        blocks = block_mask(Radial(), GRID, 11, CPU)
    q = torch.randn(1, len(mask), 1, 4, requires_grad=True)
    kernels._sdpa(q, q, q, mask).sum().backward()
    assert q.grad is not None
    assert not blocks.kv_indices.is_inference()


# What is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", [0, 4, 7])
def test_flex_attention_gets_the_pattern_of_the_reference(text: int) -> None:
    """Block by block as FlexAttention reads it, without compiling it."""
    mask = block_mask(FINE, GRID, text, CPU)
    assert mask.to_dense()[0, 0].bool().equal(FINE.blocks(GRID, text))
    tokens = math.prod(GRID) + text
    assert mask.seq_lengths == (tokens, tokens)
    # Whole blocks are computed without a look at their pairs, so none may reach past the end.
    full = sum(int(n) for n in mask.full_kv_num_blocks[0, 0])
    cut = sum(int(n) for n in mask.kv_num_blocks[0, 0])
    assert full + cut == int(FINE.blocks(GRID, text).sum())
    assert (cut > 0) == (tokens % FINE.block > 0)


@pytest.mark.parametrize("text", [7, 8])
def test_compiled_flex_attention_computes_the_reference(text: int) -> None:
    run = KERNELS["flex"].load(CPU)
    pattern, grid = Radial(block=16), (8, 4, 8)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 8 * 32 + text, 2, 16, generator=generator)
    with torch.no_grad():
        found = run(q, k, v, block_mask(pattern, grid, text, CPU))
    expected = kernels._sdpa(q, k, v, token_mask(pattern, grid, text, CPU))
    dense = kernels._sdpa(q, k, v, None)
    assert (found - expected).abs().max() < 1e-5
    assert (dense - expected).abs().max() > 0.1


def test_flex_attention_of_eight_tokens_is_right() -> None:
    """And with 8 more than a multiple of 16, of which code that torch makes for a CPU is not."""
    run = KERNELS["flex"].load(CPU)
    for tokens in (8, 24):
        q, k, v = torch.randn(3, 1, tokens, 2, 16, generator=torch.Generator().manual_seed(0))
        mask = block_mask(Radial(), (tokens, 1, 1), 0, CPU)
        for chosen in (None, mask):
            expected = kernels._sdpa(q, k, v, None)
            assert (run(q, k, v, chosen) - expected).abs().max() < 1e-5


def test_compiled_code_around_flex_attention_leaves_it_alone() -> None:
    """As a part of it, torch could not compile FlexAttention of what is computed before."""
    run = KERNELS["flex"].load(CPU)
    mask = block_mask(Radial(block=16), (8, 4, 8), 0, CPU)

    def block(x: torch.Tensor) -> torch.Tensor:
        q = torch.stack((x, -x), dim=-1).flatten(-2)
        return run(q, q, q, mask).sin()

    x = torch.randn(1, 256, 2, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (torch.compile(block)(x) - block(x)).abs().max() < 1e-5


def longer(made: Case, frames: int = 8) -> Case:
    """One sample of a text-to-video case, with frames far enough apart to leave some out."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, made.x.shape[1], frames, 8, 8, generator=generator)
    return replace(made, x=x, condition=made.condition.select(0))


TEXT_TO_VIDEO = [n for n in NAMES if "i2v" not in n and FAMILIES[n].joint]


@pytest.mark.parametrize("name", TEXT_TO_VIDEO)
def test_every_family_computes_the_pattern(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers' processors do when their video tokens get the pattern's mask."""
    made = longer(case(name))
    spec, (frames, height, width) = made.model.latent_spec, made.x.shape[2:]
    grid = (frames // spec.patch_t, height // spec.patch, width // spec.patch)
    text = 0 if name.startswith("wan") else made.condition.text.shape[1]
    mask = token_mask(FINE, grid, text, CPU)
    if name.startswith("cogvideox"):  # whose text comes first in diffusers
        order = torch.arange(len(mask)).roll(text)
        mask = mask[order][:, order]
    plain = torch.nn.functional.scaled_dot_product_attention

    def masked(*args: Any, **options: Any) -> torch.Tensor:
        keys = options["key"] if "key" in options else args[1]
        if keys.shape[2] == len(mask):  # not the text's own refiner, nor Wan's cross-attention
            options["attn_mask"] = mask
        return plain(*args, **options)

    dense = made.velocities(made.model)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
        expected = made.velocities(made.model)
    with attention(made.model, "math", FINE):
        found = made.velocities(made.model)
    assert (found - expected).abs().max() < 1e-5
    assert (dense - expected).abs().max() > 1e-3


def test_a_unet_has_no_pattern() -> None:
    made = case("svd")
    before = made.model.module.mid_block.attentions[0].transformer_blocks[0].attn1.processor  # type: ignore
    with pytest.raises(AccVideoError, match="within frames and along time.*use dense attention"):
        with attention(made.model, "sdpa", "radial"):
            pass
    after = made.model.module.mid_block.attentions[0].transformer_blocks[0].attn1.processor  # type: ignore
    assert after is before


@pytest.mark.parametrize("name", ["hunyuan_video", "wan_t2v", "cogvideox_5b"])
def test_a_pattern_that_leaves_nothing_out_is_dense(name: str) -> None:
    made = longer(case(name), frames=2)
    expected = made.velocities(made.model)
    for pattern in ("dense", "radial"):
        with attention(made.model, "sdpa", pattern):
            assert (made.velocities(made.model) - expected).abs().max() < 1e-5


def test_cross_attention_stays_dense() -> None:
    image, text = [], []
    made = case("wan_i2v")
    with attention(made.model, "math", "radial"):
        attend = attend_of(made)
        dense, pattern = attend.other, attend.run
        assert pattern is dense is attend.biased
        attend.other = lambda q, k, v, mask: image.append(mask) or dense(q, k, v, mask)
        attend.biased = lambda q, k, v, mask: text.append(mask.shape) or dense(q, k, v, mask)
        made.velocities(made.model)
    assert image == [None] * 2 * 3  # questions, blocks
    assert len(text) == 2 * 3 and all(shape[:3] == (1, 1, 1) for shape in text)


def test_samples_of_different_lengths_have_patterns_of_their_own() -> None:
    made = longer(case("hunyuan_video"))
    generator = torch.Generator().manual_seed(7)
    text = torch.randn(3, 5, made.condition.text.shape[2], generator=generator)
    assert made.condition.pooled is not None
    condition = replace(
        made.condition,
        text=text,
        mask=torch.arange(5) < torch.tensor([5, 3, 3])[:, None],
        pooled=made.condition.pooled.expand(3, -1),
    )
    x = torch.randn(3, *made.x.shape[1:], generator=generator)
    with attention(made.model, "math", FINE):
        together = made.model.velocity(x, 0.4, condition)
        for i in range(3):
            alone = made.model.velocity(x[i : i + 1], 0.4, condition.select(i))
            assert (together[i : i + 1] - alone).abs().max() < 1e-5


def attend_of(made: Case) -> Any:
    """Of the model's blocks, inside `attention`."""
    network: Any = made.model.module
    return network.blocks[0].attn1.processor.attend


# Refusals -------------------------------------------------------------------------------------


def test_an_unknown_pattern_names_those_there_are() -> None:
    with pytest.raises(AccVideoError, match="no attention 'tile'; choose dense or radial"):
        with attention(case("wan_t2v").model, sparse="tile"):
            pass
    assert list(PATTERNS) == ["dense", "radial"]


def test_auto_computes_patterns_by_flex_attention() -> None:
    made = case("wan_t2v")
    with attention(made.model, "auto", "radial"):
        attend = attend_of(made)
        assert attend.kernel.name == "flex"
        assert not attend.measured


def test_flex_attention_that_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(AccVideoError, match="no C.. compiler"):
        with attention(case("wan_t2v").model, "auto", "radial"):
            pass


def test_a_kernel_without_masks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"cpu": kernels.Limits()}
    monkeypatch.setitem(KERNELS, "flash2", replace(KERNELS["flash2"], limits=limits))
    with pytest.raises(AccVideoError, match="'flash2' takes no mask; choose sdpa, flash or math"):
        with attention(case("wan_t2v").model, "flash2", "radial"):
            pass


def test_a_network_that_is_asked_past_the_model_is_refused() -> None:
    made = case("wan_t2v")
    other = replace(made.model)
    with attention(made.model, "math", "radial"):
        with pytest.raises(AccVideoError, match="another VideoModel"):
            other.velocity(made.x, 0.4, made.condition)
    assert module.PATTERNS is sparse.PATTERNS

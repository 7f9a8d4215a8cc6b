"""Condition and Prompt: joining, trimming and picking lose nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch

from accvideo_core.conditioning import Condition, LatePrompt, Prompt, encoded, text_id
from accvideo_core.errors import AccVideoError


def make(length: int, valid: int | None = None, seed: int = 0, batch: int = 1) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length)[None].expand(batch, -1) < (valid or length)
    return Condition(
        text=torch.randn(batch, length, 3, generator=generator),
        mask=mask,
        pooled=torch.randn(batch, 2, generator=generator),
        guidance=torch.full((batch,), 6.0),
    )


def same(a: Condition, b: Condition) -> bool:
    x, y = a.tensors(), b.tensors()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_trim_drops_what_no_sample_uses():
    cond = make(8, valid=5)
    assert torch.equal(cond.trim().text, cond.text[:, :5])
    assert cond.trim().full_mask().all()


def test_trim_of_what_is_trimmed_is_the_same():
    ragged = Condition.cat([make(4), make(7)])
    assert ragged.trim() is ragged and make(4).trim().full_mask().shape == (1, 4)


def test_a_mask_that_masks_nothing_is_dropped_and_another_is_kept():
    cond = make(8, valid=5).unmasked()
    assert cond.mask is None and cond.text.shape[1] == 5
    assert cond.unmasked().text is cond.text and cond.full_mask().all()
    ragged = Condition.cat([make(4), make(7)])
    assert ragged.unmasked() is ragged
    # Not one valid token: the network is shown one, and told not to look.
    none = Condition(torch.ones(1, 3, 2), mask=torch.zeros(1, 3, dtype=torch.bool)).unmasked()
    assert none.text.shape[1] == 1 and none.mask is not None and not none.mask.any()


def test_split_undoes_cat_for_texts_of_different_length():
    parts = [make(4, seed=1), make(7, seed=2), make(2, seed=3)]
    joined = Condition.cat(parts)
    assert joined.text.shape == (3, 7, 3) and joined.full_mask().sum(1).tolist() == [4, 7, 2]
    assert joined.text[0, 4:].abs().max() == 0
    assert all(same(a, b) for a, b in zip(parts, joined.split(), strict=True))


def test_cat_gives_a_mask_to_parts_without_one():
    bare = Condition(torch.ones(1, 2, 3))
    joined = Condition.cat([bare, Condition(torch.ones(1, 4, 3))])
    assert joined.full_mask().tolist() == [[True, True, False, False], [True] * 4]


def test_select_takes_numbers_slices_and_lists():
    cond = make(4, batch=3)
    assert torch.equal(cond.select(1).text, cond.text[1:2])
    assert torch.equal(cond.select(slice(0, 2)).text, cond.text[:2])
    assert torch.equal(cond.select([2, 0, 2]).pooled, cond.pooled[[2, 0, 2]])


def test_to_keeps_masks_bool_and_guidance_exact():
    moved = make(4).to("cpu", torch.bfloat16)
    assert moved.text.dtype == moved.pooled.dtype == torch.bfloat16
    assert moved.mask.dtype == torch.bool and moved.guidance.dtype == torch.float32


def test_with_guidance_leaves_the_original_alone():
    cond = make(4)
    assert cond.with_guidance(1.5).guidance.tolist() == [1.5] and cond.guidance.tolist() == [6.0]
    assert cond.with_guidance(None) is cond


def test_fingerprint_sees_values_not_padding():
    short, padded = make(4, seed=5), Condition.cat([make(4, seed=5), make(9)]).select(0)
    assert short.fingerprint() == padded.fingerprint()
    assert short.fingerprint() != make(4, seed=6).fingerprint()
    assert short.fingerprint() != short.with_guidance(1.0).fingerprint()


def test_agrees_with_the_same_input_on_other_hardware_alone():
    cond = make(4)
    rounded = cond.to("cpu", torch.bfloat16)
    assert rounded.agrees_with(cond) and cond.agrees_with(rounded)
    others = (make(4, seed=1), make(5), cond.with_guidance(1.0), Condition(cond.text))
    assert not any(other.agrees_with(cond) or cond.agrees_with(other) for other in others)


def test_prompt_id_follows_from_text_or_else_from_values():
    assert Prompt.of("a cat", make(3)).id == Prompt.of("a cat", make(5)).id
    assert Prompt.of("a cat", make(3)).id != Prompt.of("a dog", make(3)).id
    assert Prompt.of("", make(3, seed=1)).id != Prompt.of("", make(3, seed=2)).id
    assert Prompt.of("a cat", make(6, valid=4)).condition.text.shape[1] == 4


def test_errors():
    with pytest.raises(AccVideoError, match=r"text has shape \(2, 3\)"):
        Condition(torch.ones(2, 3))
    with pytest.raises(AccVideoError, match="pooled holds 2 samples, text holds 1"):
        Condition(torch.ones(1, 2, 3), pooled=torch.ones(2, 3))
    with pytest.raises(AccVideoError, match="no prompts"):
        Condition.cat([])
    with pytest.raises(AccVideoError, match="different models"):
        Condition.cat([make(3), Condition(torch.ones(1, 3, 3))])


def test_late_prompts_are_encoded_at_their_turn_and_not_before():
    made: list[str] = []

    def encode(prompts: Iterable[LatePrompt]) -> Iterator[Prompt]:
        for prompt in prompts:
            made.append(prompt.text)
            yield Prompt(prompt.id, prompt.text, make(3, seed=int(prompt.text)))

    late = [LatePrompt(text_id(f"{i}"), f"{i}", 6.0, encode) for i in range(4)]
    assert [prompt.id for prompt in late] == [Prompt.of(f"{i}", make(3)).id for i in range(4)]
    assert late[1].guidance == 6.0 and made == []
    assert same(late[1].condition, make(3, seed=1)) and made == ["1"]

    there = Prompt.of("there", make(2))
    each = encoded([late[0], late[1], there, late[2]])
    assert made == ["1"]
    assert next(each).id == late[0].id and made == ["1", "0"]
    rest = list(each)
    assert [prompt.id for prompt in rest] == [late[1].id, there.id, late[2].id]
    assert rest[1] is there and same(rest[2].condition, make(3, seed=2))
    assert made == ["1", "0", "1", "2"]

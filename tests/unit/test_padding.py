"""A few tokens that stand for a text's padding: the same attention, with less to compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_families import Case, case
from torch.nn.functional import scaled_dot_product_attention

from accvideo_core.models.attention import attention
from accvideo_core.models.kernels import KERNELS, Limits
from accvideo_core.models.padding import padding_bias
from accvideo_core.models.wan import TEXT_TOKENS

CPU = torch.device("cpu")
WAN = ("wan_t2v", "wan_i2v", "wan22_t2v", "wan22_ti2v")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("valid", [0, 1, 20, 250])
def test_a_few_tokens_weigh_as_all(dtype: torch.dtype, valid: int) -> None:
    bias = padding_bias(valid, 512, dtype, CPU)
    assert bias is not None and bias.dtype == dtype
    assert valid < bias.shape[-1] <= valid + 5
    assert not bias[..., :valid].any()
    weight = float(bias[..., valid:].double().exp().sum())
    assert weight == pytest.approx(512 - valid, rel=1e-6)


def test_a_text_that_fills_half_of_the_tokens_keeps_them_all() -> None:
    assert padding_bias(255, 512, torch.float32, CPU) is None
    assert padding_bias(512, 512, torch.float32, CPU) is None
    assert padding_bias(600, 512, torch.float32, CPU) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_is_that_to_all_tokens(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 40, 16, generator=generator, dtype=dtype)
    k, v = torch.randn(2, 2, 3, 7, 16, generator=generator, dtype=dtype)
    rest = [torch.cat([x, x[:, :, -1:].expand(-1, -1, 60 - 7, -1)], dim=2) for x in (k, v)]
    expected = scaled_dot_product_attention(q.double(), *(x.double() for x in rest))
    bias = padding_bias(6, 60, dtype, CPU)  # the last of the 7 tokens is padding
    assert bias is not None
    length = bias.shape[-1]
    found = scaled_dot_product_attention(q, *(x[:, :, :length] for x in rest), attn_mask=bias)
    assert (found - expected).abs().max() < (1e-6 if dtype == torch.float64 else 2e-2)


def tokens_seen(network: Any, made: Case) -> list[int]:
    """How many of the text's tokens the first block makes keys of, filled as it is asked."""
    seen: list[int] = []

    def note(_module: Any, inputs: tuple[torch.Tensor], _output: torch.Tensor) -> None:
        seen.append(inputs[0].shape[1])

    made.model.family.blocks(network)[0].attn2.to_k.register_forward_hook(note)
    return seen


@pytest.mark.parametrize("name", WAN)
def test_wan_projects_the_tokens_of_the_prompt_and_few_more(name: str) -> None:
    made = case(name)
    made.model.module.double()
    network = made.model.expert(0.4)
    seen = tokens_seen(network, made)
    expected = made.model.velocity(made.x.double(), 0.4, made.condition)
    with attention(made.model):
        found = made.model.velocity(made.x.double(), 0.4, made.condition)
    prompt = made.condition.text.shape[1]
    assert seen[0] == TEXT_TOKENS and prompt < seen[1] <= prompt + 4
    assert (found - expected).abs().max() < 1e-7 * expected.abs().max()


def test_prompts_of_two_lengths_keep_the_longer_one() -> None:
    made = case("wan_t2v")
    long = torch.randn(2, 30, made.condition.text.shape[2])
    mask = torch.arange(30) < torch.tensor([[30], [4]])
    condition = replace(made.condition, text=long, mask=mask)
    expected = made.model.velocity(made.x, 0.4, condition)
    with attention(made.model):
        found = made.model.velocity(made.x, 0.4, condition)
        alone = made.model.velocity(made.x[1:], 0.4, condition.select(1))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found[1:] - alone).abs().max() < 1e-5 * expected.abs().max()


def test_a_kernel_without_masks_attends_to_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case("wan_t2v")
    seen = tokens_seen(made.model.module, made)
    monkeypatch.setitem(KERNELS, "sdpa", replace(KERNELS["sdpa"], limits={"any": Limits()}))
    with attention(made.model, "sdpa"):
        made.model.velocity(made.x, 0.4, made.condition)
    assert seen == [TEXT_TOKENS]

"""Attention processors: from a block's tokens to queries, keys and values, and back.

They stand in for diffusers' own, compute the same (to 1e-6 in float32) with less copying, and leave
attention itself to an `Attend`. A table at the end says which one stands in for which.

Shapes: B batch, N video tokens, L text tokens, M tokens of either kind, H heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import AccVideoError
from .wan import TEXT_TOKENS as WAN_TEXT_TOKENS

if TYPE_CHECKING:
    from .attention import Attend

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines at N places, every number twice in a row: [N, D] or [1, N, 1, D]."""


class Processor:
    """What diffusers calls to compute an attention module; `attend` is its network's."""

    joins_text = False
    """Whether video and text attend to each other in one sequence."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    @property
    def _parallel_config(self) -> None:
        """diffusers' way to tell a processor that its sequence is divided."""

    @_parallel_config.setter
    def _parallel_config(self, _config: Any) -> None:
        raise AccVideoError(
            "a sequence cannot be divided among processes while an attention kernel is chosen; "
            "divide it before"
        )


class JointProcessor(Processor):
    """HunyuanVideo and CogVideoX: one sequence of the video's tokens, then the text's.

    diffusers has CogVideoX's text first. Attention does not depend on the order, and blocks of a
    sparse pattern had better begin with the video.
    """

    joins_text = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(video [B, N, H*D], text [B, L, H*D]) -> both after attention."""
        text = encoder_hidden_states.shape[1]
        if attn.add_q_proj is None:
            q, k, v = _projected(attn, torch.cat([hidden_states, encoder_hidden_states], dim=1))
        else:
            both = (_projected(attn, hidden_states), _projected_text(attn, encoder_hidden_states))
            q, k, v = (torch.cat(parts, dim=1) for parts in zip(*both, strict=True))
        q, k = _turned(q, k, image_rotary_emb)
        out = self.attend.to_all(q, k, v, text, attention_mask).flatten(2)
        if attn.to_add_out is not None:
            video = attn.to_out[1](attn.to_out[0](out[:, :-text]))
            return video, attn.to_add_out(out[:, -text:])
        if attn.to_out is not None:  # single-stream blocks of HunyuanVideo do it themselves
            out = attn.to_out[1](attn.to_out[0](out))
        return out[:, :-text], out[:, -text:]


class WanProcessor(Processor):
    """Wan: the video attends to itself, or to the text and, in some networks, to an image."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """[B, N, H*D] -> the same after attention."""
        others = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        sees_image = attn.add_k_proj is not None
        image = others[:, :-WAN_TEXT_TOKENS]
        others = others[:, -WAN_TEXT_TOKENS:] if sees_image else others
        sees_text = encoder_hidden_states is not None
        others = self.attend.of_text(others) if sees_text else others
        heads = (attn.heads, -1)
        # Norms go across heads here.
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads)
        k = attn.norm_k(attn.to_k(others)).unflatten(2, heads)
        v = attn.to_v(others).unflatten(2, heads)
        if sees_text:
            out = self.attend.to_text(q, k, v)
        else:
            q, k = _turned(q, k, rotary_emb)
            out = self.attend.to_all(q, k, v, 0, attention_mask)
        if sees_image:
            k = attn.norm_added_k(attn.add_k_proj(image)).unflatten(2, heads)
            out = out + self.attend.to_others(q, k, attn.add_v_proj(image).unflatten(2, heads))
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class PlainProcessor(Processor):
    """diffusers' basic transformer blocks: tokens attend to each other, or to some given ones."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, N, H*D] -> the same after attention."""
        q, k, v = _projected(attn, hidden_states, encoder_hidden_states)
        if encoder_hidden_states is None:
            out = self.attend.to_all(q, k, v, 0, attention_mask)
        else:
            out = self.attend.to_others(q, k, v)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


PROCESSORS: dict[str, type[Processor]] = {
    "HunyuanVideoAttnProcessor2_0": JointProcessor,
    "CogVideoXAttnProcessor2_0": JointProcessor,
    "WanAttnProcessor": WanProcessor,
    "WanAttnProcessor2_0": WanProcessor,
    "AttnProcessor2_0": PlainProcessor,
}
"""diffusers' processor -> ours."""


def _projected(attn: Any, x: Tensor, others: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, M, H, D] of `x` [B, M, H*D], keys and values of it or of `others`."""
    heads, others = (attn.heads, -1), x if others is None else others
    q, k = attn.to_q(x).unflatten(2, heads), attn.to_k(others).unflatten(2, heads)
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    return q, k, attn.to_v(others).unflatten(2, heads)


def _projected_text(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the text's own projections."""
    heads = (attn.heads, -1)
    q, k = attn.add_q_proj(x).unflatten(2, heads), attn.add_k_proj(x).unflatten(2, heads)
    q = q if attn.norm_added_q is None else attn.norm_added_q(q)
    k = k if attn.norm_added_k is None else attn.norm_added_k(k)
    return q, k, attn.add_v_proj(x).unflatten(2, heads)


def _turned(q: Tensor, k: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, M, H, D], of which the first N tokens are turned by their places.

    As diffusers does in at least float32: numbers 2i and 2i + 1 of a head are a complex number's.
    What comes in is overwritten.
    """
    if rotary is None:
        return q, k
    wide = torch.promote_types(q.dtype, torch.float32)
    size = q.shape[-1]
    cos = rotary[0].to(q.device, wide).reshape(-1, 1, size)[..., 0::2]
    sin = rotary[1].to(q.device, wide).reshape(-1, 1, size)[..., 0::2]
    # Compilers fuse real numbers, and Apple's devices know no others; else complex ones are
    # several times as fast.
    if torch.compiler.is_compiling() or q.device.type not in ("cpu", "cuda"):
        return _turn(q, cos, sin), _turn(k, cos, sin)
    factors = torch.complex(cos, sin)
    return _turn_complex(q, factors), _turn_complex(k, factors)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`cos`, `sin` [N, 1, D/2]."""
    tokens = cos.shape[0]
    even, odd = x[:, :tokens].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat([turned.flatten(-2).to(x.dtype), x[:, tokens:]], dim=1)


def _turn_complex(x: Tensor, factors: Tensor) -> Tensor:
    """`factors` [N, 1, D/2]; in place."""
    tokens = x[:, : factors.shape[0]]
    wide = tokens.to(factors.dtype.to_real())
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(factors)
    if wide is not tokens:
        tokens.copy_(wide)
    return x

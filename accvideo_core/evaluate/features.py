"""What the blocks of a network see at the key times, reduced to colours and figures.

The heads of adversarial training look at the frozen network's features, at t = 0 at another block
than before (AccVideo, Sec. 4.3 and Figure 5). Here the tokens of a block are coloured by their
three principal components: what has one colour looks alike to the network.

Shapes: K key times, C channels, T latent frames, H, W latent size; h, w token grid; D token width;
F frames shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..conditioning import Condition
from ..errors import AccVideoError
from ..flow import Times, euler_states, key_indices
from ..guidance import Guided
from ..models.video_model import VideoModel
from ..monitor import Monitor, Progress, silent

_PCA_TOKENS = 1024
"""At least so many tokens, evenly over the clip, give the principal components, if there are."""
_BLOCKS = 6
"""Blocks shown where none are named, beside those that the heads look at."""
_TINY = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class KeyStates:
    """One clip on its way from noise to data."""

    times: Times
    """K falling times."""
    latents: Tensor
    """[K, C, T, H, W] in model space, float32."""
    cond: Condition
    """Of the one clip."""


@dataclass(frozen=True, slots=True, eq=False)
class FeatureMap:
    """One block's tokens at one time."""

    t: float
    block: int
    """From 0."""
    tapped: bool
    """Whether the heads look at this block at this time, by the paper's choice."""
    colours: Tensor
    """[F, h, w, 3] in [0, 1], of F latent frames."""
    share: float
    """Of the tokens' variance, what the three components hold."""
    contrast: float
    """Geary's C of the tokens, see `neighbour_contrast`."""


def sample_states(
    asked: VideoModel | Guided,
    cond: Condition,
    noise: Tensor,
    grid: Times,
    m: int,
    monitor: Monitor = silent,
) -> KeyStates:
    """The states of one clip at the m key times after the noise.

    Args:
        asked: the teacher, under its guidance where it has any.
        cond: of the clip.
        noise: [1, C, T, H, W].
        grid: the teacher's falling times.
        monitor: called after every step with the stage "sample"; may raise.
    """
    kept = key_indices(len(grid) - 1, m)[1:]
    states = []
    # Plain tensors come out even inside ComfyUI's inference mode.
    with torch.inference_mode(False), torch.no_grad(), asked.asking(cond) as velocity:
        start = noise.clone().to(asked.device)
        for i, x in enumerate(euler_states(velocity, start, grid)):
            if i in kept:
                states.append(x.float().cpu())
            if i:
                monitor(Progress("sample", i, len(grid) - 1))
    return KeyStates(tuple(grid[i] for i in kept), torch.cat(states), cond)


def blocks_of(text: str) -> tuple[int, ...] | None:
    """Blocks as people write them, "19, 39, 59"; None for an empty text."""
    if not text.strip():
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise AccVideoError(
            f"blocks {text!r} are not numbers with commas between them; write them like 19,39,59"
        ) from None


def shown_blocks(model: VideoModel, times: Sequence[float]) -> tuple[int, ...]:
    """Some blocks, evenly over the depth, and those that the heads look at."""
    depth = model.num_blocks
    spread = torch.linspace(0, depth - 1, min(_BLOCKS, depth)).round().int().tolist()
    return tuple(sorted({*spread, *(model.feature_block(t) for t in times)}))


def feature_maps(
    model: VideoModel,
    states: KeyStates,
    blocks: Sequence[int] | None = None,
    *,
    frames: int = 1,
    monitor: Monitor = silent,
) -> list[FeatureMap]:
    """The maps of every key time, and for each of every block.

    Features are taken as the heads get them: at the state's own time, with the prompt, without
    classifier-free guidance. They are reduced time by time, so that few are held.

    Args:
        blocks: from 0; None takes `shown_blocks`.
        frames: latent frames to show, evenly over the clip.
        monitor: called after every key time with the stage "features"; may raise.
    """
    chosen = shown_blocks(model, states.times) if blocks is None else tuple(blocks)
    if len(set(chosen)) < len(chosen):
        raise AccVideoError(f"blocks {list(chosen)} name one twice; name every block once")
    maps = []
    for number, (t, x) in enumerate(zip(states.times, states.latents, strict=True), start=1):
        with torch.inference_mode(False), torch.no_grad():
            found = model.features(x[None].clone(), t, states.cond, chosen)
        for block, tokens in zip(chosen, found, strict=True):
            maps.append(_map(t, block, block == model.feature_block(t), tokens[0], frames))
        monitor(Progress("features", number, len(states.times)))
    return maps


def principal_colours(tokens: Tensor) -> tuple[Tensor, float]:
    """The first three principal components of tokens [..., D] as red, green and blue [..., 3], each
    from its 2 % to its 98 % quantile; and their share of the variance.

    A component's sign says nothing; it is the one in which its largest weight is positive.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    flat = flat - flat.mean(dim=0)
    some = flat[:: max(1, len(flat) // _PCA_TOKENS)]
    _, scale, axes = torch.linalg.svd(some, full_matrices=False)
    axes = axes[:3]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    low, high = (some @ axes.T).quantile(torch.tensor([0.02, 0.98]), dim=0)
    colours = ((flat @ axes.T - low) / (high - low).clamp(min=_TINY)).clamp(0, 1)
    # A component that only rounding makes is no picture.
    colours = torch.where(scale[:3] > 1e-4 * scale[0].clamp(min=_TINY), colours, 0.5)
    colours = functional.pad(colours, (0, 3 - len(axes)), value=0.5)
    share = scale[:3].square().sum() / scale.square().sum().clamp(min=_TINY)
    return colours.reshape(*tokens.shape[:-1], 3), float(share)


def neighbour_contrast(tokens: Tensor) -> float:
    """How unlike neighbouring tokens [T, h, w, D] are: 0 smooth, 1 as any two tokens of a frame.

    Geary's C (1954) over the four neighbours within a frame, summed over channels and frames: the
    share of fine detail in a map. Above 1, neighbours differ more than distant tokens.
    """
    _, h, w, _ = tokens.shape
    pairs = h * (w - 1) + w * (h - 1)
    if not pairs:
        return 0.0
    squares = tokens.diff(dim=1).square().sum() + tokens.diff(dim=2).square().sum()
    centred = tokens - tokens.mean(dim=(1, 2), keepdim=True)
    variance = centred.square().sum() / (h * w - 1)
    return float(squares / (2 * pairs * variance.clamp(min=_TINY)))


def _map(t: float, block: int, tapped: bool, tokens: Tensor, frames: int) -> FeatureMap:
    """Of tokens [T, h, w, D], whose channels count alike, as they do for the heads."""
    x = tokens.float().cpu()
    x = x / x.std(dim=(0, 1, 2)).clamp(min=_TINY)
    colours, share = principal_colours(x)
    count = min(frames, len(x))
    chosen = [int((i + 0.5) * len(x) / count) for i in range(count)]
    return FeatureMap(t, block, tapped, colours[chosen], share, neighbour_contrast(x))

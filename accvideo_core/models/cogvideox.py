"""CogVideoX (text to video): the families' entries, over diffusers' CogVideoXTransformer3DModel.

The networks are variance preserving: they see x = alpha x_0 + s eps at one of 1000 steps, the last
of which is pure noise (zero terminal SNR), and predict v = alpha eps - s x_0. Times here are flow
times t = s / (alpha + s), so the network's x is (alpha + s) x_t. Along these times Euler's method
is the deterministic DDIM update of diffusers' CogVideoXDDIMScheduler, exactly. The 5B releases name
CogVideoXDPMScheduler, a stochastic multistep solver of the same process, instead: trajectories
recorded here are those of the ODE, which a student can be regressed on.

Shapes: B batch, C channels, T latent frames, H, W; L text tokens, D token width; h, w token grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..conditioning import Condition
from ..errors import AccVideoError
from ..flow import Times, expand_time, flow_from_vp_v, vp_levels
from ..guidance import Cfg
from ..latents import LatentSpec
from .keys.cogvideox import key_table
from .steady import once
from .video_model import Family

TRAIN_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.0120
TEXT_TOKENS = 226
ZERO_SNR_SIGMA = (1 / 4.8973451890853435e-08 - 1) ** 0.5
"""ComfyUI's stand-in for the infinite sigma of the last step, where it gives alpha^2 this value."""


@cache
def vp_times(shift: float) -> Tensor:
    """Flow times of the network's steps 0 ... 999, rising to exactly 1; float64 [1000].

    Scaled-linear betas, the SNR divided by `shift` (diffusers' snr_shift_scale), then alpha moved
    and scaled so that the last one is 0 (arXiv 2305.08891, Algorithm 1).
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    root = (alpha_bar / (shift + (1 - shift) * alpha_bar)).sqrt()
    alpha = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    s = (1 - alpha**2).sqrt()
    return s / (alpha + s)


def grid(steps: int, shift: float) -> Times:
    """The times of diffusers' trailing timesteps, then 0; `shift` is snr_shift_scale."""
    if not 1 <= steps <= TRAIN_STEPS:
        raise AccVideoError(f"steps is {steps}, but CogVideoX has 1 to {TRAIN_STEPS} steps")
    if not shift > 0:
        raise AccVideoError(f"shift is {shift}, but it must be positive (CogVideoX uses 3 or 1)")
    # Numpy's own spacing and rounding, as diffusers'; it may give one step too many.
    indices = np.round(np.arange(TRAIN_STEPS, 0, -TRAIN_STEPS / steps))[:steps].astype(int) - 1
    times = vp_times(shift)
    return (*(float(times[i]) for i in indices), 0.0)


def network_time(t: Tensor, times: Tensor) -> Tensor:
    """Flow times [B] float32 -> the network's step, fractional between two of its `vp_times` [B].

    A time of the table gives its own integer exactly, because the table is rounded as `t` is.
    """
    times = _like(times, t)
    below = (torch.searchsorted(times, t.contiguous(), right=True) - 1).clamp(0, TRAIN_STEPS - 2)
    fraction = (t - times[below]) / (times[below + 1] - times[below])
    return below + fraction.clamp(0, 1)


def _like(times: Tensor, t: Tensor) -> Tensor:
    return times.to(t.dtype).to(t.device)  # not every device has float64


def _network_times(_module: Any, shift: float, t: Tensor) -> Tensor:
    """`vp_times` as numbers like `t`, where `t` is."""
    return _like(vp_times(shift), t)


def to_sigma(t: float) -> float:
    """Time -> sigma = s / alpha, as ComfyUI counts noise for CogVideoX.

    Its own euler takes the state for x_0 + sigma eps, which CogVideoX's is not there; the sampler
    that goes with these sigmas is DDIM on the unscaled state (node VOIDSampler).
    """
    return ZERO_SNR_SIGMA if t >= 1 else min(t / (1 - t), ZERO_SNR_SIGMA)


def from_sigma(sigma: float) -> float:
    """The inverse of `to_sigma`, also after rounding to float32."""
    return 1.0 if sigma >= ZERO_SNR_SIGMA * (1 - 1e-6) else sigma / (1 + sigma)


def _latent_spec(
    scale: float, transformer: Mapping[str, Any], vae: Mapping[str, Any]
) -> LatentSpec:
    return LatentSpec(
        channels=transformer.get("in_channels", 16),
        stride_t=vae.get("temporal_compression_ratio", 4),
        stride_hw=2 ** (len(vae.get("block_out_channels", range(4))) - 1),
        scale=(vae.get("scaling_factor", scale),),
        patch=transformer.get("patch_size", 2),
        patch_t=transformer.get("patch_size_t") or 1,
    )


def _forward(shift: float, module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """v [B, C, T, H, W]. The padding of the text is attended to, so it has no mask."""
    alpha, s = vp_levels(t)
    x = (expand_time(alpha + s, x_t) * x_t).to(x_t.dtype)
    v = module(
        hidden_states=x.transpose(1, 2),
        encoder_hidden_states=cond.text,
        timestep=network_time(t, once(module, _network_times, shift, t)),
        image_rotary_emb=once(module, _rotary, x_t),
        return_dict=False,
    )[0]
    return flow_from_vp_v(x_t, v.transpose(1, 2), t).to(x_t.dtype)


def _rotary(module: Any, x_t: Tensor) -> Any:
    """Rotary embeddings (cos, sin) of the tokens of `x_t`, or None for a network with sinusoids.

    Without time patches, positions are stretched over the trained size; with them, they count.
    """
    config = module.config
    if not config.use_rotary_positional_embeddings:
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = _token_grid(config, tuple(x_t.shape))
    trained = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    if config.patch_size_t is None:
        positions: dict[str, Any] = {"crops_coords": _fit((height, width), trained)}
    else:
        size = max(height, trained[0]), max(width, trained[1])
        positions = {"crops_coords": None, "grid_type": "slice", "max_size": size}
    return get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim,
        grid_size=(height, width),
        temporal_size=frames,
        device=x_t.device,
        **positions,
    )


def _fit(size: tuple[int, int], into: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Corners (top, left), (bottom, right) of the largest centred box of `size`'s shape."""
    if size[0] * into[1] > into[0] * size[1]:
        box = into[0], round(into[0] / size[0] * size[1])
    else:
        box = round(into[1] / size[1] * size[0]), into[1]
    top, left = round((into[0] - box[0]) / 2), round((into[1] - box[1]) / 2)
    return (top, left), (top + box[0], left + box[1])


def _token_grid(config: Any, shape: tuple[int, ...]) -> tuple[int, int, int]:
    frames, height, width = shape[2:]
    patch = config.patch_size
    return frames // (config.patch_size_t or 1), height // patch, width // patch


def _blocks(module: Any) -> list[nn.Module]:
    return [*module.transformer_blocks]


def _tail(module: Any) -> nn.Module:
    return module.norm_final


def _tokens(module: Any, output: Any, shape: tuple[int, ...]) -> Tensor:
    """A block returns (video tokens [B, T*h*w, D], text tokens)."""
    return output[0].unflatten(1, _token_grid(module.config, shape))


def _encode(pipeline: Any, texts: Sequence[str], device: torch.device) -> Condition:
    """Text encoder of a diffusers CogVideoXPipeline -> float32 Condition, padding and all."""
    text, _ = pipeline.encode_prompt(
        prompt=list(texts), do_classifier_free_guidance=False, device=device
    )
    return Condition(text=text.float())


def _from_native(text: Tensor, _extra: Mapping[str, Any], _spec: LatentSpec) -> Condition:
    """ComfyUI's CogVideoX conditioning [B, 226, D] -> float32 Condition on the CPU."""
    if text.shape[1] != TEXT_TOKENS:
        raise AccVideoError(
            f"this CONDITIONING has {text.shape[1]} text tokens, but CogVideoX reads {TEXT_TOKENS} "
            "with the padding; encode the prompt with a CLIPLoader of type cogvideox, and shorten "
            "it if it is longer than that"
        )
    return Condition(text=text.cpu().float())


def _is_text_to_video(config: Mapping[str, Any]) -> bool:
    """Image to video and inpainting networks take more channels than they give."""
    return config.get("in_channels", 16) == config.get("out_channels", 16)


def _is_2b(config: Mapping[str, Any]) -> bool:
    return _is_text_to_video(config) and not config.get("use_rotary_positional_embeddings")


def _is_5b(config: Mapping[str, Any]) -> bool:
    rotary = bool(config.get("use_rotary_positional_embeddings"))
    return _is_text_to_video(config) and rotary and not config.get("patch_size_t")


def _is_1_5(config: Mapping[str, Any]) -> bool:
    return _is_text_to_video(config) and bool(config.get("patch_size_t"))


def _family(
    name: str, title: str, shift: float, scale: float, matches: Callable[[Mapping[str, Any]], bool]
) -> Family:
    """A CogVideoX of SNR shift `shift` whose VAE's latents are scaled by `scale`."""
    return Family(
        name=name,
        title=title,
        matches=matches,
        transformer_class="CogVideoXTransformer3DModel",
        pipeline_class="CogVideoXPipeline",
        grid=grid,
        shift=shift,
        steps=50,
        guidance=None,
        # Constant, as diffusers' pipeline has it; the releases' stochastic sampler raises it over
        # the steps (use_dynamic_cfg).
        cfg=Cfg(6.0),
        negative_prompt="",
        latent_spec=partial(_latent_spec, scale),
        forward=partial(_forward, shift),
        blocks=_blocks,
        tail=_tail,
        tokens=_tokens,
        tables=("patch_embed._get_positional_embeddings",),
        texts=("patch_embed.text_proj",),
        lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        key_table=key_table,
        encode=_encode,
        text_tokens=TEXT_TOKENS,
        from_native=_from_native,
        to_sigma=to_sigma,
        variance_preserving=True,
        from_sigma=from_sigma,
    )


COGVIDEOX_2B = _family("cogvideox_2b", "CogVideoX 2B", 3.0, 1.15258426, _is_2b)
COGVIDEOX_5B = _family("cogvideox_5b", "CogVideoX 5B", 1.0, 0.7, _is_5b)
COGVIDEOX_1_5 = _family("cogvideox_1_5", "CogVideoX 1.5 5B", 1.0, 0.7, _is_1_5)

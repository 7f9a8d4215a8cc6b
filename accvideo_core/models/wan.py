"""Wan 2.1 and 2.2: five entries over diffusers' WanTransformer3DModel.

Shapes: B batch, C channels, T latent frames, H, W; L text tokens, D token width; h, w token grid.

The time grid is the release's own (`get_sampling_sigmas` of its DPM++ solver): uniform from 1 to 0,
then shifted. The grid of UniPC, its other solver, lies within .001 of it before the shift: it
begins at .999, or, in diffusers (`flow_shift`), heads for .001.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..conditioning import Condition
from ..errors import AccVideoError
from ..flow import expand_time
from ..guidance import Cfg
from ..latents import LatentSpec
from . import context_parallel
from .keys.wan import key_table
from .video_model import Family
from .wan_release import NEGATIVE_PROMPT, SHAKY_CAMERA, VAES

if TYPE_CHECKING:
    from .vae import VideoVAE

TIMESTEPS = 1000.0  # the network counts time in thousandths
TEXT_TOKENS = 512
"""Wan attends to so many text tokens, rows of zeros among them, without a mask."""
MASK_CHANNELS = 4
"""Of a concatenated image: one for each of the 4 frames in a latent frame, 1 where it is given."""


# The network ----------------------------------------------------------------------------------


def _latent_spec(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentSpec:
    channels = transformer.get("out_channels", 16)
    mean, std, stride = VAES[channels]
    patch_t, patch, _ = transformer.get("patch_size", (1, 2, 2))
    return LatentSpec(
        channels=channels,
        stride_t=vae.get("scale_factor_temporal", 4),
        stride_hw=vae.get("scale_factor_spatial", stride),
        scale=tuple(1 / s for s in vae.get("latents_std", std)),
        shift=tuple(vae.get("latents_mean", mean)),
        patch=patch,
        patch_t=patch_t,
    )


def _is(inputs: int, outputs: int, clip: bool = False) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a configuration has these channels and does or does not take CLIP's image tokens."""

    def matches(config: Mapping[str, Any]) -> bool:
        # First-and-last-frame networks embed the places of two images' tokens.
        return (
            (config.get("in_channels", 16), config.get("out_channels", 16)) == (inputs, outputs)
            and (config.get("image_dim") is not None) == clip
            and config.get("pos_embed_seq_len") is None
        )

    return matches


def _exact_sinusoids(module: Any, args: tuple[Tensor], _output: Tensor) -> Tensor:
    """Of times [N], as the release computes them: phases go up to 1000, where diffusers' float32
    is 3e-5 off, and the velocity 5e-6.
    """
    half = module.num_channels // 2
    # Apple's devices have no float64.
    device = "cpu" if args[0].device.type == "mps" else args[0].device
    fractions = torch.arange(half, dtype=torch.float64, device=device) / half
    phases = args[0].to(device, torch.float64)[:, None] * 10000.0**-fractions
    return torch.cat([phases.cos(), phases.sin()], dim=-1).to(args[0].device, torch.float32)


def _forward(module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """The network's answer to what was filled; `t`, float32, may be [B, T*h*w]: per token."""
    config = module.config
    if cond.text.shape[-1] != config.text_dim:
        raise AccVideoError(
            f"the prompt's text is {cond.text.shape[-1]} wide, but this Wan network takes "
            f"{config.text_dim}; encode it with UMT5-XXL (a CLIPLoader of type wan)"
        )
    sinusoids = module.condition_embedder.timesteps_proj
    handle = sinusoids.register_forward_hook(_exact_sinusoids)
    try:
        return module(
            hidden_states=x_t,
            timestep=t * TIMESTEPS,
            encoder_hidden_states=cond.text,
            encoder_hidden_states_image=None if config.image_dim is None else cond.image_tokens,
            return_dict=False,
        )[0]
    finally:
        handle.remove()


def _filled(cond: Condition) -> Condition:
    """With the rows of zeros that the network attends to; the mask tells them apart.

    Longer texts are cut, as the release's tokenizer cuts them.
    """
    if cond.mask is None and cond.text.shape[1] == TEXT_TOKENS:
        return cond
    mask, missing = cond.full_mask(), TEXT_TOKENS - cond.text.shape[1]
    text = cond.text.masked_fill(~mask.unsqueeze(-1), 0)
    text = nn.functional.pad(text, (0, 0, 0, missing))
    mask = nn.functional.pad(mask, (0, missing))
    return Condition(**{**cond.tensors(), "text": text, "mask": mask})


def _forward_i2v(module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """`cond.image` [B, 4 + C, T, H, W], mask and latents, is put beside the video's channels."""
    if cond.image is None:
        raise AccVideoError(
            "the prompt has no image, which this Wan image-to-video model starts from; encode it "
            "together with a start image of the video's size"
        )
    width = module.config.image_dim
    tokens = cond.image_tokens
    if width is not None and (tokens is None or tokens.shape[-1] != width):
        found = "none" if tokens is None else f"{tokens.shape[-1]} wide"
        raise AccVideoError(
            f"this Wan 2.1 image-to-video model takes image tokens {width} wide, and the prompt's "
            f"are {found}; encode the start image with CLIP ViT-H (clip_vision_h) too"
        )
    expected = (module.config.in_channels - x_t.shape[1], *x_t.shape[2:])
    _check_image(cond.image, expected)
    return _forward(module, torch.cat([x_t, cond.image], dim=1), t, cond)


def _forward_ti2v(module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """Text to video; or, with `cond.image` [B, C, T', H, W], on from T' given latent frames.

    The network sees the given frames clean, at time 0, whatever `x_t` holds there. Their velocity
    is (x_t - image) / t: a frame that is the image stays, one that starts as noise moves straight
    to the image and is the image at t = 0. So states, steps and losses need no special case.
    """
    if cond.image is None:
        return _forward(module, x_t, t, cond)
    given = cond.image.shape[2]
    _check_image(cond.image, (x_t.shape[1], min(given, x_t.shape[2]), *x_t.shape[3:]))
    _, patch_h, patch_w = module.config.patch_size
    times = t[:, None].repeat(1, x_t.shape[2])
    times[:, :given] = 0
    tokens = (x_t.shape[3] // patch_h) * (x_t.shape[4] // patch_w)
    x = torch.cat([cond.image, x_t[:, :, given:]], dim=2)
    v = _forward(module, x, times.repeat_interleave(tokens, dim=1), cond)
    rate = torch.where(t > 0, 1 / t, torch.zeros_like(t))
    v_given = expand_time(rate, x_t) * (x_t[:, :, :given] - cond.image)
    return torch.cat([v_given.to(v.dtype), v[:, :, given:]], dim=2)


def _check_image(image: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(image.shape[1:]) != expected:
        raise AccVideoError(
            f"the prompt's image has latents {list(image.shape[1:])}, but the video needs "
            f"{list(expected)}; encode the image for the video's own frames, height and width"
        )


def _blocks(module: Any) -> list[nn.Module]:
    return [*module.blocks]


def _tail(module: Any) -> nn.Module:
    return module.norm_out


def _tokens(module: Any, output: Any, shape: tuple[int, ...]) -> Tensor:
    """A block returns [B, T*h*w, D]."""
    grid = (n // p for n, p in zip(shape[2:], module.config.patch_size, strict=True))
    return output.unflatten(1, tuple(grid))


# Text and images ------------------------------------------------------------------------------


def _trimmed(text: Tensor) -> Condition:
    """[B, L, D] without the rows of zeros at the end, which every forward pass adds again."""
    text = text[:, :TEXT_TOKENS].float()
    filled = text.abs().amax(dim=-1) > 0
    mask = filled.flip(1).cumsum(1).flip(1) > 0
    return Condition(text=text, mask=mask).trim()


def _encode(pipeline: Any, texts: Sequence[str], device: torch.device) -> Condition:
    """UMT5 of a diffusers Wan pipeline, which cleans prompts as the release does."""
    from diffusers.utils import is_ftfy_available

    if not is_ftfy_available():
        raise AccVideoError(
            "Wan's prompts are cleaned with the package ftfy, which is not installed; install it "
            "with: pip install ftfy"
        )
    text, _ = pipeline.encode_prompt(
        prompt=list(texts),
        do_classifier_free_guidance=False,
        max_sequence_length=TEXT_TOKENS,
        device=device,
    )
    return _trimmed(text)


def _encode_image(
    pipeline: Any, vae: VideoVAE, text: str, image: Tensor, frames: int, device: torch.device
) -> Condition:
    """The image, then grey, through the VAE; before it a mask that tells them apart."""
    clip = torch.full((1, frames, *image.shape), 0.5)
    clip[0, 0] = image
    latents = vae.encode(clip)
    mask = torch.zeros(1, MASK_CHANNELS, *latents.shape[2:])
    mask[:, :, 0] = 1
    cond = _encode(pipeline, [text], device)
    return replace(cond, image=torch.cat([mask, latents], dim=1).to(device))


def _encode_image_and_tokens(
    pipeline: Any, vae: VideoVAE, text: str, image: Tensor, frames: int, device: torch.device
) -> Condition:
    """Wan 2.1 looks at the image through CLIP as well."""
    from PIL import Image

    cond = _encode_image(pipeline, vae, text, image, frames, device)
    pixels = (image.cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    tokens = pipeline.encode_image(Image.fromarray(pixels.numpy()), device)
    return replace(cond, image_tokens=tokens.float())


def _encode_first_frame(
    pipeline: Any, vae: VideoVAE, text: str, image: Tensor, frames: int, device: torch.device
) -> Condition:
    cond = _encode(pipeline, [text], device)
    return replace(cond, image=vae.encode(image[None, None]).to(device))


# ComfyUI's CONDITIONING -----------------------------------------------------------------------


def _from_native(text: Tensor, _extra: Mapping[str, Any], _spec: LatentSpec) -> Condition:
    """UMT5's tokens, filled up with zeros to 512 -> float32 Condition on the CPU."""
    return _trimmed(text.cpu())


def _from_native_i2v(text: Tensor, extra: Mapping[str, Any], spec: LatentSpec) -> Condition:
    """As WanImageToVideo and its kin leave it: "concat_latent_image" [1, C, T, H, W] in VAE space,
    "concat_mask" [1, 1 or 4, T', H, W], 0 where the image is given (nowhere when absent).
    """
    latents = extra.get("concat_latent_image")
    if latents is None:
        raise AccVideoError(
            "this CONDITIONING has no start image, which this Wan image-to-video model needs; "
            "connect it through WanImageToVideo with a start_image and the VAE"
        )
    image = spec.to_model(latents[:, : spec.channels].cpu().float())
    mask = image.new_zeros(len(image), MASK_CHANNELS, *image.shape[2:])
    if extra.get("concat_mask") is not None:
        given = 1 - extra["concat_mask"].cpu().float()
        if given.shape[1] != MASK_CHANNELS:
            given = given.mean(dim=1, keepdim=True)
        mask[:, :, : given.shape[2]] = given[:, :, : mask.shape[2]]
    image = torch.cat([mask, image], dim=1).expand(len(text), -1, -1, -1, -1)
    return replace(_trimmed(text.cpu()), image=image)


def _from_native_i2v_and_tokens(
    text: Tensor, extra: Mapping[str, Any], spec: LatentSpec
) -> Condition:
    """With "clip_vision_output", of which Wan reads the last hidden states but one."""
    seen = extra.get("clip_vision_output")
    if seen is None:
        raise AccVideoError(
            "this CONDITIONING has no clip_vision_output, which Wan 2.1 image to video needs; "
            "connect CLIPVisionEncode (clip_vision_h) to WanImageToVideo"
        )
    tokens = seen.penultimate_hidden_states.cpu().float().expand(len(text), -1, -1)
    return replace(_from_native_i2v(text, extra, spec), image_tokens=tokens)


def _from_native_ti2v(text: Tensor, extra: Mapping[str, Any], spec: LatentSpec) -> Condition:
    """Text alone, or with given frames in VAE space: "concat_latent_image" and "concat_mask" of a
    CONDITIONING, or "samples" and "noise_mask" of Wan22ImageToVideoLatent's LATENT, put beside it.
    """
    cond = _trimmed(text.cpu())
    latents = extra.get("concat_latent_image", extra.get("samples"))
    mask = extra.get("concat_mask", extra.get("noise_mask"))
    if latents is None or mask is None:
        return cond
    free = mask[0, 0].flatten(1).amax(dim=1) > 0
    given = int((free.cumsum(0) == 0).sum())
    if given == 0:
        return cond
    image = spec.to_model(latents[:1, :, :given].cpu().float())
    return replace(cond, image=image.expand(len(text), -1, -1, -1, -1))


# The entries ----------------------------------------------------------------------------------

# What the public Wan LoRAs (AccVideo rank 32, LightX2V) change by low rank, k_img and v_img of the
# image-to-video ones among them.
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

WAN_T2V = Family(
    name="wan_t2v",
    title="Wan 2.1 text to video",
    transformer_class="WanTransformer3DModel",
    pipeline_class="WanPipeline",
    matches=_is(16, 16),
    shift=5.0,  # 1.3B: the release suggests 8 to 12, with cfg 6
    steps=50,
    guidance=None,
    cfg=Cfg(5.0),
    negative_prompt=NEGATIVE_PROMPT,
    latent_spec=_latent_spec,
    forward=_forward,
    blocks=_blocks,
    tail=_tail,
    tokens=_tokens,
    fill=_filled,
    pads_text=True,
    tables=("rope",),
    texts=("condition_embedder.text_embedder", "condition_embedder.image_embedder"),
    lora_targets=_TARGETS,
    key_table=key_table,
    sequence=context_parallel.WAN,
    encode=_encode,
    text_tokens=TEXT_TOKENS,
    from_native=_from_native,
)

WAN22_T2V = replace(
    WAN_T2V,
    name="wan22_t2v",
    title="Wan 2.2 A14B text to video",
    experts=2,
    boundary=0.875,
    shift=12.0,
    steps=40,
    cfg=Cfg(4.0, low=3.0),
)

WAN22_I2V = replace(
    WAN_T2V,
    name="wan22_i2v",
    title="Wan 2.2 A14B image to video",
    pipeline_class="WanImageToVideoPipeline",
    matches=_is(36, 16),
    experts=2,
    boundary=0.9,
    steps=40,
    cfg=Cfg(3.5),
    forward=_forward_i2v,
    encode_image=_encode_image,
    from_native=_from_native_i2v,
)

WAN_I2V = replace(
    WAN22_I2V,
    name="wan_i2v",
    title="Wan 2.1 image to video",
    matches=_is(36, 16, clip=True),
    experts=1,
    boundary=0.0,
    shift_low=3.0,
    cfg=Cfg(5.0),
    negative_prompt=SHAKY_CAMERA + NEGATIVE_PROMPT,
    lora_targets=(*_TARGETS, "add_k_proj", "add_v_proj"),
    encode_image=_encode_image_and_tokens,
    from_native=_from_native_i2v_and_tokens,
)

WAN22_TI2V = replace(
    WAN_T2V,
    name="wan22_ti2v",
    title="Wan 2.2 5B text and image to video",
    matches=_is(48, 48),
    forward=_forward_ti2v,
    sequence=context_parallel.WAN_PER_TOKEN,
    encode_image=_encode_first_frame,
    from_native=_from_native_ti2v,
)

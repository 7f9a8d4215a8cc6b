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
from .keys.wan import key_table
from .video_model import Family

if TYPE_CHECKING:
    from .vae import VideoVAE

TIMESTEPS = 1000.0  # the network counts time in thousandths
TEXT_TOKENS = 512
"""Wan attends to so many text tokens, rows of zeros among them, without a mask."""
MASK_CHANNELS = 4
"""Of a concatenated image: one for each of the 4 frames in a latent frame, 1 where it is given."""

# latents_mean and latents_std of the Wan 2.1 and 2.2 VAEs, for a network that comes without a VAE.
_MEAN_16 = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_STD_16 = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
_MEAN_48 = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
_STD_48 = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
_VAES = {16: (_MEAN_16, _STD_16, 8), 48: (_MEAN_48, _STD_48, 16)}

# The release's sample_neg_prompt: garish colours, overexposed, static, blurred details, subtitles,
# ... three legs, a crowd in the background, walking backwards.
NEGATIVE_PROMPT = (
    "\u8272\u8c03\u8273\u4e3d\uff0c\u8fc7\u66dd\uff0c\u9759\u6001\uff0c"
    "\u7ec6\u8282\u6a21\u7cca\u4e0d\u6e05\uff0c\u5b57\u5e55\uff0c\u98ce\u683c\uff0c"
    "\u4f5c\u54c1\uff0c\u753b\u4f5c\uff0c\u753b\u9762\uff0c\u9759\u6b62\uff0c"
    "\u6574\u4f53\u53d1\u7070\uff0c\u6700\u5dee\u8d28\u91cf\uff0c\u4f4e\u8d28\u91cf\uff0c"
    "JPEG\u538b\u7f29\u6b8b\u7559\uff0c\u4e11\u964b\u7684\uff0c\u6b8b\u7f3a\u7684\uff0c"
    "\u591a\u4f59\u7684\u624b\u6307\uff0c\u753b\u5f97\u4e0d\u597d\u7684\u624b\u90e8\uff0c"
    "\u753b\u5f97\u4e0d\u597d\u7684\u8138\u90e8\uff0c\u7578\u5f62\u7684\uff0c"
    "\u6bc1\u5bb9\u7684\uff0c\u5f62\u6001\u7578\u5f62\u7684\u80a2\u4f53\uff0c"
    "\u624b\u6307\u878d\u5408\uff0c\u9759\u6b62\u4e0d\u52a8\u7684\u753b\u9762\uff0c"
    "\u6742\u4e71\u7684\u80cc\u666f\uff0c\u4e09\u6761\u817f\uff0c"
    "\u80cc\u666f\u4eba\u5f88\u591a\uff0c\u5012\u7740\u8d70"
)
_SHAKY_CAMERA = "\u955c\u5934\u6643\u52a8\uff0c"  # what Wan 2.1's I2V puts in front of it


# The network ----------------------------------------------------------------------------------


def _latent_spec(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentSpec:
    channels = transformer.get("out_channels", 16)
    mean, std, stride = _VAES[channels]
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


def _forward(module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """The network's answer; `t` may be [B, T*h*w], of every token. Its sinusoids are float32."""
    config = module.config
    if cond.text.shape[-1] != config.text_dim:
        raise AccVideoError(
            f"the prompt's text is {cond.text.shape[-1]} wide, but this Wan network takes "
            f"{config.text_dim}; encode it with UMT5-XXL (a CLIPLoader of type wan)"
        )
    text = cond.text.masked_fill(~cond.full_mask().unsqueeze(-1), 0)
    return module(
        hidden_states=x_t,
        timestep=t * TIMESTEPS,
        # Longer texts are cut, as the release's tokenizer cuts them.
        encoder_hidden_states=nn.functional.pad(text, (0, 0, 0, TEXT_TOKENS - text.shape[1])),
        encoder_hidden_states_image=None if config.image_dim is None else cond.image_tokens,
        return_dict=False,
    )[0]


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
    lora_targets=_TARGETS,
    key_table=key_table,
    encode=_encode,
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
    negative_prompt=_SHAKY_CAMERA + NEGATIVE_PROMPT,
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
    encode_image=_encode_first_frame,
    from_native=_from_native_ti2v,
)

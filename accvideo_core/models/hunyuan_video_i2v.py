"""HunyuanVideo image to video: HunyuanVideo's entry, given an image in one of two ways.

Latent concat (the first release): the image's latents, zeros after the first frame, and a mask of
the known frames are further channels of the network's input. Token replace (the second): the
image's latents take the place of the state's first frame, which the network treats as being at t=0.

Trajectories start from pure noise, as stock ComfyUI and the official "dynamic" mode (shift 17) do.
The official "stable" mode (shift 7), which is diffusers' only one, starts from .999 noise + .001
image; sampling from that state gives its videos. With latent concat both drop the first latent
frame of the result, which repeats the image.

Shapes: B batch, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Condition
from ..errors import AccVideoError
from ..flow import expand_time
from ..latents import LatentSpec
from .hunyuan_video import GUIDANCE, HUNYUAN_VIDEO
from .vae import VideoVAE


def _forward_concat(module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """v [B, C, T, H, W] of a network with 2C + 1 input channels."""
    image = _image(cond, x_t)
    batch, channels, *size = x_t.shape
    known = x_t.new_zeros(batch, channels + 1, *size)
    known[:, :-1, : image.shape[2]] = image
    known[:, -1, : image.shape[2]] = 1
    return HUNYUAN_VIDEO.forward(module, torch.cat([x_t, known], dim=1), t, cond)


def _forward_replace(module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """v [B, C, T, H, W]; the network sees the image instead of the state's first frame.

    That frame's velocity is the one whose clean sample is the image, (x_t - image) / t: Euler steps
    of any length keep it on the straight line from its noise to the image, where they end exactly.
    ComfyUI's masked sampling does the same.
    """
    image = _image(cond, x_t)[:, :, :1]
    v = HUNYUAN_VIDEO.forward(module, torch.cat([image, x_t[:, :, 1:]], dim=2), t, cond)
    first = (x_t[:, :, :1] - image) / expand_time(t.clamp(min=1e-3), x_t)
    return torch.cat([first.to(v), v[:, :, 1:]], dim=2)


def _image(cond: Condition, x_t: Tensor) -> Tensor:
    """The image's latents [B, C, T', H, W], after checking that they fit the state."""
    if cond.image is None:
        raise AccVideoError(
            "the prompt has no image, which HunyuanVideo I2V needs; encode it with a start image"
        )
    if cond.image.shape[3:] != x_t.shape[3:] or cond.image.shape[1] != x_t.shape[1]:
        raise AccVideoError(
            f"the image's latents have shape {tuple(cond.image.shape)}, the video's "
            f"{tuple(x_t.shape)}; use an image of the video's width and height"
        )
    return cond.image[:, :, : x_t.shape[2]]


def _encode(_pipeline: Any, _texts: Sequence[str], _device: torch.device) -> Condition:
    raise AccVideoError(
        "HunyuanVideo I2V reads its prompt together with an image; give a start image"
    )


def _encode_image(
    interleave: int,
    pipeline: Any,
    vae: VideoVAE,
    text: str,
    image: Tensor,
    _frames: int,
    device: torch.device,
) -> Condition:
    """Llava's reading of image and prompt, and the image's latents, as a float32 Condition.

    Every `interleave`-th of the image's tokens is kept, in front of the prompt's.
    """
    from PIL import Image

    picture = Image.fromarray((image.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy())
    embeds, pooled, mask = pipeline.encode_prompt(
        image=picture, prompt=[text], device=device, image_embed_interleave=interleave
    )
    return Condition(
        text=embeds[:, mask[0].bool()].float(),
        pooled=pooled.float(),
        image=vae.encode(image[None, None]).to(device),
    )


def _from_native(text: Tensor, extra: Mapping[str, Any], spec: LatentSpec) -> Condition:
    """ComfyUI's conditioning after HunyuanImageToVideo -> float32 Condition on the CPU.

    The image is in "concat_latent_image" (guidance type v1) or "ref_latent" (custom), in VAE space.
    Type v2 puts it into the LATENT only, where a text condition cannot find it.
    """
    latents = extra.get("concat_latent_image", extra.get("ref_latent"))
    if latents is None:
        raise AccVideoError(
            "this CONDITIONING holds no image, which HunyuanVideo I2V needs; put it through "
            "HunyuanImageToVideo with a start image and guidance type v1 (concat), for either model"
        )
    condition = HUNYUAN_VIDEO.from_native(text, extra, spec)
    image = spec.to_model(spec.check(latents.cpu().float(), "the image's latents")[:, :, :1])
    image = image.expand(len(condition), -1, -1, -1, -1)
    return Condition(**{**condition.tensors(), "image": image})


HUNYUAN_VIDEO_I2V = replace(
    HUNYUAN_VIDEO,
    name="hunyuan_video_i2v",
    title="HunyuanVideo I2V (latent concat)",
    matches=lambda config: config.get("image_condition_type") == "latent_concat",
    pipeline_class="HunyuanVideoImageToVideoPipeline",
    guidance=None,  # the release has no guidance embedding
    forward=_forward_concat,
    encode=_encode,
    encode_image=partial(_encode_image, 2),
    from_native=_from_native,
)

HUNYUAN_VIDEO_I2V_REPLACE = replace(
    HUNYUAN_VIDEO_I2V,
    name="hunyuan_video_i2v_replace",
    title="HunyuanVideo I2V (token replace)",
    matches=lambda config: config.get("image_condition_type") == "token_replace",
    guidance=GUIDANCE,
    forward=_forward_replace,
    encode_image=partial(_encode_image, 4),
)

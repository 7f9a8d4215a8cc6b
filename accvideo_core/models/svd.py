"""Stable Video Diffusion: its entry, over diffusers' UNetSpatioTemporalConditionModel.

The network is EDM's with data of deviation 1 (arXiv 2206.00364): it sees x_0 + sigma eps, divided
by sqrt(sigma^2 + 1), at the noise level ln(sigma) / 4, and predicts v. So scaled the state is
alpha x_0 + s eps with alpha^2 + s^2 = 1, and the network a variance-preserving one of
s / alpha = sigma; times here are flow times t = sigma / (1 + sigma).

t = 1 stands for the largest level, 700, of which the network is told there. Its state is the noise
itself, the network's input exactly what diffusers' and ComfyUI's is. Their state holds a share of
1/700 data more, which is what a step from t = 1 differs by.

Shapes: B batch, C channels, T frames, H, W latent size; D width of CLIP's image embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..conditioning import Condition, Micro
from ..errors import AccVideoError
from ..flow import Times, expand_time, flow_from_vp_v, vp_levels
from ..guidance import Cfg
from ..latents import LatentSpec, seeded_noise
from .keys.svd import key_table
from .svd_checkpoint import WHOLE
from .video_model import Family

if TYPE_CHECKING:
    from .vae import VideoVAE
    from .video_model import ImageEncoder

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 700.0, 7.0
SCALING = 0.18215


# Time -----------------------------------------------------------------------------------------


def grid(steps: int, shift: float) -> Times:
    """Times of the levels of Karras et al. from 700 to 0.002, the first one 1, then 0.

    Args:
        shift: must be 1, because this schedule has none.
    """
    if steps < 1:
        raise AccVideoError(f"steps is {steps}, but a time grid needs at least 1 step")
    if shift != 1:
        raise AccVideoError(
            f"shift is {shift}, but the schedule of Stable Video Diffusion has none; leave it at 1"
        )
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    ramp = [i / max(1, steps - 1) for i in range(1, steps)]
    sigmas = [(high + share * (low - high)) ** RHO for share in ramp]
    return (1.0, *(sigma / (1 + sigma) for sigma in sigmas), 0.0)


def to_sigma(t: float) -> float:
    """Time -> sigma, of which ComfyUI too has 700 as the largest."""
    return SIGMA_MAX if t >= 1 else min(t / (1 - t), SIGMA_MAX)


def from_sigma(sigma: float) -> float:
    """The inverse of `to_sigma`, also after rounding to float32."""
    return 1.0 if sigma >= SIGMA_MAX * (1 - 1e-6) else sigma / (1 + sigma)


def noise_level(t: Tensor) -> Tensor:
    """What the network is told of times [B]: ln(sigma) / 4, between the two ends of the schedule.

    float32 has sigma to 4e-5 at worst, just below 700.
    """
    return (t / (1 - t)).clamp(SIGMA_MIN, SIGMA_MAX).log() / 4


# The network ----------------------------------------------------------------------------------


def _latent_spec(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentSpec:
    return LatentSpec(
        channels=unet.get("out_channels", 4),
        stride_t=1,
        stride_hw=2 ** (len(vae.get("block_out_channels", range(4))) - 1),
        scale=(vae.get("scaling_factor", SCALING),),
    )


def _forward(module: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """v [B, C, T, H, W]; the image's latents are put beside every frame's channels."""
    image, micro = _image(cond, x_t)
    alpha, s = vp_levels(t)
    x = (expand_time(alpha + s, x_t) * x_t).to(x_t.dtype)
    x = torch.cat([x, image.expand(-1, -1, x_t.shape[2], -1, -1)], dim=1)
    v = module(
        sample=x.transpose(1, 2),
        timestep=noise_level(t),
        encoder_hidden_states=cond.text,
        added_time_ids=micro,
        return_dict=False,
    )[0]
    return flow_from_vp_v(x_t, v.transpose(1, 2), t).to(x_t.dtype)


def _image(cond: Condition, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """Image latents [B, C, 1, H, W] and micro-conditioning, after checking that they fit."""
    if cond.image is None or cond.micro is None:
        raise AccVideoError(
            "the prompt has no image, which Stable Video Diffusion starts from; encode it with a "
            "start image of the video's width and height"
        )
    expected = (x_t.shape[1], 1, *x_t.shape[3:])
    if tuple(cond.image.shape[1:]) != expected:
        raise AccVideoError(
            f"the prompt's image has latents {list(cond.image.shape[1:])}, but the video needs "
            f"{list(expected)}; encode the image for the video's own height and width"
        )
    return cond.image, cond.micro


def _blocks(module: Any) -> list[nn.Module]:
    return [*module.down_blocks]


def _body(module: Any) -> list[nn.Module]:
    return [*module.down_blocks, module.mid_block, *module.up_blocks]


def _tail(module: Any) -> nn.Module:
    return module.mid_block


def _tokens(_module: Any, output: Any, shape: tuple[int, ...]) -> Tensor:
    """A block returns (state [B*T, D, h, w], skips); all but the last block halve h and w."""
    return output[0].unflatten(0, (shape[0], shape[2])).permute(0, 1, 3, 4, 2)


# Images ---------------------------------------------------------------------------------------


def _encode(pipeline: Any, texts: Sequence[str], device: torch.device) -> Condition:
    """No image at all, as which an empty prompt counts: what guidance leads away from."""
    if any(text.strip() for text in texts):
        raise AccVideoError(
            "Stable Video Diffusion is not prompted with a text but with an image; give a start "
            "image, or load a text-to-video model"
        )
    width = pipeline.image_encoder.config.projection_dim
    return Condition(text=torch.zeros(len(texts), 1, width, device=device))


def _image_encoder(micro: Micro) -> ImageEncoder:
    """CLIP's embedding of the image, and its latents, not scaled, under the noise of `micro`.

    The noise follows from the image alone, so that a prompt is the same whenever it is encoded.
    """

    def encode(
        pipeline: Any, vae: VideoVAE, _text: str, image: Tensor, _frames: int, device: torch.device
    ) -> Condition:
        from PIL import Image

        image = image.detach().cpu().float().clamp(0, 1)
        pixels: Any = (image * 255).round().to(torch.uint8).numpy()
        # diffusers blurs before it resizes to CLIP's 224 pixels, which no public method does.
        embedding = pipeline._encode_image(Image.fromarray(pixels), device, 1, False)
        noise = seeded_noise(tuple(image.shape), "svd", hashlib.sha256(pixels).hexdigest())
        # Of pixels in [-1, 1], which are twice as far apart.
        latents = vae.encode((image + micro.augmentation / 2 * noise)[None, None])
        return Condition(
            text=embedding.float(),
            image=vae.spec.from_model(latents).to(device),
            micro=micro.tensor().to(device),
        )

    return encode


def _from_native(text: Tensor, extra: Mapping[str, Any], spec: LatentSpec) -> Condition:
    """CONDITIONING of SVD_img2vid_Conditioning -> float32 Condition on the CPU.

    Its image latents [1, C, H, W] are as the VAE gives them, which is how the network takes them.
    """
    latents = extra.get("concat_latent_image")
    if latents is None:
        raise AccVideoError(
            "this CONDITIONING has no image, which Stable Video Diffusion starts from; connect "
            "SVD_img2vid_Conditioning with an init_image"
        )
    image = spec.check(latents[:1, :, None].cpu().float(), "the image's latents")
    micro = Micro(
        fps=extra.get("fps", 6),
        motion_bucket=extra.get("motion_bucket_id", 127),
        augmentation=extra.get("augmentation_level", 0.0),
    )
    return Condition(
        text=text.cpu().float(),
        image=image.expand(len(text), -1, -1, -1, -1),
        micro=micro.tensor(len(text)),
    )


# The entry ------------------------------------------------------------------------------------

SVD = Family(
    name="svd",
    title="Stable Video Diffusion",
    transformer_class="UNetSpatioTemporalConditionModel",
    pipeline_class="StableVideoDiffusionPipeline",
    grid=grid,
    shift=1.0,
    steps=25,
    guidance=None,
    cfg=Cfg(3.0, first=1.0),
    guides_image=True,
    to_sigma=to_sigma,
    from_sigma=from_sigma,
    latent_spec=_latent_spec,
    forward=_forward,
    blocks=_blocks,
    joint=False,
    body=_body,
    tail=_tail,
    tokens=_tokens,
    lora_targets=(
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        *("ff_in.net.0.proj", "ff_in.net.2"),
    ),
    key_table=key_table,
    folder="unet",
    whole_file=WHOLE,
    reads_text=False,
    encode=_encode,
    encode_image=_image_encoder(Micro()),
    with_micro=_image_encoder,
    from_native=_from_native,
)

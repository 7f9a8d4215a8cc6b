"""Pictures of unfinished latents for the node's preview.

Shapes: B batch, C channels, T latent frames, H, W; F decoded frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import comfy.latent_formats
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .decoders import decoder_for_previews, tiny_decoder
from .monitor import PICTURE_SIZE, Preview

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher
    from ..accvideo_core.models.video_model import VideoModel

SMALL_VAE = 100 * 2**20
"""Bytes of VAE weights up to which decoding clips for a preview costs nothing worth saving."""

MAX_CLIPS = 4
PAIR_FRAMES = 4
"""Frames of each clip that `pair` shows."""

Draw = Callable[[Tensor], Image.Image]
"""Makes a picture of clips [B, F, H, W, 3] in [0, 1]."""

LATENT_FORMATS = {
    **dict.fromkeys(
        ("hunyuan_video", "hunyuan_video_i2v", "hunyuan_video_i2v_replace"), "HunyuanVideo"
    ),
    **dict.fromkeys(("wan_t2v", "wan_i2v", "wan22_t2v", "wan22_i2v"), "Wan21"),
    "wan22_ti2v": "Wan22",
    **dict.fromkeys(("cogvideox_2b", "cogvideox_5b", "cogvideox_1_5"), "CogVideoX"),
}
"""ComfyUI's latent format of each family: it holds the factors from channels to colours."""


def previewer(teacher: Teacher, draw: Draw | None = None) -> Preview | None:
    """Decoded frames where the VAE is small or there is a tiny decoder for these latents, else
    ComfyUI's linear map from latents to colours.

    `draw` makes the picture of them; None is `strip`.
    """
    draw = draw or strip
    vae = teacher.vae_path
    weights = list(vae.glob("*.safetensors")) if vae else []
    if weights and sum(path.stat().st_size for path in weights) <= SMALL_VAE:
        return lambda x: draw(teacher.vae.decode(x[:MAX_CLIPS]))
    tiny = decoder_for_previews(teacher)
    if tiny is not None:
        return lambda x: draw(tiny_decoder(teacher, tiny).decode(x[:MAX_CLIPS]))
    factors = _rgb_factors(teacher.model)
    if factors is None:
        return None
    return lambda x: draw(_project(x[:MAX_CLIPS], *factors))


def strip(frames: Tensor) -> Image.Image:
    """The middle frame of each clip [B, F, H, W, 3] in [0, 1], side by side, enlarged."""
    middle = frames[:, frames.shape[1] // 2].clamp(0, 1)
    return _enlarged(middle.permute(1, 0, 2, 3).flatten(1, 2))


def pair(frames: Tensor) -> Image.Image:
    """Frames of the teacher's clip above those of the student's, of [2, F, H, W, 3] in [0, 1]."""
    shown = torch.linspace(0, frames.shape[1] - 1, PAIR_FRAMES).round().long()
    rows = frames[:, shown].clamp(0, 1).permute(0, 2, 1, 3, 4)  # [2, H, frames, W, 3]
    picture = _enlarged(rows.flatten(2, 3).flatten(0, 1))
    draw = ImageDraw.Draw(picture)
    for i, label in enumerate(("teacher", "student")):
        place = (6, 4 + i * picture.height // 2)
        draw.text(place, label, fill="white", stroke_width=3, stroke_fill="black", font_size=26)
    return picture


def _enlarged(pixels: Tensor) -> Image.Image:
    """[H, W, 3] in [0, 1] as a picture, small ones enlarged by a whole number."""
    picture = Image.fromarray((pixels * 255).round().to(torch.uint8).cpu().numpy())
    scale = max(1, PICTURE_SIZE // max(picture.size))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _rgb_factors(model: VideoModel) -> tuple[Tensor, Tensor] | None:
    name = LATENT_FORMATS.get(model.family.name, "")
    form = getattr(comfy.latent_formats, name, None)
    factors = getattr(form, "latent_rgb_factors", None)
    if factors is None or len(factors) != model.latent_spec.channels:
        return None
    bias = getattr(form, "latent_rgb_factors_bias", None) or [0.0, 0.0, 0.0]
    return torch.tensor(factors), torch.tensor(bias)


def _project(x: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
    """[B, C, T, H, W] in model space -> [B, T, H, W, 3] in [0, 1]."""
    colours = x.float().cpu().movedim(1, -1) @ factors + bias
    return (colours + 1) / 2

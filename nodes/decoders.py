"""Tiny decoders of models/vae_approx, in place of a teacher's VAE.

Shapes: B batch, C channels, T latent frames, H, W; F decoded frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import comfy.model_management
from comfy_api.latest import io
from torch import Tensor

from . import paths
from .devices import VAE_MEMORY, all_memory, free_memory, vae_on_device

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher
    from ..accvideo_core.models.tiny_decoder import TinyDecoder

VAE = "(the model's VAE)"
VAES = {
    VAE: "plain",
    "(its VAE, channels last)": "channels_last",
    "(its VAE, compiled)": "compiled",
}
"""The teacher's VAE in the ways it can compute."""
SHARE = 0.9
"""Of a device's memory that a program can have."""

_loaded: WeakKeyDictionary[Teacher, tuple[Path, TinyDecoder]] = WeakKeyDictionary()
"""The decoder that was used last with each teacher."""


def decoder_input() -> io.Input:
    """The teacher's VAE in one of its ways, or a file of models/vae_approx."""
    return io.Combo.Input(
        "decoder",
        options=[*VAES, *paths.decoder_names()],
        default=VAE,
        optional=True,
        tooltip="A tiny decoder (TAEHV: taehv for HunyuanVideo, taew2_1 for Wan, taew2_2 for Wan "
        "2.2 5B, taecvx for CogVideoX) in models/vae_approx takes a hundredth of the VAE's time "
        "and blurs a little. Channels last and compiled give the VAE's own frames; try on your "
        "card which is fastest (compiling takes minutes once for each size).",
    )


def decode_with(name: str, teacher: Teacher, x: Tensor) -> Tensor:
    """Model-space latents [B, C, T, H, W] -> frames [B, F, H, W, 3] in [0, 1]."""
    if name in VAES:
        with vae_on_device(teacher, _room(teacher, x)) as vae, teacher.decoding(VAES[name]):
            return vae.decode(x, free_memory())
    return tiny_decoder(teacher, paths.decoder_file(name)).decode(x)


def _room(teacher: Teacher, x: Tensor) -> int:
    """What decoding a clip takes in as few tiles as the device could ever hold."""
    footprint = teacher.vae.footprint
    if footprint is None:
        return VAE_MEMORY
    weights = sum(p.numel() * p.element_size() for p in teacher.vae.module.parameters())
    shape = (1, *x.shape[1:])
    tiling = footprint.choose(shape, int(SHARE * (all_memory() - weights)))
    return footprint.needed(shape, tiling)


def tiny_decoder(teacher: Teacher, path: Path) -> TinyDecoder:
    """The decoder in a file, on ComfyUI's device; a few megabytes, which stay there."""
    from ..accvideo_core.models.tiny_decoder import load_tiny_decoder

    known = _loaded.get(teacher)
    if known is None or known[0] != path:
        device = comfy.model_management.get_torch_device()
        known = _loaded[teacher] = path, load_tiny_decoder(path, teacher.model, device)
    return known[1]


def decoder_for_previews(teacher: Teacher) -> Path | None:
    """A file that is known, by its name, to decode the teacher's latents; None without one."""
    from ..accvideo_core.models.tiny_decoder import PUBLISHED

    family = teacher.model.family.name
    starts = tuple(each.start for each in PUBLISHED if family.startswith(each.families))
    names = (n for n in paths.decoder_names() if Path(n).name.lower().startswith(starts))
    return next((paths.decoder_file(name) for name in names), None) if starts else None

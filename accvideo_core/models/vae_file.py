"""Finding and loading a VAE: a diffusers folder, the official file of Wan 2.1's, or a whole Stable
Video Diffusion checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import AccVideoError
from . import svd_checkpoint
from .building import empty
from .checkpoint import Checkpoint, open_checkpoint
from .frame_vae import BY_FRAMES
from .pipeline_folder import load_component, read_json, refuse_missing

_WAN = ("decoder.head.0.gamma", "conv2.weight")
"""Tensors by which the official file of a Wan VAE is known."""
_WAN_21_CHANNELS = 16
_USE_FOLDER = "give the folder of a diffusers VAE (with its config.json), or use the VAE nodes"


def vae_config(path: Path) -> Mapping[str, Any]:
    """The VAE's configuration; empty for an official file, whose family knows it.

    Raises:
        AccVideoError: there is no VAE of a known kind at `path`.
    """
    folder = _folder(path)
    if folder is not None:
        return read_json(folder / "config.json")
    with open_checkpoint(path) as checkpoint:
        if svd_checkpoint.holds_vae(checkpoint.names):
            return svd_checkpoint.vae_config(checkpoint)
        _check_wan(checkpoint)
    return {}


def load_vae(
    path: Path, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The frozen VAE at `path`; in float32 where its activations are too large for float16."""
    folder = _folder(path)
    if folder is not None:
        name = read_json(folder / "config.json").get("_class_name")
        overflows = name in BY_FRAMES and dtype == torch.float16
        return load_component(folder, device, torch.float32 if overflows else dtype)
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with torch.inference_mode(False), open_checkpoint(path) as checkpoint:
        if svd_checkpoint.holds_vae(checkpoint.names):
            wide = torch.float32 if dtype == torch.float16 else dtype
            return svd_checkpoint.load_vae(checkpoint, wide).to(device)
        _check_wan(checkpoint)
        base = checkpoint.shapes[_WAN[0]][0]
        module = empty(AutoencoderKLWan, {"base_dim": base})
        native = {name: checkpoint.get(name).to(dtype) for name in checkpoint.names}
        found = module.load_state_dict(
            convert_wan_vae_to_diffusers(native), strict=False, assign=True
        )
        refuse_missing(path, found.missing_keys)
        return module.to(device).eval().requires_grad_(False)


def _folder(path: Path) -> Path | None:
    """The diffusers folder of the VAE, given it, its pipeline or its file; None for another file.

    Raises:
        AccVideoError: `path` is missing, or a folder without a VAE.
    """
    if not path.exists():
        raise AccVideoError(f"the VAE {str(path)!r} does not exist; check the path")
    for folder in (path, path / "vae", path.parent):
        if (folder / "config.json").is_file() and (folder != path.parent or path.is_file()):
            return folder
    if path.is_dir():
        raise AccVideoError(f"{str(path)!r} holds no VAE; {_USE_FOLDER}")
    return None


def _check_wan(checkpoint: Checkpoint) -> None:
    shapes = checkpoint.shapes
    if not all(name in shapes for name in _WAN):
        raise AccVideoError(f"{str(checkpoint.path)!r} is no VAE that can be read; {_USE_FOLDER}")
    channels = shapes[_WAN[1]][0]
    if channels != _WAN_21_CHANNELS:
        raise AccVideoError(
            f"{str(checkpoint.path)!r} is a Wan VAE of {channels} channels, which is read from "
            f"diffusers' folder only; {_USE_FOLDER}"
        )

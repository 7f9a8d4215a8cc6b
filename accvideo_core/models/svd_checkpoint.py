"""A Stable Video Diffusion checkpoint: UNet, VAE and image encoder in one file, in and out.

Such files are the releases' svd.safetensors and svd_xt.safetensors, and what ComfyUI saves: there
the image encoder has transformers' names, and the encoder of the image conditions is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import Later, write_json
from .checkpoint import Checkpoint, open_checkpoint
from .keys import svd_parts as parts
from .pipeline_folder import INDEX, load_component, read_json, refuse_missing
from .whole_file import WholeFile

UNET = "model.diffusion_model."
VAE = "first_stage_model."
VISION = "conditioner.embedders.0.open_clip.model.visual."
ENCODER = "conditioner.embedders.3.encoder."
_TRANSFORMERS = "vision_model."
_VIDEO = f"{VAE}decoder.conv_out.time_mix_conv.weight"


# In -------------------------------------------------------------------------------------------


def holds_vae(names: Iterable[str]) -> bool:
    """Whether a file with these tensors holds the VAE of a Stable Video Diffusion."""
    return _VIDEO in set(names)


def is_whole(names: Iterable[str]) -> bool:
    """Whether VAE and image encoder lie beside the network."""
    names = list(names)
    return holds_vae(names) and any(name.startswith(VISION) for name in names)


def vae_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """diffusers' configuration of the VAE in a file that `holds_vae`."""
    return parts.vae_config(_within(checkpoint.shapes, VAE))


def load_vae(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The frozen VAE in a file that `holds_vae`, its encoder that of the image conditions."""
    from diffusers import AutoencoderKLTemporalDecoder

    config = vae_config(checkpoint)
    native = _read(checkpoint, VAE)
    native |= {n: x for n, x in _read(checkpoint, ENCODER).items() if _is_encoder(n)}
    table = parts.vae_table(config)
    # Other tensors of the conditioner's copy (its decoder) are read by nothing.
    known = {n: x for n, x in native.items() if _is_encoder(n) or n.startswith("decoder.")}
    state = parts.vae_from_native(known, table)
    make: Any = partial(AutoencoderKLTemporalDecoder.from_config, config)
    return _filled(make, state, checkpoint.path, dtype)


def load_image_encoder(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The frozen CLIP image encoder in a whole file."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    state = _read(checkpoint, VISION)
    config = parts.vision_config({name: tuple(x.shape) for name, x in state.items()})
    if not any(name.startswith(_TRANSFORMERS) for name in state):
        state = parts.vision_from_native(state, parts.vision_table(config))
    make = partial(CLIPVisionModelWithProjection, CLIPVisionConfig(**config))
    return _filled(make, state, checkpoint.path, dtype)


def load_pipeline(path: Path, dtype: torch.dtype, vae: nn.Module | None = None) -> Any:
    """diffusers' pipeline of a whole file, without its network."""
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
    from transformers import CLIPImageProcessor

    with torch.inference_mode(False), torch.no_grad(), open_checkpoint(path) as checkpoint:
        encoder = load_image_encoder(checkpoint, dtype)
    pipeline = StableVideoDiffusionPipeline(
        vae=vae,  # type: ignore[arg-type]
        image_encoder=encoder,  # type: ignore[arg-type]
        unet=None,  # type: ignore[arg-type]
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        feature_extractor=CLIPImageProcessor(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "interpolation_type": "linear",
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}
"""The releases' configuration of EulerDiscreteScheduler."""


# Out ------------------------------------------------------------------------------------------


def others(source: Path) -> dict[str, Later]:
    """Every tensor of a whole checkpoint but the UNet's, from one or from a pipeline folder."""
    if source.is_file():
        checkpoint = open_checkpoint(source)
        names = [name for name in checkpoint.names if name.startswith((VAE, "conditioner."))]
        return {name: _kept(checkpoint, name) for name in names}
    vae = load_component(source / "vae", "cpu", torch.float32)
    native = parts.vae_to_native(vae.state_dict(), parts.vae_table(vae.config))  # type: ignore
    encoder = _load_vision(source / "image_encoder")
    table = parts.vision_table(encoder.config.to_dict())
    vision = parts.vision_to_native(encoder.state_dict(), table)
    found = {VISION + name: x for name, x in vision.items()}
    found |= {VAE + name: x for name, x in parts.without_quant(native).items()}
    found |= {ENCODER + name: x for name, x in native.items() if _is_encoder(name)}
    return {name: Later(tuple(x.shape), x.dtype, partial(_same, x)) for name, x in found.items()}


def write_parts(source: Path, folder: Path) -> None:
    """VAE, image encoder, scheduler and index of the pipeline in a whole file, into `folder`."""
    with torch.inference_mode(False), open_checkpoint(source) as checkpoint:
        vae = load_vae(checkpoint, torch.float32)
    pipeline = load_pipeline(source, torch.float32, vae)
    pipeline.save_pretrained(folder, safe_serialization=True)
    index = {**read_json(folder / INDEX)}
    index["unet"] = ["diffusers", "UNetSpatioTemporalConditionModel"]
    write_json(folder / INDEX, index)


def _load_vision(folder: Path) -> Any:
    from transformers import CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection.from_pretrained(
        folder, local_files_only=True, use_safetensors=True
    )


def _same(x: Tensor) -> Tensor:
    return x


def _kept(checkpoint: Checkpoint, name: str) -> Later:
    entry = checkpoint.entries[name]
    assert entry.dtype is not None
    return Later(entry.shape, entry.dtype, partial(checkpoint.get, name))


def _is_encoder(name: str) -> bool:
    return name.startswith(("encoder.", f"{parts.QUANT}."))


def _within(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name[len(prefix) :]: x for name, x in named.items() if name.startswith(prefix)}


def _read(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    names = [name for name in checkpoint.names if name.startswith(prefix)]
    return {name[len(prefix) :]: checkpoint.get(name) for name in names}


def _filled(
    make: Callable[[], nn.Module], state: Mapping[str, Tensor], path: Path, dtype: torch.dtype
) -> nn.Module:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = make()
    wanted = {name: x.to(dtype) for name, x in state.items()}
    found = module.load_state_dict(wanted, strict=False, assign=True)
    refuse_missing(path, [name for name in found.missing_keys if "position_ids" not in name])
    return module.eval().requires_grad_(False)


WHOLE = WholeFile(
    network=UNET,
    is_whole=is_whole,
    load_pipeline=load_pipeline,
    others=others,
    write_parts=write_parts,
)

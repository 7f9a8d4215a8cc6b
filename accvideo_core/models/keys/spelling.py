"""How files spell the names of the key tables: prefixes, and ComfyUI's names of HunyuanVideo.

fp8 files hold companions beside their weights (scales and the like); a companion keeps its own
suffix under the canonical layer, so that whoever reads the weight finds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

NETWORK = ("model.diffusion_model.", "diffusion_model.")
"""Prefixes of the network in a file that may hold other things; the first that occurs decides."""

WRAPPERS = (
    *("model.model.", "transformer.", "module.", "model.", "_orig_mod."),
    *("net.", "dit.", "unet."),
)
"""Prefixes that are taken off when every tensor of the network has them."""

OTHERS = (
    *("first_stage_model.", "cond_stage_model.", "conditioner.", "model_ema.", "vae."),
    *("text_encoders.", "text_encoder.", "text_encoder_2.", "clip_vision.", "image_encoder."),
)
"""Prefixes of what stands beside the network in a combined checkpoint."""

COMPANIONS = (
    *("scale_weight", "scale_input", "weight_scale", "weight_scale_2", "input_scale"),
    *("pre_quant_scale", "comfy_quant"),
)
"""Last part of the names of tensors that tell how the weight of their layer is stored."""

MARK = "scaled_fp8"
"""Tensor without a layer by which ComfyUI marks a file of scaled fp8 weights."""

# diffusers' Wan never reads the first, and CogVideoX without image computes the second itself.
_UNUSED = re.compile(r"^blocks\.\d+\.attn2\.norm_added_q\.|^patch_embed\.pos_embedding$")

_DOUBLE = r"(double_blocks\.\d+\.(?:img|txt))"
_SINGLE = r"(single_blocks\.\d+)"
_REFINER = r"(txt_in\.individual_token_refiner\.blocks\.\d+)"
_COMFY = tuple(
    (re.compile(f"^{pattern}(?=\\.|$)"), name)
    for pattern, name in (
        (_DOUBLE + r"_mod\.lin", r"\1_mod.linear"),
        (_DOUBLE + r"_attn\.(qkv|proj)", r"\1_attn_\2"),
        (_DOUBLE + r"_attn\.norm\.query_norm", r"\1_attn_q_norm"),
        (_DOUBLE + r"_attn\.norm\.key_norm", r"\1_attn_k_norm"),
        (_DOUBLE + r"_mlp\.0", r"\1_mlp.fc1"),
        (_DOUBLE + r"_mlp\.2", r"\1_mlp.fc2"),
        (_SINGLE + r"\.modulation\.lin", r"\1.modulation.linear"),
        (_SINGLE + r"\.norm\.query_norm", r"\1.q_norm"),
        (_SINGLE + r"\.norm\.key_norm", r"\1.k_norm"),
        (_REFINER + r"\.self_attn\.(qkv|proj)", r"\1.self_attn_\2"),
        (_REFINER + r"\.mlp\.0", r"\1.mlp.fc1"),
        (_REFINER + r"\.mlp\.2", r"\1.mlp.fc2"),
        (r"txt_in\.c_embedder\.in_layer", "txt_in.c_embedder.linear_1"),
        (r"txt_in\.c_embedder\.out_layer", "txt_in.c_embedder.linear_2"),
        (r"(time_in|guidance_in|txt_in\.t_embedder)\.in_layer", r"\1.mlp.0"),
        (r"(time_in|guidance_in|txt_in\.t_embedder)\.out_layer", r"\1.mlp.2"),
    )
)
_OLD_SCALE = re.compile(r"(?<=[qk]_norm)\.scale$")


def canonical(names: Iterable[str]) -> dict[str, str]:
    """A file's keys -> native or diffusers names, companions of weights included.

    Keys that belong to something else than the network, or that no network reads, are left out.
    Idempotent: canonical names stay as they are.
    """
    result = {}
    for key, name in _without_prefix(list(names)).items():
        name = native_spelling(name)
        if not _UNUSED.search(name):
            result[key] = name
    return result


def is_companion(name: str) -> bool:
    """Whether a canonical name is a companion of a weight and no tensor of the network."""
    return name == MARK or name.rpartition(".")[2] in COMPANIONS


def native_spelling(name: str) -> str:
    """ComfyUI's name of a HunyuanVideo layer or tensor -> Tencent's; others stay as they are."""
    for pattern, tencent in _COMFY:
        name, found = pattern.subn(tencent, name)
        if found:
            return _OLD_SCALE.sub(".weight", name)
    return name


def _without_prefix(keys: list[str]) -> dict[str, str]:
    """The network's keys -> themselves without the prefixes that all of them have."""
    prefix = next((p for p in NETWORK if any(key.startswith(p) for key in keys)), "")
    found = {key: key[len(prefix) :] for key in keys if key.startswith(prefix)}
    found = {key: name for key, name in found.items() if not name.startswith(OTHERS)} or found
    marked = {key: MARK for key in keys if key.rpartition(".")[2] == MARK}
    while shared := _shared({key: name for key, name in found.items() if key not in marked}):
        found = {key: name.removeprefix(shared) for key, name in found.items()}
    return found | marked


def _shared(found: dict[str, str]) -> str | None:
    """The wrapper prefix that all names have, if there is one."""
    if not found:
        return None
    return next((p for p in WRAPPERS if all(n.startswith(p) for n in found.values())), None)

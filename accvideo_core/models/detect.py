"""Which network a file holds, from the names and shapes of its tensors and nothing else.

A file's own name says what somebody called it; its tensors say what it is. `variant` and the
metadata that our exports and diffusers write override what no tensor shows.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..errors import AccVideoError
from . import FAMILIES, Family
from .keys import cogvideox, hunyuan_video, svd, wan
from .keys.spelling import canonical, is_companion
from .keys.table import KeyTable, Shapes, split_name

log = logging.getLogger(__name__)

ARCHITECTURES: tuple[ModuleType, ...] = (hunyuan_video, wan, cogvideox, svd)

VARIANTS: tuple[dict[str, dict[str, Any]], ...] = (
    {
        "hunyuan_video": {"image_condition_type": None},
        "hunyuan_video_i2v_replace": {"image_condition_type": "token_replace"},
    },
    {
        "cogvideox_2b": {"use_rotary_positional_embeddings": False},
        "cogvideox_5b": {"use_rotary_positional_embeddings": True},
    },
    {"wan_t2v": {}, "wan22_t2v": {}},
)
"""Groups of families with the same tensors: name -> what its configuration says."""

PAIRS = {"wan_t2v": "wan22_t2v", "wan22_t2v": "wan22_t2v", "wan22_i2v": "wan22_i2v"}
"""Family of one expert -> family of the pair."""


@dataclass(frozen=True, slots=True)
class Detected:
    """A network as its file shows it."""

    family: Family
    naming: str
    """Whose names the file has: native or diffusers."""
    config: dict[str, Any]
    """Arguments of diffusers' class that make a network of these shapes."""
    parameters: int


def detect(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    metadata: Mapping[str, str] | None = None,
    variant: str | None = None,
) -> Detected:
    """The family, the naming and the complete configuration of the network with these tensors.

    Args:
        shapes: names, as the file has them or canonical, and logical shapes of all tensors.
        metadata: the file's header; a diffusers configuration under "config" states what no
            tensor shows (Wan's heads, axes of positions, ...) and overrides nothing else.
        variant: family to take it for, among those with the same tensors. A token-replace
            HunyuanVideo-I2V has every tensor of text to video and is found only so, and one expert
            of Wan 2.2 A14B text to video every tensor of Wan 2.1.

    Raises:
        AccVideoError: it is something else, incomplete, or no network of the variant asked for.
    """
    names = canonical(shapes)
    network = {n: tuple(shapes[key]) for key, n in names.items() if not is_companion(n)}
    _refuse_foreign(network)
    architecture, known = _recognise(network)
    family, config = _read(architecture, known)
    config |= _stated(architecture.UNSEEN, metadata)
    family, changes = _variant(family, config, variant)
    config |= changes
    table = architecture.key_table(config)
    _check_complete(network, table, known.naming, architecture.TITLE)
    parameters = sum(math.prod(shape) for shape in network.values())
    return Detected(_family(family), known.naming, config, parameters)


def pair(high: Detected, low: Detected) -> Family:
    """The family of two experts, the one for much noise first.

    Raises:
        AccVideoError: the two are no experts of one Wan 2.2 A14B.
    """
    if high.family.name != low.family.name or high.family.name not in PAIRS:
        raise AccVideoError(
            f"a {high.family.name} and a {low.family.name} network make no pair; choose the "
            "high-noise and the low-noise file of one Wan 2.2 A14B"
        )
    different = [key for key in high.config if high.config[key] != low.config.get(key)]
    if different:
        raise AccVideoError(
            f"the two networks differ in {', '.join(different)}; choose the high-noise and the "
            "low-noise file of one Wan 2.2 A14B"
        )
    return _family(PAIRS[high.family.name])


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise AccVideoError(
            f"this is a {name} network, which is not supported yet; choose one of: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]


def _recognise(network: Mapping[str, tuple[int, ...]]) -> tuple[ModuleType, Shapes]:
    for architecture in ARCHITECTURES:
        probe = architecture.key_table(architecture.PROBE)
        for naming in ("native", "diffusers"):
            known = Shapes(network, probe, naming)
            if all(known.get(marker) for marker in architecture.MARKERS):
                return architecture, known
    if any(re.search(r"^(input_blocks|down_blocks)\.\d+\.", name) for name in network):
        raise AccVideoError(
            "this file is a UNet of images or a VAE, which cannot be used here; choose the file of "
            "the video model itself"
        )
    some = ", ".join(repr(name) for name in list(network)[:2]) or "none"
    raise AccVideoError(
        f"the file's {len(network)} tensors ({some} ...) are no HunyuanVideo, Wan, CogVideoX or "
        "Stable Video Diffusion network; choose the file of the diffusion model itself, with all "
        "its shards"
    )


def _read(architecture: ModuleType, known: Shapes) -> tuple[str, dict[str, Any]]:
    try:
        return architecture.read(known)
    except AccVideoError:
        raise
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise AccVideoError(
            f"the file has the names of {architecture.TITLE} but not its shapes ({error}); choose "
            "another file of this model"
        ) from error


def _stated(unseen: Sequence[str], metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What the header's configuration says of the settings that no tensor shows."""
    try:
        stated = json.loads((metadata or {}).get("config", "{}"))
    except ValueError as error:
        log.warning("the file's header holds a configuration that is not JSON: %s", error)
        return {}
    if not isinstance(stated, dict):
        return {}
    return {
        key: tuple(stated[key]) if isinstance(stated[key], list) else stated[key]
        for key in unseen
        if key in stated
    }


def _variant(
    family: str, config: Mapping[str, Any], variant: str | None
) -> tuple[str, dict[str, Any]]:
    """The family to take a file for, and what its configuration must then say."""
    options = next((group for group in VARIANTS if family in group), {family: {}})
    if variant is None:
        fitting = (name for name, said in options.items() if said.items() <= config.items())
        variant = next(fitting, family)
    if variant not in options:
        raise AccVideoError(
            f"the file is {family} and cannot be taken for {variant!r}; choose one of: "
            f"{', '.join(options)}"
        )
    return variant, options[variant]


def _check_complete(
    network: Mapping[str, tuple[int, ...]], table: KeyTable, naming: str, title: str
) -> None:
    """Every layer of the network is there with the right number of rows, and nothing else."""
    native = naming == "native"
    expected = table.native_layers() if native else table.diffusers_layers()
    rows = {
        layer: table.parts(layer)[-1].stop if native else table.part(layer).rows
        for layer in expected
    }
    for name, shape in network.items():
        layer, _ = split_name(name, rows)
        if layer not in rows:
            raise AccVideoError(
                f"the file is like {title} but has tensors that it has not, such as {name!r}; "
                "choose an unmodified network, or merge or convert this one first"
            )
        if shape and shape[0] != rows[layer]:
            raise AccVideoError(
                f"the tensor {name!r} has shape {shape} where {title} of this size has "
                f"{rows[layer]} rows; choose the file of one whole network, or state its "
                "configuration in the header"
            )
    missing = [layer for layer in rows if not {layer, f"{layer}.weight"} & network.keys()]
    if missing:
        raise AccVideoError(
            f"the file lacks {len(missing)} layers of {title}, such as {missing[0]!r}; give all "
            "shards of the checkpoint, or download it again"
        )


_LORA = "load it with a LoRA loader on top of the model it was made for"
_BASE = "choose the text-to-video or image-to-video model it came from"
_OTHER = "choose a HunyuanVideo, Wan, CogVideoX or Stable Video Diffusion model"

FOREIGN: tuple[tuple[str, str, str], ...] = (
    (r"\.(lora_[AB]|lora_down|lora_up|hada_w1_a|lokr_w1|diff|diff_b)\b",
     "a LoRA", _LORA),
    (r"^lora_unet_", "a LoRA", _LORA),
    # Relatives of the supported networks
    (r"^(vision_in|byt5_in|cond_type_embedding|cond_type_embed|context_embedder_2)\.",
     "HunyuanVideo 1.5 or HunyuanImage", "choose HunyuanVideo (13B)"),
    (r"^vace_(blocks|patch_embedding)\.", "Wan VACE", _BASE),
    (r"^(face_adapter|motion_encoder|pose_patch_embedding)\.", "Wan Animate", _BASE),
    (r"^(casual_audio_encoder|audio_injector|trainable_cond_mask|audio_proj)\b",
     "Wan S2V or another audio-driven Wan", _BASE),
    (r"^(control_adapter|ref_conv|cam_encoder)\.", "a Wan Fun control or camera model", _BASE),
    (r"^(img_emb\.emb_pos|condition_embedder\.image_embedder\.pos_embed)$",
     "Wan first-and-last-frame to video", "choose Wan 2.1 I2V 14B"),
    (r"^mixins\.|(^|\.)layers\.0\.attention\.query_key_value\.",
     "a CogVideoX checkpoint of the SAT framework, whose rows are in another order",
     "convert it with CogVideo's tools/convert_weight_sat2hf.py or choose the diffusers release"),
    # Other networks
    (r"^(t5_yproj|t5_y_embedder)\.|^time_embed\.pooler\.", "Mochi", _OTHER),
    (r"^(patchify_proj|adaln_single|caption_projection)\.", "LTX-Video", _OTHER),
    (r"^double_stream_modulation_img\.", "Flux 2", _OTHER),
    (r"^(txt_in|context_embedder)\.weight$", "Flux or another image model", _OTHER),
    # What stands beside a network
    (r"^((encoder|decoder)\.(conv_in|conv1|mid_block|mid|down_blocks|up_blocks|downsamples)\.)",
     "a VAE", "load it with a VAE loader"),
    (r"^(quant_conv|post_quant_conv)\.", "a VAE", "load it with a VAE loader"),
    (r"(^|\.)layers\.\d+\.self_attn\.q_proj\.|(^|\.)block\.\d+\.layer\.\d+\.SelfAttention\.",
     "a text encoder", "load it with a CLIP loader"),
    (r"^token_embedding\.weight$|(^|\.)blk\.\d+\.attn_q\.", "a text encoder",
     "load it with a CLIP loader"),
    (r"(^|\.)(vision_model|visual)\.", "an image encoder", "load it with a CLIP vision loader"),
)  # fmt: skip
"""(pattern of a name, what a file with such a name is, the remedy); the first that fits counts."""


def _refuse_foreign(network: Mapping[str, tuple[int, ...]]) -> None:
    for pattern, what, remedy in FOREIGN:
        search = re.compile(pattern).search
        if any(search(name) for name in network):
            raise AccVideoError(f"this file is {what}, which cannot be used here; {remedy}")

"""Reading LoRA files of every trainer: whose names mean which layer of a network.

A file's names are looked up among the names that the network has, in each spelling that trainers
use; a name is never taken apart by rules, because underscores do not tell where a dot was.

Shapes: A [r, in, ...], B [out, r, ...].
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AccVideoError
from .checkpoint import open_checkpoint
from .keys.spelling import native_spelling
from .keys.table import KeyTable

EXPERT_KEY = "accvideo.expert"
"""Header entry of a file that is meant for one of two experts, "high" or "low"."""

LOW_PREFIX = "transformer_2."
"""What diffusers calls the second of two experts."""

_PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model."),
    *("transformer.", LOW_PREFIX, "model.", "module.", "unet.", "dit."),
    *("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_"),
)
_FACTOR = re.compile(r"(.+)\.lora[_.](A|B|down|up)(?:\.[^.]+)?\.(weight|bias)")
_PLAIN = re.compile(r"(.+)\.(alpha|diff|diff_b)")
_UNSUPPORTED = {
    "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector)\b"),
    "LoKr": re.compile(r"\.lokr_"),
    "LoHa": re.compile(r"\.hada_"),
    "OFT": re.compile(r"\.b?oft_"),
    "Tucker-decomposed LoRA": re.compile(r"\.lora_mid\."),
}
# The last parts in which ComfyUI's names of HunyuanVideo differ even with dots as underscores.
_COMFY_ENDINGS = (
    *((".linear", ".lin"), (".fc1", ".0"), (".fc2", ".2")),
    *((".mlp.0", ".in_layer"), (".mlp.2", ".out_layer")),
    *((".linear_1", ".in_layer"), (".linear_2", ".out_layer")),
)
_LOOKS_LIKE = (
    ("a text encoder", r"^(lora_te|text_encoder)"),
    ("Stable Video Diffusion", r"time_stack[._]\d|temporal_transformer_blocks[._]\d"),
    ("Stable Diffusion or SDXL", r"(down_blocks|up_blocks|input_blocks|output_blocks)[._]\d"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](img_mod|img_mlp|txt_mlp)"),
    ("HunyuanVideo or Flux", r"(single_transformer_blocks|single_blocks|double_blocks)[._]\d"),
    ("CogVideoX or LTX-Video", r"transformer_blocks[._]\d+[._]attn1"),
    ("Wan", r"blocks[._]\d+[._](self_attn|cross_attn|attn1|attn2)[._]"),
    ("SD3 or another image model", r"(joint_blocks|transformer_blocks)[._]\d"),
)
FLUX = (19, 38)  # blocks of Flux, whose names and shapes are HunyuanVideo's otherwise
_DOUBLE = re.compile(r"(?:double_blocks|(?<!single_)transformer_blocks)[._](\d+)")
_SINGLE = re.compile(r"(?:single_blocks|single_transformer_blocks)[._](\d+)")


@dataclass(slots=True, eq=False)
class RawLayer:
    """What a file holds for one layer."""

    a: Tensor | None = None
    b: Tensor | None = None
    bias: Tensor | None = None
    """Bias of B."""
    diff: Tensor | None = None
    diff_b: Tensor | None = None
    alpha: float | None = None
    """Numerator of the scale; None means the rank."""


@dataclass(frozen=True, slots=True, eq=False)
class RawLora:
    """A LoRA file under its own names."""

    path: Path
    layers: dict[str, RawLayer]
    others: tuple[str, ...]
    """Tensors that are no part of a LoRA."""
    expert: str = ""
    """The one expert that the file says it is for."""


def read_lora(path: Path) -> RawLora:
    """The layers of a LoRA file (.safetensors, .pt) under the file's own names.

    Raises:
        AccVideoError: the file is missing, damaged, of an unsupported kind, or no LoRA.
    """
    path = Path(path)
    layers: dict[str, RawLayer] = {}
    others = []
    with open_checkpoint(path) as file:
        metadata = dict(file.metadata)
        _refuse_unsupported(path, file.names)
        for name in file.names:
            place = _place(name)
            if place is None:
                others.append(name)
                continue
            layer, part = place
            x = file.get(name)
            value = float(x.item()) if part == "alpha" else x
            setattr(layers.setdefault(layer, RawLayer()), part, value)
    if not any(x.b is not None or x.diff is not None or x.diff_b is not None
               for x in layers.values()):  # fmt: skip
        raise AccVideoError(
            f"{path.name} holds no LoRA (its tensors are called like {sorted(others)[:2]}); "
            "choose a LoRA file, or give a checkpoint as the teacher"
        )
    settings = _peft_settings(path, metadata)
    for name, layer in layers.items():
        _complete(path, name, layer, settings)
    return RawLora(path, layers, tuple(others), metadata.get(EXPERT_KEY, ""))


def resolve(names: Iterable[str], table: KeyTable) -> dict[str, tuple[str, str]]:
    """A file's layer names -> ("native" | "diffusers", layer), for those that the network has.

    A few names belong to both namings and mean different layers; the naming that more names of the
    file have decides.
    """
    names = list(names)
    found = {
        naming: {name: layer for name in names if (layer := _look_up(name, known))}
        for naming, known in (
            ("native", _spellings(table.native_layers())),
            ("diffusers", _spellings(table.diffusers_layers())),
        )
    }
    result: dict[str, tuple[str, str]] = {}
    for naming in sorted(found, key=lambda naming: len(found[naming])):
        result |= {name: (naming, layer) for name, layer in found[naming].items()}
    return result


def resembles(names: Iterable[str]) -> str:
    """What the LoRA with these layer names seems to be for; empty when nothing is known."""
    names = list(names)
    if is_flux(names):
        return "Flux"
    for title, pattern in _LOOKS_LIKE:
        if any(re.search(pattern, name) for name in names):
            return title
    return ""


def is_flux(names: Iterable[str]) -> bool:
    """Whether the adapted blocks are exactly Flux's, 19 double and 38 single ones."""
    stacks: tuple[set[int], set[int]] = (set(), set())
    for name in names:
        for stack, pattern in zip(stacks, (_DOUBLE, _SINGLE), strict=True):
            stack.update(int(number) for number in pattern.findall(name))
    return stacks == tuple(set(range(count)) for count in FLUX)


def _place(name: str) -> tuple[str, str] | None:
    """(layer, attribute of RawLayer) of a tensor."""
    if match := _FACTOR.fullmatch(name):
        layer, side, kind = match.groups()
        down = side in ("A", "down")
        if kind == "bias":
            return None if down else (layer, "bias")
        return layer, "a" if down else "b"
    match = _PLAIN.fullmatch(name)
    return (match[1], match[2]) if match else None


def _refuse_unsupported(path: Path, names: Iterable[str]) -> None:
    for name in names:
        for kind, pattern in _UNSUPPORTED.items():
            if pattern.search(name):
                raise AccVideoError(
                    f"{path.name} is a {kind} file (it has {name!r}), which is not supported; "
                    "merge it into the checkpoint with the tool that made it, or choose a LoRA"
                )


def _complete(path: Path, name: str, layer: RawLayer, settings: Mapping[str, Any]) -> None:
    """Check a layer's factors against each other and give it its alpha."""
    if (layer.a is None) != (layer.b is None):
        raise AccVideoError(
            f"{path.name} is incomplete: layer {name!r} has only one of its two factors; "
            "download it again"
        )
    if layer.a is None or layer.b is None:
        return
    rank = layer.a.shape[0]
    if layer.a.dim() < 2 or layer.b.dim() < 2 or layer.b.shape[1] != rank or rank == 0:
        raise AccVideoError(
            f"{path.name} is damaged: the factors of {name!r} have shapes {tuple(layer.a.shape)} "
            f"and {tuple(layer.b.shape)}, which do not multiply; download it again"
        )
    if layer.alpha is None:
        layer.alpha = _peft_alpha(name, rank, settings)


def _peft_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What peft says of the adapters: in diffusers' header, or in the file beside its own."""
    text = metadata.get("lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")
    if text is None and path.stem == "adapter_model" and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    try:
        settings = json.loads(text or "{}")
    except ValueError as error:
        raise AccVideoError(
            f"the LoRA settings of {path.name} are not JSON ({error}); download it again"
        ) from error
    return settings if isinstance(settings, dict) else {}


def _peft_alpha(name: str, rank: int, settings: Mapping[str, Any]) -> float | None:
    """peft's alpha of a layer in the terms of alpha / rank; None where it says nothing."""
    own = {key.removeprefix("transformer."): value for key, value in settings.items()}
    alpha = own.get("lora_alpha")
    for pattern, value in (own.get("alpha_pattern") or {}).items():
        if f".{name}".endswith(f".{pattern.lstrip('^')}"):
            alpha = value
    if alpha is not None and own.get("use_rslora"):
        return float(alpha) * rank**0.5
    return None if alpha is None else float(alpha)


def _spellings(layers: Iterable[str]) -> dict[str, str]:
    """Every spelling -> layer, with dots and with underscores; "" where two layers share one."""
    known: dict[str, str] = {}
    for layer in layers:
        for spelling in (layer, *_comfy(layer)):
            for name in (spelling, spelling.replace(".", "_")):
                known[name] = layer if known.get(name, layer) == layer else ""
    return known


def _comfy(layer: str) -> Iterator[str]:
    for ending, theirs in _COMFY_ENDINGS:
        if layer.endswith(ending):
            name = layer.removesuffix(ending) + theirs
            if native_spelling(name) == layer:
                yield name


def _look_up(name: str, known: Mapping[str, str]) -> str:
    """The layer that a file calls `name`, "" when there is none."""
    rests = [name]
    for rest in rests:  # grows while prefixes come off
        layer = known.get(rest) or known.get(native_spelling(rest))
        if layer:
            return layer
        rests += [rest.removeprefix(p) for p in _PREFIXES if rest.startswith(p)]
    return ""

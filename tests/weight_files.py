"""Weights files as users have them, made from small random networks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from accvideo_core.models import FAMILIES

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
State = dict[str, Tensor]


def native(family: str, module: Any) -> State:
    """A network's tensors under the official release's names."""
    table = FAMILIES[family].key_table(module.config)
    return {n: x.contiguous() for n, x in table.to_native(module.state_dict()).items()}


def stated(module: Any) -> dict[str, str]:
    """A header that states the configuration, which networks of other proportions need."""
    return {"config": json.dumps(dict(module.config))}


def save(
    path: Path, state: Mapping[str, Tensor], module: Any, prefix: str = "", **metadata: str
) -> Path:
    tensors = {prefix + name: x.contiguous() for name, x in state.items()}
    save_file(tensors, path, metadata={**stated(module), **metadata})
    return path


def linear_weights(state: Mapping[str, Tensor]) -> list[str]:
    return [name for name, x in state.items() if name.endswith(".weight") and x.dim() == 2]


def plain_fp8(state: State) -> State:
    """Every tensor in fp8, as the first fp8 files were made."""
    return {name: x.to(E4M3) for name, x in state.items()}


def scaled_fp8(state: State) -> State:
    """ComfyUI's scaled fp8: a number beside each linear weight, and a mark."""
    return _scaled(state, "scale_weight", False) | {"scaled_fp8": torch.zeros(2, dtype=E4M3)}


def noted_fp8(state: State) -> State:
    """The same as newer ComfyUI writes it: a JSON note on each layer."""
    note = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    notes = {n.removesuffix("weight") + "comfy_quant": note.clone() for n in linear_weights(state)}
    return _scaled(state, "weight_scale", False) | notes


def row_scaled_fp8(state: State) -> State:
    """A scale for every row of a weight."""
    return _scaled(state, "weight_scale", True)


def _scaled(state: State, companion: str, rows: bool) -> State:
    result = dict(state)
    for name in linear_weights(state):
        x = state[name].float()
        scale = (x.abs().amax(1, keepdim=True) if rows else x.abs().max()) / 448
        result[name] = (x / scale).to(E4M3)
        layer = name.removesuffix("weight")
        result[layer + companion] = scale
        if not rows:
            result[layer + "scale_input"] = torch.tensor(1.0)
    return result


def unpacked(state: State) -> State:
    """The numbers that an fp8 file stands for, by ComfyUI's arithmetic in float32."""
    result = {}
    for name, x in state.items():
        layer, _, last = name.rpartition(".")
        if last in ("scale_weight", "weight_scale", "scale_input", "comfy_quant", "scaled_fp8"):
            continue
        scales = [state.get(f"{layer}.{n}") for n in ("scale_weight", "weight_scale")]
        found = [scale for scale in scales if scale is not None and last == "weight"]
        result[name] = x.float() * found[0] if found else x.float()
    return result


FP8: dict[str, Callable[[State], State]] = {
    "plain": plain_fp8,
    "scaled": scaled_fp8,
    "noted": noted_fp8,
    "rows": row_scaled_fp8,
}


def save_gguf(
    path: Path, state: State, kind: str = "Q8_0", metadata: Mapping[str, str] | None = None
) -> State:
    """Linear weights in blocks of a GGUF format where their rows allow it; returns the numbers."""
    import gguf

    quant = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[quant]
    writer, numbers = gguf.GGUFWriter(str(path), "hyvid"), {}
    for name, text in (metadata or {}).items():
        writer.add_string(name, text)
    linear = set(linear_weights(state))
    for name, x in state.items():
        if name in linear and x.shape[1] % block == 0:
            packed = gguf.quants.quantize(x.float().numpy(), quant)
            numbers[name] = torch.from_numpy(gguf.quants.dequantize(packed, quant))
            writer.add_tensor(name, packed, raw_dtype=quant)
            continue
        numbers[name] = x.float()
        data = x.float().numpy()
        if x.dim() > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(x.shape))
            data = data.reshape(x.shape[0], -1)
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


def with_numbers(family: str, module: nn.Module, state: State) -> nn.Module:
    """`module` with native numbers in place of its own."""
    table = FAMILIES[family].key_table(module.config)  # type: ignore[arg-type]
    parts = [part for name, x in state.items() for part in table.to_diffusers(name, x)]
    module.load_state_dict(dict(parts), strict=True)
    return module

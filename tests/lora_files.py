"""LoRA files in every trainer's spelling, made from factors under native names."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from accvideo_core.models import VideoModel
from accvideo_core.models.experts import Experts
from accvideo_core.models.keys.table import KeyTable
from accvideo_core.models.quantised import Fp8Linear

RANK = 3


def table_of(model: VideoModel) -> KeyTable:
    module = model.module.high if isinstance(model.module, Experts) else model.module
    return model.family.key_table(dict(module.config))  # pyright: ignore


def native_shapes(model: VideoModel) -> dict[str, tuple[int, ...]]:
    """Native names and shapes of the matrices of the blocks, of one expert where there are two."""
    module = model.module.high if isinstance(model.module, Experts) else model.module
    table = table_of(model)
    state = {n: x for n, x in module.state_dict().items() if in_table(n, table)}
    names = {n: tuple(x.shape) for n, x in table.to_native(state).items()}
    return {
        n.removesuffix(".weight"): shape
        for n, shape in names.items()
        if n.endswith(".weight") and len(shape) == 2
    }


def in_table(name: str, table: KeyTable) -> bool:
    layers = table.diffusers_layers()
    return name in layers or name.rpartition(".")[0] in layers


def factors_of(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 3
) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    return {n: (random(RANK, shape[1]), random(shape[0], RANK)) for n, shape in shapes.items()}


def changed(model: VideoModel, native: Mapping[str, Tensor], expert: str = "") -> VideoModel:
    """`model` with native tensors added to its own, by loading a whole state dict."""
    module = copy.deepcopy(model.module)
    target = getattr(module, expert) if expert else module
    table, state = table_of(model), target.state_dict()
    whole = table.to_native({n: x for n, x in state.items() if in_table(n, table)})
    for name, x in native.items():
        for part, value in table.to_diffusers(name, whole[name] + x):
            state[part] = value.clone()
    target.load_state_dict(state)
    return replace(model, module=module, _fingerprint="")


def with_both(model: VideoModel, native: Mapping[str, Tensor]) -> VideoModel:
    if not isinstance(model.module, Experts):
        return changed(model, native)
    return changed(changed(model, native, "high"), native, "low")


def products(factors: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> dict[str, Tensor]:
    return {f"{n}.weight": scale * b @ a for n, (a, b) in factors.items()}


def comfy(name: str) -> str:
    """ComfyUI's spelling of a native HunyuanVideo layer, written out independently."""
    for theirs, ours in (
        (r"(img|txt)_attn_qkv", r"\1_attn.qkv"),
        (r"(img|txt)_attn_proj", r"\1_attn.proj"),
        (r"(img|txt)_mod\.linear", r"\1_mod.lin"),
        (r"(img|txt)_mlp\.fc1", r"\1_mlp.0"),
        (r"(img|txt)_mlp\.fc2", r"\1_mlp.2"),
        (r"modulation\.linear", "modulation.lin"),
        (r"self_attn_(qkv|proj)", r"self_attn.\1"),
        (r"(blocks\.\d+)\.mlp\.fc1", r"\1.mlp.0"),
        (r"(blocks\.\d+)\.mlp\.fc2", r"\1.mlp.2"),
        (r"(time_in|guidance_in|t_embedder)\.mlp\.0", r"\1.in_layer"),
        (r"(time_in|guidance_in|t_embedder)\.mlp\.2", r"\1.out_layer"),
        (r"c_embedder\.linear_1", "c_embedder.in_layer"),
        (r"c_embedder\.linear_2", "c_embedder.out_layer"),
    ):
        name = re.sub(theirs, ours, name)
    return name


Namer = Callable[[str], str]
NAMINGS: dict[str, Namer] = {
    "diffusion_model": lambda n: f"diffusion_model.{n}",
    "transformer": lambda n: f"transformer.{n}",
    "bare": lambda n: n,
    "peft": lambda n: f"base_model.model.{n}",
    "kohya": lambda n: f"lora_unet_{n.replace('.', '_')}",
    "double underscore": lambda n: f"lora_unet__{n.replace('.', '_')}",
}
ENDINGS = {
    "A/B": (".lora_A.weight", ".lora_B.weight", False),
    "down/up": (".lora_down.weight", ".lora_up.weight", True),
    "peft raw": (".lora_A.default.weight", ".lora_B.default.weight", False),
}


def write(
    path: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    naming: str = "diffusion_model",
    ending: str = "A/B",
    alpha: float | None = None,
    rename: Namer = str,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    down, up, _ = ENDINGS[ending]
    tensors = dict(extra or {})
    for layer, (a, b) in factors.items():
        name = NAMINGS[naming](rename(layer))
        tensors |= {name + down: a.clone(), name + up: b.clone()}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def packed(model: VideoModel) -> VideoModel:
    """The blocks' matrices in fp8."""
    module = copy.deepcopy(model.module)
    for block in model.family.blocks(module):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                path, _, last = name.rpartition(".")
                fp8 = layer.weight.to(torch.float8_e4m3fn)
                setattr(block.get_submodule(path), last, Fp8Linear(fp8, None, layer.bias))
    return replace(model, module=module, _fingerprint="")

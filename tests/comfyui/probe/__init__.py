"""Nodes that a test puts into a graph of stock nodes: tensors from a file, and into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class ProbeConditioning:
    """CONDITIONING as text encoders make it: "text" and the other tensors of a file, by name."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": ("STRING", {})}}

    def run(self, file: str) -> tuple[list[list[Any]]]:
        tensors = load_file(file)
        return ([[tensors.pop("text"), tensors]],)


class _Noise:
    def __init__(self, noise: torch.Tensor) -> None:
        self.seed, self._noise = 0, noise

    def generate_noise(self, _latent: dict[str, Any]) -> torch.Tensor:
        return self._noise


class ProbeNoise:
    """NOISE from a file."""

    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "run", ("NOISE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": ("STRING", {})}}

    def run(self, file: str) -> tuple[_Noise]:
        return (_Noise(load_file(file)["noise"]),)


class ProbeSave:
    """A LATENT into a file."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "run", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent": ("LATENT",), "file": ("STRING", {})}}

    def run(self, latent: dict[str, Any], file: str) -> dict[str, Any]:
        save_file({"samples": latent["samples"].float().contiguous()}, Path(file))
        return {"ui": {"text": [file]}}


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (ProbeConditioning, ProbeNoise, ProbeSave)}

"""KeyTable: which rows of which native tensor are which tensor of diffusers.

All row operations act on dim 0 (output features), so that the same parts hold for a layer's
weight, its bias and the B matrix of a LoRA on it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import AccVideoError


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, stop) of a native tensor, which are one diffusers layer or parameter."""

    layer: str
    start: int
    stop: int
    swap: bool = False
    """The two halves of the rows change places (scale and shift of an AdaLN)."""

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def reorder(self, x: Tensor) -> Tensor:
        """The part's rows [rows, ...] in the other naming's order; its own inverse."""
        if not self.swap or x.dim() == 0 or x.shape[0] == 1:
            return x
        half = x.shape[0] // 2
        return torch.cat([x[half:], x[:half]])


Rules = dict[str, tuple[Part, ...]]
"""Native layer (or bare parameter) -> its parts in row order."""


def one(layer: str, rows: int, *, swap: bool = False) -> tuple[Part, ...]:
    """A native layer that is one diffusers layer."""
    return (Part(layer, 0, rows, swap),)


def fused(*layers: tuple[str, int]) -> tuple[Part, ...]:
    """A native layer whose rows are several diffusers layers, given as (layer, rows)."""
    parts, start = [], 0
    for layer, rows in layers:
        parts.append(Part(layer, start, start + rows))
        start += rows
    return tuple(parts)


class KeyTable:
    """A bijection between the native and the diffusers layers of one concrete network.

    A name is a layer and what follows its last dot ("weight", "bias", "scale_weight", ...), or a
    bare parameter that the table lists itself.
    """

    def __init__(self, rules: Rules) -> None:
        self._parts = dict(rules)
        self._whole: dict[str, str] = {}
        for native, parts in self._parts.items():
            stop = 0
            for part in parts:
                if part.start != stop or part.rows < 1 or part.layer in self._whole:
                    raise ValueError(f"{part} of {native!r} overlaps, leaves a gap or is not new")
                self._whole[part.layer] = native
                stop = part.stop

    def native_layers(self) -> tuple[str, ...]:
        return tuple(self._parts)

    def diffusers_layers(self) -> tuple[str, ...]:
        return tuple(self._whole)

    def parts(self, native_layer: str) -> tuple[Part, ...]:
        """The diffusers parts of a native layer in row order; KeyError when unknown."""
        return self._parts[native_layer]

    def whole(self, diffusers_layer: str) -> str:
        """The native layer that a diffusers layer is a part of; KeyError when unknown."""
        return self._whole[diffusers_layer]

    def part(self, diffusers_layer: str) -> Part:
        """The rows of `whole(diffusers_layer)` that the layer is; KeyError when unknown."""
        parts = self.parts(self.whole(diffusers_layer))
        return next(part for part in parts if part.layer == diffusers_layer)

    def to_diffusers(self, name: str, x: Tensor) -> list[tuple[str, Tensor]]:
        """One native tensor -> its diffusers tensors, which are views unless rows change places.

        A tensor of no or one row (the scale of a whole tensor) belongs to every part.

        Raises:
            KeyError: the table does not know the name.
            AccVideoError: the tensor has another number of rows than the network.
        """
        layer, suffix = split_name(name, self._parts)
        parts = self.parts(layer)
        if x.dim() == 0 or x.shape[0] == 1:
            return [(join_name(part.layer, suffix), x) for part in parts]
        _check_rows(name, x, parts[-1].stop)
        if len(parts) == 1:
            return [(join_name(parts[0].layer, suffix), parts[0].reorder(x))]
        return [
            (join_name(part.layer, suffix), part.reorder(x[part.start : part.stop]))
            for part in parts
        ]

    def to_native(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Diffusers tensors -> native tensors; any subset whose fused layers are complete.

        Raises:
            KeyError: the table does not know a name.
            AccVideoError: a part of a fused layer is missing or has a wrong number of rows.
        """
        groups: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name, x in state.items():
            layer, suffix = split_name(name, self._whole)
            groups.setdefault((self.whole(layer), suffix), {})[layer] = x
        result = {}
        for (native, suffix), found in groups.items():
            rows = []
            for part in self.parts(native):
                name = join_name(part.layer, suffix)
                if part.layer not in found:
                    raise AccVideoError(
                        f"{name!r} is missing, without which {join_name(native, suffix)!r} cannot "
                        "be put together; give all tensors of the network"
                    )
                _check_rows(name, found[part.layer], part.rows)
                rows.append(part.reorder(found[part.layer]))
            result[join_name(native, suffix)] = rows[0] if len(rows) == 1 else torch.cat(rows)
        return result


class Shapes:
    """The shapes of a file under diffusers' names, whichever of the two namings it has."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], probe: KeyTable, naming: str = "diffusers"
    ) -> None:
        self.shapes = shapes
        self.naming = naming
        self._probe = probe

    def name(self, layer: str) -> str:
        """What the file calls a diffusers layer (of a first block)."""
        return layer if self.naming == "diffusers" else self._probe.whole(layer)

    def get(self, layer: str, suffix: str = "weight") -> tuple[int, ...] | None:
        return self.shapes.get(join_name(self.name(layer), suffix))

    def __getitem__(self, layer: str) -> tuple[int, ...]:
        shape = self.get(layer)
        if shape is None:
            raise AccVideoError(
                f"the tensor {join_name(self.name(layer), 'weight')!r} is missing, so the file "
                "is incomplete; give all shards of the checkpoint, or download it again"
            )
        return shape

    def count(self, layer: str) -> int:
        """Number of blocks, given a layer of the first one."""
        pattern = self.name(layer).replace(".0.", ".{}.", 1) + ".weight"
        number = 0
        while pattern.format(number) in self.shapes:
            number += 1
        return number


def split_name(name: str, layers: Container[str]) -> tuple[str, str]:
    """Name -> (layer, suffix); the suffix of a bare parameter is empty."""
    if name in layers:
        return name, ""
    layer, _, suffix = name.rpartition(".")
    return layer, suffix


def join_name(layer: str, suffix: str) -> str:
    return f"{layer}.{suffix}" if suffix else layer


def _check_rows(name: str, x: Tensor, rows: int) -> None:
    if x.dim() == 0 or x.shape[0] != rows:
        raise AccVideoError(
            f"the tensor {name!r} has shape {tuple(x.shape)} where {rows} rows are expected; it "
            "belongs to a network of another size, so choose the file of this one"
        )

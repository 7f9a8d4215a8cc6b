"""Building a network from a checkpoint: an empty module first, then one tensor after the other.

The module is made without memory for its weights, and every tensor goes from the mapped file to
its place. One that already has the dtype and the device asked for is not copied at all, so that
loading needs the memory of the weights once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AccVideoError
from .checkpoint import Checkpoint
from .keys.spelling import canonical, is_companion
from .keys.table import KeyTable
from .quantised import FP8_DTYPES, Fp8Linear, GgufLinear, fp8_dense, gguf_dense

FP8_FORMATS = {str(dtype).removeprefix("torch."): dtype for dtype in FP8_DTYPES}
"""ComfyUI's names of the formats that it may state for a layer, of those that are read here."""

STRETCH = 2**22
"""Numbers that are converted at once: what loading needs beside the weights."""

_OTHER_FILE = "use a bf16, fp8 or GGUF file of the model"


@dataclass(frozen=True, slots=True)
class Stored:
    """One weight as a file holds it: plain numbers, fp8 with its scale, or GGUF blocks."""

    data: Tensor
    """Of GGUF blocks the bytes [O, bytes of a row]."""
    shape: tuple[int, ...]
    """Of the numbers."""
    scale: Tensor | None = None
    """Float32, one number or one per row [O, 1]."""
    quant_type: int | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The numbers; the stored tensor itself where it has the dtype already."""
        if self.quant_type is not None:
            return gguf_dense(self.data, self.quant_type, dtype).reshape(self.shape)
        return fp8_dense(self.data, self.scale, dtype)

    def linear(self, device: torch.device, bias: Tensor | None) -> nn.Linear:
        """A layer that keeps the weight packed."""
        if self.quant_type is not None:
            return GgufLinear(self.data.to(device), self.quant_type, bias)
        scale = None if self.scale is None else self.scale.to(device)
        return Fp8Linear(self.data.to(device), scale, bias)

    def rows(self, start: int, stop: int) -> Stored:
        """Rows [start, stop) with their scales."""
        data = self.data[start:stop]
        by_row = self.scale is not None and self.scale.dim() > 0
        scale = self.scale[start:stop] if by_row and self.scale is not None else self.scale
        return replace(self, data=data, shape=(len(data), *self.shape[1:]), scale=scale)

    def split(self, name: str, table: KeyTable) -> list[tuple[str, Stored]]:
        """diffusers' parts of a native weight; each takes its rows of the scale along."""
        # Bytes can be cut and joined whatever they mean.
        fp8 = self.data.dtype in FP8_DTYPES
        data = table.to_diffusers(name, self.data.view(torch.uint8) if fp8 else self.data)
        scales = [None] * len(data)
        if self.scale is not None:
            scales = [scale for _, scale in table.to_diffusers(name, self.scale)]
        return [
            (
                part,
                replace(
                    self,
                    data=piece.view(self.data.dtype) if fp8 else piece,
                    shape=(*piece.shape[:1], *self.shape[1:]),
                    scale=scale,
                ),
            )
            for (part, piece), scale in zip(data, scales, strict=True)
        ]


@dataclass(eq=False)
class Network:
    """A network whose weights still lie in their file."""

    checkpoint: Checkpoint
    cls: Any
    """Class of diffusers."""
    config: Mapping[str, Any]
    table: KeyTable | None = None
    """Between the file's native names and diffusers'; None: the file has the latter."""
    module: nn.Module = field(init=False, repr=False)
    """The network, without weights until `load`."""

    def __post_init__(self) -> None:
        self.module = empty(self.cls, self.config)
        self._shapes = {name: tuple(x.shape) for name, x in self.module.state_dict().items()}
        names = canonical(self.checkpoint.names)
        self._keys = {name: key for key, name in names.items()}
        self._parts = {n: self._parts_of(n) for n in self._keys if not is_companion(n)}
        self._check_names()
        self._formats = self._stated_formats(names)
        self._check_formats()

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory of the loaded weights, from headers alone."""
        return sum(self._bytes(name, dtype) for name in self._parts)

    def copied_bytes(self, dtype: torch.dtype) -> int:
        """Of `bytes`, those that are made anew; the rest stays in the mapped file."""
        return sum(
            self._bytes(name, dtype) for name in self._parts if not self._lies_ready(name, dtype)
        )

    def load(self, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """Put every weight in its place; the module is frozen and in eval mode. Once only.

        Raises:
            AccVideoError: a weight has another shape than its place.
        """
        device = torch.device(device)
        self._block = _Block(self.copied_bytes(dtype)) if device.type == "cpu" else None
        # Parameters made inside inference mode could never be trained against.
        with torch.inference_mode(False), torch.no_grad():
            for name in self._parts:
                self._load_one(name, device, dtype)
            for owner in self.module.modules():
                for key, x in owner.named_buffers(recurse=False):
                    owner._buffers[key] = x.to(device)
        self._block = None
        return self.module.eval().requires_grad_(False)

    def _load_one(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        stored = self._stored(name)
        parts = [(name, stored)] if self.table is None else stored.split(name, self.table)
        mapped = False
        for part, piece in parts:
            if piece.shape != self._shapes[part]:
                raise AccVideoError(
                    f"the weight {name!r} in {str(self.checkpoint.path)!r} has shape {piece.shape} "
                    f"where the network has {self._shapes[part]}; choose the file of one whole "
                    "network of this size"
                )
            placed = self._place(part, piece, device, dtype, self._keys[name])
            mapped |= placed.data_ptr() == piece.data.data_ptr()
        if not mapped:
            self.checkpoint.forget(self._keys[name])

    def _place(
        self, part: str, piece: Stored, device: torch.device, dtype: torch.dtype, key: str
    ) -> Tensor:
        """Put a weight where the module has it; returns what lies there now."""
        path, _, attribute = part.rpartition(".")
        owner = self.module.get_submodule(path)
        packed = piece.quant_type is not None or piece.data.dtype in FP8_DTYPES
        if packed and self._may_stay_packed(part):
            layer = piece.linear(device, owner.bias)  # type: ignore[arg-type]
            above, _, child = path.rpartition(".")
            setattr(self.module.get_submodule(above), child, layer)
            return layer.weight
        value = self._value(piece, device, self._dtype_at(part, dtype), key)
        if attribute in owner._buffers:
            owner._buffers[attribute] = value
        else:
            setattr(owner, attribute, nn.Parameter(value, requires_grad=False))
        return value

    def _value(self, piece: Stored, device: torch.device, dtype: torch.dtype, key: str) -> Tensor:
        """A weight as it lies in the file, or converted a stretch of rows at a time."""
        if piece.data.dtype == dtype and piece.scale is None:
            return piece.data.to(device)
        if self._block is None:
            value = torch.empty(piece.shape, dtype=dtype, device=device)
        else:
            value = self._block.take(piece.shape, dtype)
        if not piece.shape:
            return value.copy_(piece.dense(dtype))
        step = max(1, STRETCH * piece.shape[0] // max(1, value.numel()))
        for start in range(0, piece.shape[0], step):
            value[start : start + step] = piece.rows(start, start + step).dense(dtype)
            self.checkpoint.forget(key)
        return value

    def _stored(self, name: str) -> Stored:
        key = self._keys[name]
        entry, data = self.checkpoint.entries[key], self.checkpoint.get(key)
        if entry.quant_type is not None:
            stored = Stored(data, entry.shape, quant_type=entry.quant_type)
            # Rows that do not lie in rows of blocks cannot be told apart.
            whole = data.dim() == len(entry.shape) == 2 and data.shape[0] == entry.shape[0]
            return stored if whole else Stored(stored.dense(torch.float32), entry.shape)
        if name in self._formats:
            data = data.view(self._formats[name])
        return Stored(data, entry.shape, self._scale(name, entry.shape))

    def _scale(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        layer, _, attribute = name.rpartition(".")
        found = [f"{layer}.{companion}" for companion in ("scale_weight", "weight_scale")]
        keys = [self._keys[n] for n in found if n in self._keys]
        if attribute != "weight" or not keys:
            return None
        scale = self.checkpoint.get(keys[0]).float().clone()
        if scale.numel() == 1:
            return None if scale.item() == 1 else scale.reshape(())
        if scale.numel() == shape[0]:
            return scale.reshape(-1, *[1] * (len(shape) - 1))
        raise AccVideoError(
            f"the scale {keys[0]!r} in {str(self.checkpoint.path)!r} has shape "
            f"{tuple(scale.shape)}, neither one number nor one per row; {_OTHER_FILE}"
        )

    def _parts_of(self, name: str) -> list[str]:
        """diffusers' names of what one tensor of the file is; none when it is unknown."""
        if self.table is None:
            return [name]
        try:
            return [part for part, _ in self.table.to_diffusers(name, torch.empty(()))]
        except KeyError:
            return []

    def _check_names(self) -> None:
        """Nothing is left random, and nothing in the file is left out."""
        where = repr(str(self.checkpoint.path))
        given = {part for parts in self._parts.values() for part in parts}
        missing = sorted(self._shapes.keys() - given)
        if missing:
            raise AccVideoError(
                f"{where} lacks {len(missing)} of the network's weights (such as "
                f"{', '.join(missing[:3])}); download the model again, with all its shards"
            )
        unknown = [n for n, parts in self._parts.items() if not self._shapes.keys() & {*parts}]
        if unknown:
            raise AccVideoError(
                f"{where} has {len(unknown)} weights that its network has not (such as "
                f"{', '.join(unknown[:3])}); choose an unmodified model"
            )

    def _stated_formats(self, names: Mapping[str, str]) -> dict[str, torch.dtype]:
        """Name of a weight -> the fp8 format that ComfyUI's notes state for it."""
        where = repr(str(self.checkpoint.path))
        try:
            header = json.loads(self.checkpoint.metadata.get("_quantization_metadata", "{}"))
            notes = {
                names.get(f"{layer}.weight", layer): note["format"]
                for layer, note in header.get("layers", {}).items()
            }
            for name, key in self._keys.items():
                layer, _, attribute = name.rpartition(".")
                if attribute == "comfy_quant":
                    raw = bytes(self.checkpoint.get(key).tolist())
                    notes[f"{layer}.weight"] = json.loads(raw)["format"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AccVideoError(
                f"{where} says in no known way how its weights are stored; {_OTHER_FILE}"
            ) from error
        foreign = sorted({str(x) for x in notes.values() if x not in FP8_FORMATS})
        if foreign:
            raise AccVideoError(
                f"{where} has weights stored as {', '.join(foreign)}, which is not supported; "
                f"{_OTHER_FILE}"
            )
        return {name: FP8_FORMATS[x] for name, x in notes.items()}

    def _check_formats(self) -> None:
        """Refuse what is neither numbers nor a format that can be unpacked."""
        for name in self._parts:
            entry = self.checkpoint.entries[self._keys[name]]
            if entry.quant_type is not None:
                kind = _unsupported_gguf(entry.quant_type)
            elif entry.dtype is not None and entry.dtype.is_floating_point or name in self._formats:
                continue
            else:
                kind = str(entry.dtype or "4-bit floats or the like").removeprefix("torch.")
            if kind:
                raise AccVideoError(
                    f"the weight {name!r} in {str(self.checkpoint.path)!r} is stored in a number "
                    f"format that is not supported ({kind}); {_OTHER_FILE}"
                )

    def _bytes(self, name: str, dtype: torch.dtype) -> int:
        entry, part = self.checkpoint.entries[self._keys[name]], self._parts[name][0]
        if self._stays_packed(name):
            return entry.nbytes
        return math.prod(entry.shape) * self._dtype_at(part, dtype).itemsize

    def _lies_ready(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the mapped file holds the weight as it is wanted."""
        stored = self.checkpoint.entries[self._keys[name]].dtype
        return stored == self._dtype_at(self._parts[name][0], dtype) or self._stays_packed(name)

    def _stays_packed(self, name: str) -> bool:
        entry = self.checkpoint.entries[self._keys[name]]
        fp8 = entry.dtype in FP8_DTYPES or name in self._formats
        return (fp8 or entry.quant_type is not None) and self._may_stay_packed(self._parts[name][0])

    def _may_stay_packed(self, part: str) -> bool:
        owner, _, attribute = part.rpartition(".")
        linear = isinstance(self.module.get_submodule(owner), nn.Linear)
        return linear and attribute == "weight" and not self._is_wide(part)

    def _dtype_at(self, part: str, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32) if self._is_wide(part) else dtype

    def _is_wide(self, part: str) -> bool:
        """Some small layers diffusers keeps in float32, whatever the rest is in."""
        wide = getattr(self.cls, "_keep_in_fp32_modules", None) or ()
        return not set(part.split(".")).isdisjoint(wide)


class _Block:
    """One piece of main memory for all weights that had to be converted.

    The system has it back as soon as the last of them goes; many smaller pieces would stay with
    the process's allocator.
    """

    ALIGNMENT = 64

    def __init__(self, size: int) -> None:
        # Memory that nothing is written to costs nothing.
        self._bytes = torch.empty(size + 2**20, dtype=torch.uint8)
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for a tensor, in the block while it fits."""
        start = -(-self._used // self.ALIGNMENT) * self.ALIGNMENT
        end = start + math.prod(shape) * dtype.itemsize
        if end > len(self._bytes):
            return torch.empty(shape, dtype=dtype)
        self._used = end
        return self._bytes[start:end].view(dtype).view(shape)


def empty(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    """A network of diffusers without memory for its weights; its fixed tables are there."""
    from accelerate import init_empty_weights

    # Tables made in __init__ (of positions) are not in any file, so they must be real.
    with torch.inference_mode(False), init_empty_weights(include_buffers=False):
        return cls.from_config(dict(config))


def _unsupported_gguf(quant_type: int) -> str:
    """The name of a GGUF format that diffusers cannot unpack, or nothing."""
    import gguf
    from diffusers.quantizers.gguf.utils import dequantize_functions

    kind = gguf.GGMLQuantizationType(quant_type)
    return "" if kind in dequantize_functions else kind.name

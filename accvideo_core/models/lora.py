"""LoRAs on a network: matching a file to its layers, merging it, or keeping it beside the weights.

Shapes: A [r, in], B [out, r]; W [out, in, ...] is a layer's weight. A LoRA of strength s adds
s * scale * B @ A to W, with scale = alpha / r.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import AccVideoError
from .experts import Experts, networks_of
from .keys.table import KeyTable, join_name
from .lora_file import (
    FLUX,
    LOW_PREFIX,
    RawLayer,
    RawLora,
    is_flux,
    read_lora,
    resembles,
    resolve,
)
from .lora_layout import split
from .quantised import AdaptedLinear
from .video_model import COMPUTE_DTYPES, VideoModel

log = logging.getLogger(__name__)

MODES = ("merge", "adapter")
EXPERTS = ("both", "high", "low")


@dataclass(frozen=True, slots=True, eq=False)
class LoraDelta:
    """scale * B @ A on the weight of a diffusers layer."""

    layer: str
    a: Tensor
    b: Tensor
    scale: float
    kind: str = "weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in, ...] of the weight that it fits."""
        return (self.b.shape[0], *self.a.shape[1:])

    def add_to(self, x: Tensor, strength: float) -> None:
        """Add to a float32 weight in place."""
        a, b = (y.to(x.device, x.dtype).flatten(1) for y in (self.a, self.b))
        x.view(x.shape[0], -1).addmm_(b, a, alpha=strength * self.scale)


@dataclass(frozen=True, slots=True, eq=False)
class DiffDelta:
    """A difference added as it is to a layer's weight or bias, or to a bare parameter (kind "")."""

    layer: str
    kind: str
    value: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def add_to(self, x: Tensor, strength: float) -> None:
        """Add to a float32 parameter in place."""
        x.add_(self.value.to(x.device, x.dtype), alpha=strength * self.scale)


Delta = LoraDelta | DiffDelta


@dataclass(frozen=True, slots=True, eq=False)
class Matched:
    """A file's deltas for one network, and the file's names that have no place in it."""

    deltas: tuple[Delta, ...]
    unmatched: tuple[str, ...]


def apply_loras(
    model: VideoModel,
    files: Sequence[tuple[Path, float]],
    how: str = "merge",
    experts: str = "both",
) -> VideoModel:
    """A model with LoRAs on it; whatever they do not touch is shared with `model`, unchanged.

    The fingerprint follows from the base's and from what the LoRAs add, so that it is the same
    merged or kept as adapters, and another one than the base's.

    Args:
        model: the base.
        files: (path, strength) of each LoRA; they add up.
        how: "merge" makes new weights (in float32, rounded once); "adapter" computes the low-rank
            part beside the untouched weight. Quantised layers always keep adapters.
        experts: which of two experts to change. A file made for one of them changes that one.

    Raises:
        AccVideoError: a file is damaged, no LoRA, of another size, or matches no layer.
    """
    _check_choices(model, files, how, experts)
    used = [(read_lora(path), strength) for path, strength in files if strength]
    if not used:
        return model
    marks: list[str] = []
    # ComfyUI runs nodes in inference mode, whose tensors autograd refuses.
    with torch.inference_mode(False), torch.no_grad():
        module = shared_copy(model.module)
        for name, network in networks_of(module).items():
            changes: dict[tuple[str, str], list[tuple[Delta, float]]] = {}
            for raw, strength in used:
                if not _meant_for(raw, name, experts):
                    continue
                for delta in match_lora(raw, model, name).deltas:
                    changes.setdefault((delta.layer, delta.kind), []).append((delta, strength))
                    marks.append(f"{name} {strength} {_mark(delta)}")
            _change(network, changes, how)
    digest = hashlib.sha256(" ".join([model.fingerprint, *sorted(marks)]).encode())
    names = [f"{raw.path.name}{'' if s == 1 else f' x {s:g}'}" for raw, s in used]
    source = " + ".join([model.source or model.family.name, *names])
    return replace(model, module=module, source=source, _fingerprint=digest.hexdigest()[:16])


def match_lora(lora: RawLora | Path, model: VideoModel, expert: str = "") -> Matched:
    """A file's deltas under diffusers' layer names.

    Args:
        lora: the file, or what `read_lora` read.
        model: the network that they go on.
        expert: which of two experts, "high" or "low"; "" for a single network.

    Raises:
        AccVideoError: no name matches the network, or the sizes do not.
    """
    raw = lora if isinstance(lora, RawLora) else read_lora(lora)
    network = networks_of(model.module)[expert]
    table = model.family.key_table(dict(network.config))  # type: ignore[arg-type]
    layers = _for_expert(raw, expert)
    if expert and not layers:
        return Matched((), ())
    _refuse_flux(raw, network, layers)
    places = resolve(layers, table)
    deltas: list[Delta] = []
    misfits = []
    for name, (naming, layer) in places.items():
        try:
            found = list(_deltas(layers[name], naming, layer, table, network))
        except AccVideoError:
            misfits.append(name)
            continue
        deltas += found
    fitting = len(places) - len(misfits)
    if not places:
        _refuse_all(raw, model)
    if len(misfits) >= fitting:
        raise AccVideoError(
            f"LoRA {raw.path.name!r} is for a {model.family.title} of another size: "
            f"{len(misfits)} of its {len(layers)} layers have other shapes than "
            f"{model.source or 'this network'}, such as {misfits[0]!r}; choose the LoRA of this "
            "size"
        )
    unmatched = (*(n for n in layers if n not in places), *misfits, *raw.others)
    if unmatched:
        log.warning(
            "%d names of LoRA %s have no place in %s and are left out: %s%s",
            len(unmatched),
            raw.path.name,
            model.source or model.family.title,
            ", ".join(unmatched[:5]),
            ", ..." if len(unmatched) > 5 else "",
        )
    return Matched(tuple(deltas), unmatched)


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy of the modules, hooks and settings whose parameters and buffers are the originals."""
    return copy.deepcopy(module, {id(x): x for x in [*module.parameters(), *module.buffers()]})


def _meant_for(raw: RawLora, expert: str, chosen: str) -> bool:
    return not expert or (raw.expert or chosen) in (expert, "both")


def _for_expert(raw: RawLora, expert: str) -> dict[str, RawLayer]:
    """The layers for one expert, where a file names them for both."""
    if not any(name.startswith(LOW_PREFIX) for name in raw.layers):
        return raw.layers
    low = expert == "low"
    return {name: x for name, x in raw.layers.items() if name.startswith(LOW_PREFIX) == low}


def _deltas(
    raw: RawLayer, naming: str, layer: str, table: KeyTable, network: nn.Module
) -> Iterator[Delta]:
    """The deltas of one layer of a file. Raises AccVideoError where a shape does not fit."""
    native = naming == "native"
    if raw.a is not None and raw.b is not None:
        scale = 1.0 if raw.alpha is None else raw.alpha / raw.a.shape[0]
        b = raw.b.flatten(1)
        if native and b.shape[0] != table.parts(layer)[-1].stop:
            raise AccVideoError(f"B of {layer!r} has {b.shape[0]} rows")
        factors = split(table, layer, raw.a, b) if native else {layer: (raw.a, b)}
        for name, (a, rows) in factors.items():
            yield _fitting(LoraDelta(name, a, rows, scale), network)
        if raw.bias is not None:
            yield from _plain(layer, "bias", raw.bias, scale, table, native, network)
    for kind, value in (("weight", raw.diff), ("bias", raw.diff_b)):
        if value is not None:
            yield from _plain(layer, kind, value, 1.0, table, native, network)


def _plain(
    layer: str,
    kind: str,
    value: Tensor,
    scale: float,
    table: KeyTable,
    native: bool,
    network: nn.Module,
) -> Iterator[Delta]:
    found = table.to_diffusers(join_name(layer, kind), value) if native else [(layer, value)]
    for name, x in found:
        part = name.removesuffix(f".{kind}")
        bare = kind == "weight" and not isinstance(_find(network, part), nn.Module)
        yield _fitting(DiffDelta(part, "" if bare else kind, x, scale), network)


def _find(network: nn.Module, name: str) -> nn.Module | Tensor | None:
    """The module or bare parameter called `name`."""
    owner, _, last = name.rpartition(".")
    try:
        return getattr(network.get_submodule(owner), last, None)
    except AttributeError:
        return None


def _fitting(delta: Delta, network: nn.Module) -> Delta:
    target = _find(network, join_name(delta.layer, delta.kind))
    owner = _find(network, delta.layer)
    if delta.kind == "weight" and isinstance(owner, nn.Linear):
        shape = (owner.out_features, owner.in_features)  # a quantised weight has another shape
    else:
        shape = tuple(target.shape) if isinstance(target, Tensor) else None
    if delta.shape != shape:
        raise AccVideoError(f"{delta.layer!r} has shape {shape}, the file {delta.shape}")
    return delta


def _change(
    network: nn.Module,
    changes: Mapping[tuple[str, str], Sequence[tuple[Delta, float]]],
    how: str,
) -> None:
    """Give the changed layers of `network`, a shared copy, weights of their own."""
    kept = 0
    for (layer, kind), group in changes.items():
        owner = _find(network, layer)
        beside: list[tuple[Delta, float]] = []
        if kind == "weight" and isinstance(owner, nn.Linear):
            quantised = owner.weight.dtype not in COMPUTE_DTYPES
            kept += quantised
            low = how == "adapter"
            beside = [x for x in group if quantised or (low and isinstance(x[0], LoraDelta))]
        merged = [x for x in group if x not in beside]
        if merged:
            _merge(network, layer, kind, merged)
        if beside and isinstance(owner, nn.Linear):
            device = owner.weight.device
            factors = [_factors(delta, strength, device) for delta, strength in beside]
            path, _, last = layer.rpartition(".")
            setattr(network.get_submodule(path), last, AdaptedLinear(owner, factors))
    if kept and how == "merge":
        log.warning("%d layers are quantised and keep their LoRAs beside their weights", kept)


def _merge(network: nn.Module, layer: str, kind: str, group: Sequence[tuple[Delta, float]]) -> None:
    """A new parameter, summed in float32 and rounded once."""
    path, _, last = join_name(layer, kind).rpartition(".")
    owner = network.get_submodule(path)
    while isinstance(owner, AdaptedLinear):
        owner = owner.inner
    old = getattr(owner, last)
    x = old.detach().to(torch.promote_types(old.dtype, torch.float32), copy=True)
    for delta, strength in group:
        delta.add_to(x, strength)
    setattr(owner, last, nn.Parameter(x.to(old.dtype), requires_grad=False))


def _factors(delta: Delta, strength: float, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """(A, B, scale) of a change to a linear layer's weight."""
    if isinstance(delta, LoraDelta):
        return delta.a.to(device), delta.b.to(device), strength * delta.scale
    value = delta.value.to(device)
    eye = torch.eye(min(value.shape), dtype=value.dtype, device=device)
    a, b = (value, eye) if value.shape[0] < value.shape[1] else (eye, value)
    return a, b, strength * delta.scale


def _mark(delta: Delta) -> str:
    """A delta's digest: its place, its values and its scale."""
    tensors = (delta.a, delta.b) if isinstance(delta, LoraDelta) else (delta.value,)
    digest = hashlib.sha256(f"{delta.layer} {delta.kind} {delta.scale}".encode())
    for x in tensors:
        digest.update(x.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_choices(
    model: VideoModel, files: Iterable[tuple[Path, float]], how: str, experts: str
) -> None:
    for name, value, known in (("how", how, MODES), ("experts", experts, EXPERTS)):
        if value not in known:
            raise AccVideoError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    if experts != "both" and not isinstance(model.module, Experts):
        raise AccVideoError(
            f"experts is {experts!r}, but {model.source or model.family.title} is one network; "
            "choose both"
        )
    for path, strength in files:
        if not math.isfinite(strength):
            raise AccVideoError(f"the strength of {path} is {strength}; it must be a number")


def _refuse_all(raw: RawLora, model: VideoModel) -> None:
    kind = resembles(raw.layers)
    seems = f", it seems to be for {kind}" if kind else ""
    raise AccVideoError(
        f"LoRA {raw.path.name!r} matches no layer of {model.source or 'the network'} "
        f"({model.family.title}){seems} (its layers are called like "
        f"{sorted(raw.layers)[0]!r}); choose a LoRA for {model.family.title}"
    )


def _refuse_flux(raw: RawLora, network: nn.Module, layers: Iterable[str]) -> None:
    blocks = network.config.get("num_layers")  # type: ignore[union-attr, operator]
    if is_flux(layers) and blocks != FLUX[0]:
        raise AccVideoError(
            f"LoRA {raw.path.name!r} is for Flux, whose layers have the same names (19 double and "
            f"38 single blocks, this network has {blocks} double blocks); choose another LoRA"
        )

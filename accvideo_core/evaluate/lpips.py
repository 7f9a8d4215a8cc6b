"""LPIPS, the learned perceptual distance of two images (Zhang et al. 2018), from weights by path.

The network is written out here, because the package lpips downloads what it needs. Weights are
what people have: torchvision's AlexNet or VGG-16 and the linear heads of the package lpips (version
0.1), in one file or two, under the names that either gives them.

Shapes: T frames, H, W pixels, 3 colours in [0, 1]; C, h, w features.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AccVideoError
from ..models.weights_file import SafetensorsFile, TorchFile

# Of images in [-1, 1]; from the published network's scaling layer.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

_HEADS = 5
_BACKBONE = re.compile(r"(?:.*\.)?(?:features|slice\d)\.(\d+)\.(weight|bias)")
"""torchvision's `features.0.weight`, and lpips' `net.slice1.0.weight`: the numbers are the same."""
_HEAD = re.compile(r"(?:.*\.)?lins?\.?(\d)\.model\.\d\.weight")
"""`lin0.model.1.weight`, and in a whole LPIPS model `lins.0.model.1.weight` besides."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of a backbone: a convolution with its ReLU, or the pooling before one."""

    kind: Literal["conv", "pool"]
    number: int = 0
    """Of the convolution, in the files' names."""
    stride: int = 1
    padding: int = 1
    tap: bool = False
    """Whether features are compared after it."""


@dataclass(frozen=True, slots=True)
class _Backbone:
    first: tuple[int, ...]
    """Shape of the first convolution's weight, by which files are told apart."""
    layers: Sequence[_Layer]
    window: int
    """Of the poolings, whose stride is 2."""
    widths: tuple[int, ...]
    """Channels at the taps."""
    smallest: int
    """Pixels of the smallest image that leaves features at the last tap."""


def _conv(number: int, tap: bool = False, stride: int = 1, padding: int = 1) -> _Layer:
    return _Layer("conv", number, stride, padding, tap)


_POOL = _Layer("pool")

_BACKBONES = {
    "AlexNet": _Backbone(
        (64, 3, 11, 11),
        (
            _conv(0, True, stride=4, padding=2),
            _POOL,
            _conv(3, True, padding=2),
            _POOL,
            _conv(6, True),
            _conv(8, True),
            _conv(10, True),
        ),
        window=3,
        widths=(64, 192, 384, 256, 256),
        smallest=31,
    ),
    "VGG-16": _Backbone(
        (64, 3, 3, 3),
        (
            *(_conv(0), _conv(2, True), _POOL, _conv(5), _conv(7, True), _POOL),
            *(_conv(10), _conv(12), _conv(14, True), _POOL),
            *(_conv(17), _conv(19), _conv(21, True), _POOL),
            *(_conv(24), _conv(26), _conv(28, True)),
        ),
        window=2,
        widths=(64, 128, 256, 512, 512),
        smallest=16,
    ),
}

_REMEDY = (
    "give torchvision's alexnet-owt-*.pth or vgg16-*.pth and the package lpips' "
    "weights/v0.1/alex.pth or vgg.pth (which torchmetrics has too), or one file of the whole model"
)


class Lpips:
    """The distance of frames [T, H, W, 3] to others of their shape, [T]; 0 for equal ones.

    Args:
        weights: of the convolutions, as "0.weight", "0.bias", ..., by their numbers.
        heads: the weights of the linear heads [C], one for each tap.
    """

    def __init__(self, network: str, weights: Mapping[str, Tensor], heads: Sequence[Tensor]):
        self.network, self.backbone = network, _BACKBONES[network]
        self.smallest = self.backbone.smallest
        self._weights, self._heads = dict(weights), list(heads)
        self.digest = _digest([*(weights[name] for name in sorted(weights)), *heads])

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        self._move(a.device)
        one, other = self._features(a), self._features(b)
        distances = [
            ((_unit(x) - _unit(y)).square() * head[:, None, None]).sum(dim=1).mean(dim=(1, 2))
            for x, y, head in zip(one, other, self._heads, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)

    def _features(self, frames: Tensor) -> list[Tensor]:
        """[T, C, h, w] at every tap."""
        x = (2 * frames.float() - 1 - frames.new_tensor(_SHIFT)) / frames.new_tensor(_SCALE)
        x, taps = x.movedim(-1, 1), []
        for layer in self.backbone.layers:
            if layer.kind == "pool":
                x = F.max_pool2d(x, self.backbone.window, stride=2)
                continue
            weight, bias = (self._weights[f"{layer.number}.{part}"] for part in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, layer.stride, layer.padding).relu()
            if layer.tap:
                taps.append(x)
        return taps

    def _move(self, device: torch.device) -> None:
        if self._heads[0].device != device:
            self._weights = {name: x.to(device) for name, x in self._weights.items()}
            self._heads = [x.to(device) for x in self._heads]


def load_lpips(*paths: Path) -> Lpips:
    """LPIPS from a backbone's file and its heads' file, or from one file of both.

    Where no file has heads, those that an installed torchmetrics carries are used.

    Raises:
        AccVideoError: a file is missing or damaged, or weights are missing in them.
    """
    tensors = [(name, x) for path in paths for name, x in _tensors(path).items()]
    weights = {
        f"{found[1]}.{found[2]}": x.float()
        for name, x in tensors
        if (found := _BACKBONE.fullmatch(name))
    }
    shown = " and ".join(str(path) for path in paths)
    first = tuple(weights["0.weight"].shape) if "0.weight" in weights else None
    network = next((name for name, one in _BACKBONES.items() if one.first == first), None)
    if network is None:
        raise AccVideoError(f"{shown} holds no AlexNet and no VGG-16 for LPIPS; {_REMEDY}")
    wanted = [layer.number for layer in _BACKBONES[network].layers if layer.kind == "conv"]
    needed = {f"{number}.{part}" for number in wanted for part in ("weight", "bias")}
    if needed - weights.keys():
        raise AccVideoError(f"{shown} holds only a part of {network}; {_REMEDY}")
    heads = _heads(tensors) or _heads(_packaged_heads(network))
    if tuple(head.numel() for head in heads) != _BACKBONES[network].widths:
        raise AccVideoError(f"{shown} lacks the linear heads of LPIPS for {network}; {_REMEDY}")
    return Lpips(network, {name: weights[name] for name in needed}, heads)


def _heads(tensors: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    found = {int(m[1]): x.float().flatten() for n, x in tensors if (m := _HEAD.fullmatch(n))}
    return [found[number] for number in range(_HEADS) if number in found]


def _packaged_heads(network: str) -> list[tuple[str, Tensor]]:
    """The heads that lie in the package torchmetrics, which is found without importing it."""
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        return []
    name = {"AlexNet": "alex", "VGG-16": "vgg"}[network]
    path = Path(spec.origin).parent / "functional" / "image" / "lpips_models" / f"{name}.pth"
    return list(_tensors(path).items()) if path.is_file() else []


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise AccVideoError(f"there is no file {path} with weights of LPIPS; {_REMEDY}")
    file = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
    return {name: file.get(name) for name in file.entries}


def _unit(x: Tensor) -> Tensor:
    """Features of length 1 over the channels; those of length 0 stay 0."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()

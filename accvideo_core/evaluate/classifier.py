"""A small 3D CNN that reads the four attributes of a procedural clip, and its feature vector.

Its 64 features carry the Frechet distance of the embedded world. That is *not* FVD: the network is
ours and knows only these clips. To make it see what few-step sampling loses, it is also trained to
tell how blurred, how faded, how flat and how noisy a clip is.

Two are shipped: for clips of ``world`` and for those of ``image_world``.

Shapes: B clips [B, 3, T, 32, 32] in [-1, 1], features [B, 64].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import image_world, world

FEATURES = 64
DEGRADATIONS = ("blur", "fade", "contrast", "noise")
_ASSETS = Path(__file__).resolve().parent.parent / "assets"


class Classifier(nn.Module):
    """Four strided convolutions; energies of the fine layers join the coarse ones."""

    def __init__(
        self,
        attributes: Mapping[str, Sequence[str]] = world.ATTRIBUTES,
        frames: int = world.FRAMES,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [_stage(3, 24, (1, 2, 2)), _stage(24, 48, 2), _stage(48, 96, 2), _stage(96, 64, 2)]
        )
        length = (frames + 7) // 8  # three of the strides halve time, rounding up
        self.project = nn.Linear(64 * length * 2 * 2 + 24 + 48, FEATURES)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(values)) for name, values in attributes.items()}
        )
        self.degradation = nn.Linear(FEATURES, len(DEGRADATIONS))

    def features(self, video: Tensor) -> Tensor:
        """[B, 3, T, 32, 32] in [-1, 1] to [B, 64]."""
        x, energies = video, []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index < 2:
                energies.append(x.square().mean((2, 3, 4)))
        return torch.tanh(self.project(torch.cat([x.flatten(1), *energies], dim=1)))

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """Logits [B, classes] by attribute name."""
        features = self.features(video)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, video: Tensor) -> Tensor:
        """Class indices [B, 4] in the order of the attributes."""
        return torch.stack([logits.argmax(1) for logits in self(video).values()], dim=1)


def _stage(inputs: int, outputs: int, stride: int | tuple[int, int, int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm3d(outputs),
        nn.SiLU(),
    )


def classifier_path() -> Path:
    """The weights that ship with the package."""
    return _ASSETS / "tiny_classifier.safetensors"


def image_classifier_path() -> Path:
    """The weights for ``image_world`` that ship with the package."""
    return _ASSETS / "tiny_image_classifier.safetensors"


def load_classifier() -> Classifier:
    """The trained classifier in evaluation mode, float32 on the CPU."""
    return _load(Classifier(), classifier_path())


def load_image_classifier() -> Classifier:
    """The same for ``image_world``: it judges what moves, whatever the edges announce."""
    return _load(Classifier(image_world.ATTRIBUTES, image_world.FRAMES), image_classifier_path())


def _load(model: Classifier, path: Path) -> Classifier:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(path))
    return model.float().eval().requires_grad_(False)

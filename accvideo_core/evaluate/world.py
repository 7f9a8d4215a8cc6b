"""The procedural world of the embedded teacher: moving shapes with an exact caption.

Every clip is described by four attributes and rendered without loss from a random generator, so
every figure measured on it (prompt accuracy, Frechet distance) has a known reference.

The backgrounds are what few-step sampling loses first: the mosaic is 64 independent bits and the
stripes have a random phase and direction, both fixed over time. A denoiser that must decide them
within two Euler steps answers with their mean, which is grey.

Shapes: B clips, T = 17 frames, H = W = 32 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ..errors import AccVideoError

FRAMES = 17
SIZE = 32
FPS = 8

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "white")
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "bouncing",
)
BACKGROUNDS = ("plain", "striped", "mosaic")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "motion": MOTIONS,
    "background": BACKGROUNDS,
}

_RGB = {
    "red": (1.0, 0.10, 0.10),
    "green": (0.10, 0.90, 0.15),
    "blue": (0.10, 0.25, 1.0),
    "yellow": (1.0, 0.90, 0.10),
    "magenta": (1.0, 0.15, 0.90),
    "white": (1.0, 1.0, 1.0),
}
# Grey levels in [0, 1]. Their distance sets how many noise levels a background bit survives.
DARK = 0.10
GREY = 0.35
CELL = 4  # pixels per stripe and per mosaic cell

_DIRECTION = {
    "moving left": (-1.0, 0.0),
    "moving right": (1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
}


@dataclass(frozen=True, slots=True)
class ClipSpec:
    """What a clip shows: one word or phrase for each of the four attributes."""

    shape: str
    colour: str
    motion: str
    background: str

    def __post_init__(self) -> None:
        for name, allowed in ATTRIBUTES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise AccVideoError(
                    f"{name} {value!r} is not in the procedural world; "
                    f"choose one of {', '.join(allowed)}."
                )

    def labels(self) -> tuple[int, int, int, int]:
        """Class indices in the order of ``ATTRIBUTES``."""
        return (
            SHAPES.index(self.shape),
            COLOURS.index(self.colour),
            MOTIONS.index(self.motion),
            BACKGROUNDS.index(self.background),
        )


def prompt(spec: ClipSpec) -> str:
    """The caption of a clip, e.g. ``a red circle moving left on a striped background``."""
    return f"a {spec.colour} {spec.shape} {spec.motion} on a {spec.background} background"


def all_specs() -> list[ClipSpec]:
    """All 378 clips that the grammar can name, in a fixed order."""
    return [ClipSpec(*values) for values in product(*ATTRIBUTES.values())]


def all_prompts() -> list[str]:
    """The captions of ``all_specs()``, in the same order."""
    return [prompt(spec) for spec in all_specs()]


VOCABULARY: tuple[str, ...] = tuple(sorted({word for t in all_prompts() for word in t.split()}))
"""Every word of every caption."""

_SPEC_OF = {prompt(spec): spec for spec in all_specs()}


def parse(text: str) -> ClipSpec:
    """The inverse of ``prompt``; case and repeated spaces do not matter.

    Raises:
        AccVideoError: the text is not in the grammar.
    """
    spec = _SPEC_OF.get(" ".join(text.lower().split()))
    if spec is None:
        raise AccVideoError(
            f"The prompt {text!r} is not in the grammar of the procedural world; write it like "
            f"{all_prompts()[0]!r}."
        )
    return spec


def sample_specs(n: int, generator: torch.Generator) -> list[ClipSpec]:
    """``n`` clips drawn evenly and independently over the grammar."""
    specs = all_specs()
    return [specs[i] for i in torch.randint(len(specs), (n,), generator=generator).tolist()]


def sample_prompts(n: int, generator: torch.Generator) -> list[str]:
    """``n`` captions; the first 378 are all different, then the shuffled grammar repeats."""
    texts = all_prompts()
    order: list[int] = []
    while len(order) < n:
        order += torch.randperm(len(texts), generator=generator).tolist()
    return [texts[i] for i in order[:n]]


def labels(specs: Sequence[ClipSpec]) -> Tensor:
    """Class indices [B, 4] in the order of ``ATTRIBUTES``."""
    return torch.tensor([spec.labels() for spec in specs], dtype=torch.long)


def render(
    specs: Sequence[ClipSpec], generator: torch.Generator, times: Tensor | None = None
) -> Tensor:
    """Draw one clip per spec with random size, place, speed and texture.

    Args:
        specs: B clips to draw.
        generator: the only source of randomness; equal state gives equal clips.
        times: when the frames are taken, [T] or [B, T] in [0, 1] of the motion; 17 frames from its
            beginning to its end by default.

    Returns:
        float32 [B, 3, T, 32, 32] in [-1, 1], edges anti-aliased over one pixel.
    """
    draws = torch.rand(len(specs), 8, generator=generator)
    bits = torch.rand(len(specs), SIZE // CELL, SIZE // CELL, generator=generator) < 0.5
    kinds = labels(specs)
    path = _trajectory(kinds[:, 2], draws, torch.linspace(0, 1, FRAMES) if times is None else times)
    coverage = _coverage(kinds[:, 0], *path)[:, None]  # [B, 1, T, H, W]
    backdrop = _backdrop(kinds[:, 3], draws, bits)[:, None, None]  # [B, 1, 1, H, W]
    paint = torch.tensor([_RGB[spec.colour] for spec in specs]).view(-1, 3, 1, 1, 1)
    return (backdrop + coverage * (paint - backdrop)) * 2 - 1


def _trajectory(motion: Tensor, draws: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre x, y and radius of the shape in pixels, each [B, T]."""
    u = draws.unsqueeze(-1)
    frames = time.shape[-1]
    centred = time - 0.5
    radius = (0.20 + 0.10 * u[:, 0]).expand(-1, frames)
    x = 0.5 + 0.16 * (u[:, 1] - 0.5).expand(-1, frames)
    y = 0.5 + 0.16 * (u[:, 2] - 0.5).expand(-1, frames)

    ways = torch.zeros(len(MOTIONS), 2)
    for name, way in _DIRECTION.items():
        ways[MOTIONS.index(name)] = torch.tensor(way)
    way = ways[motion].unsqueeze(-1)  # [B, 2, 1]
    distance = 0.26 + 0.18 * u[:, 3]
    x = x + way[:, 0] * distance * centred
    y = y + way[:, 1] * distance * centred

    small, large = 0.13 + 0.03 * u[:, 4], 0.28 + 0.08 * u[:, 5]
    grown, shrunk = (small + (large - small) * part for part in (time, 1 - time))
    radius = torch.where((motion == MOTIONS.index("growing"))[:, None], grown, radius)
    radius = torch.where((motion == MOTIONS.index("shrinking"))[:, None], shrunk, radius)

    hop = (0.24 + 0.08 * u[:, 3]) * ((1.5 * math.pi * time).sin().abs() - 0.5)
    y = torch.where((motion == MOTIONS.index("bouncing"))[:, None], y - hop, y)
    return x * SIZE, y * SIZE, radius * SIZE


def _coverage(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel the shape covers, [B, T, H, W] in [0, 1], from signed distances."""
    pixel = torch.arange(SIZE) + 0.5
    dx = pixel.view(1, 1, 1, -1) - x[..., None, None]
    dy = pixel.view(1, 1, -1, 1) - y[..., None, None]
    r = radius[..., None, None]
    coverage = torch.empty(*x.shape, SIZE, SIZE)
    for index, distance in enumerate((_circle, _square, _triangle)):
        chosen = shape == index
        if chosen.any():
            coverage[chosen] = (0.5 - distance(dx[chosen], dy[chosen], r[chosen])).clamp(0, 1)
    return coverage


def _circle(dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    return (dx * dx + dy * dy).sqrt() - r


def _square(dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(dx.abs(), dy.abs()) - 0.88 * r  # about the circle's area


def _triangle(dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    # Equilateral, tip up: the largest of three half-plane distances, inradius 0.72 r.
    side = dx.abs() * (math.sqrt(3) / 2) - dy * 0.5
    return torch.maximum(side, dy) - 0.72 * r


def _backdrop(background: Tensor, draws: Tensor, bits: Tensor) -> Tensor:
    """Grey levels of the background in [0, 1], [B, H, W]; it does not move."""
    phase = (draws[:, 6] * 2 * CELL).long()
    line = ((torch.arange(SIZE) + phase[:, None]) // CELL) % 2  # [B, SIZE]
    vertical = (draws[:, 7] < 0.5).view(-1, 1, 1)
    stripes = torch.where(vertical, line[:, None, :], line[:, :, None])
    stripes = stripes.expand(-1, SIZE, SIZE)
    mosaic = bits.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2).to(stripes.dtype)
    kind = background.view(-1, 1, 1)
    lit = torch.where(kind == BACKGROUNDS.index("striped"), stripes, torch.zeros_like(stripes))
    lit = torch.where(kind == BACKGROUNDS.index("mosaic"), mosaic, lit)
    return DARK + (GREY - DARK) * lit

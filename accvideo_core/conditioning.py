"""Condition: what a model is conditioned on, the same type for every family.

Shapes: B batch, L text tokens, D text width, P pooled width; C', T', H, W channels and size of an
image's latents; L_i, D_i tokens of an image encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import AccVideoError


@dataclass(frozen=True, slots=True)
class Micro:
    """What Stable Video Diffusion is told about the video in numbers."""

    fps: float = 7.0
    """Frames per second that its motion is meant for."""
    motion_bucket: float = 127.0
    """How much motion there is, 1 to 255 or so."""
    augmentation: float = 0.02
    """Deviation of the noise that is put on the image, of pixels in [-1, 1]: more of it lets the
    video leave the image further."""

    def __post_init__(self) -> None:
        for name, least in (("fps", 1.0), ("motion_bucket", 0.0), ("augmentation", 0.0)):
            if not getattr(self, name) >= least:
                raise AccVideoError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    def tensor(self, count: int = 1) -> Tensor:
        """[count, 3] float32, as the network takes them: it was trained with fps less 1."""
        told = (self.fps - 1, self.motion_bucket, self.augmentation)
        return torch.tensor([told], dtype=torch.float32).repeat(count, 1)


@dataclass(frozen=True, slots=True)
class Condition:
    """Text and image conditioning of B samples.

    `text` [B, L, D]; `mask` [B, L] bool, True for valid tokens, which come first; `pooled` [B, P];
    `image` [B, C', T', H, W] in model space, what an image-to-video family concatenates with the
    latents or puts in their place; `image_tokens` [B, L_i, D_i] of its image encoder; `guidance`
    [B], the embedded guidance scale (6.0, not 6000); `micro` [B, 3], what Stable Video Diffusion is
    told in numbers: frames per second less 1, motion bucket and noise on the image.
    """

    text: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    image: Tensor | None = None
    image_tokens: Tensor | None = None
    guidance: Tensor | None = None
    micro: Tensor | None = None

    def __post_init__(self) -> None:
        if self.text.dim() != 3:
            raise AccVideoError(f"text has shape {tuple(self.text.shape)}; expected [B, L, D]")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value.shape[0] != self.text.shape[0]:
                raise AccVideoError(
                    f"{field.name} holds {value.shape[0]} samples, text holds {self.text.shape[0]}"
                )

    def __len__(self) -> int:
        return self.text.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """On `device`; floating tensors in `dtype`, masks stay bool, scalars stay float32."""

        def move(name: str, x: Tensor) -> Tensor:
            keep = not x.is_floating_point() or name in ("guidance", "micro")
            return x.to(device) if keep else x.to(device, dtype)

        return Condition(**{name: move(name, x) for name, x in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are set, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in named.items() if x is not None}

    def select(self, index: int | slice | Sequence[int]) -> Condition:
        """Some of the samples; one sample keeps its batch axis. Text is trimmed to valid tokens."""
        rows = slice(index, index + 1) if isinstance(index, int) else index
        rows = rows if isinstance(rows, slice) else list(rows)
        return Condition(**{name: x[rows] for name, x in self.tensors().items()}).trim()

    def split(self) -> list[Condition]:
        """One trimmed Condition per sample."""
        return [self.select(i) for i in range(len(self))]

    def trim(self) -> Condition:
        """Without the text tokens that no sample uses (exact: masked tokens have no influence)."""
        length, _ = self._lengths()
        if self.mask is None or length == self.text.shape[1]:
            return self
        changed = {**self.tensors(), "text": self.text[:, :length], "mask": self.mask[:, :length]}
        return Condition(**changed)

    def unmasked(self) -> Condition:
        """Trimmed; and without a mask that masks nothing, which keeps fast attention away."""
        length, shortest = self._lengths()
        if self.mask is None or shortest < length:
            return self.trim()
        trimmed = {**self.tensors(), "text": self.text[:, :length]}
        return Condition(**{name: x for name, x in trimmed.items() if name != "mask"})

    def _lengths(self) -> tuple[int, int]:
        """Text tokens of the longest (at least 1) and the shortest sample; waits for the device."""
        if self.mask is None:
            return self.text.shape[1], self.text.shape[1]
        lengths = self.mask.sum(dim=1).tolist()
        return max(1, *lengths), min(lengths)

    def with_guidance(self, scale: float | None) -> Condition:
        """The same with the embedded guidance of every sample set to `scale` (None leaves it)."""
        if scale is None:
            return self
        guidance = torch.full((len(self),), float(scale), device=self.text.device)
        return Condition(**{**self.tensors(), "guidance": guidance})

    def without_image(self) -> Condition:
        """The text alone, for a negative prompt, which takes the images of the prompt it serves."""
        image = ("image", "image_tokens", "micro")
        return Condition(**{n: x for n, x in self.tensors().items() if n not in image})

    def fingerprint(self) -> str:
        """SHA-256 of the values, for prompts whose text is not known."""
        digest = hashlib.sha256()
        for name, x in sorted(self.trim().tensors().items()):
            digest.update(f"{name}{tuple(x.shape)}".encode())
            digest.update(x.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def agrees_with(self, other: Condition) -> bool:
        """Whether both are of the same input, up to what other hardware or bfloat16 changes."""
        a = {name: x.float().cpu() for name, x in self.tensors().items()}
        b = {name: x.float().cpu() for name, x in other.tensors().items()}
        if {k: x.shape for k, x in a.items()} != {k: x.shape for k, x in b.items()}:
            return False
        return all(bool((a[k] - x).norm() <= 0.1 * x.norm()) for k, x in b.items())

    @classmethod
    def cat(cls, parts: Sequence[Condition]) -> Condition:
        """Join along the batch; shorter texts are padded on the right and masked."""
        if not parts:
            raise AccVideoError("no prompts were given; pass at least one")
        named = [part.tensors() for part in parts]
        if any(set(tensors) - {"mask"} != set(named[0]) - {"mask"} for tensors in named):
            raise AccVideoError(
                "prompts encoded for different models cannot be joined in one batch"
            )
        length = max(part.text.shape[1] for part in parts)
        joined = {
            name: torch.cat([tensors[name] for tensors in named])
            for name in named[0]
            if name not in ("text", "mask")
        }
        joined["text"] = torch.cat([_pad(part.text, length) for part in parts])
        joined["mask"] = torch.cat([_pad(part.full_mask(), length) for part in parts])
        return cls(**joined)

    def full_mask(self) -> Tensor:
        """The mask [B, L], all True when there is none."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.text.shape[:2], dtype=torch.bool, device=self.text.device)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its id, its text ("" when unknown) and its Condition of batch size 1."""

    id: str
    text: str
    condition: Condition

    @property
    def guidance(self) -> float | None:
        """The embedded guidance that it carries."""
        given = self.condition.guidance
        return None if given is None else float(given[0])

    @classmethod
    def of(cls, text: str, condition: Condition) -> Prompt:
        """The id follows from the text; from the condition's values where the text does not say
        all, because there is none or because there is an image.
        """
        told = text and condition.image is None
        name = text_id(text) if told else condition.fingerprint()[:16]
        return cls(name, text, condition.trim())


@dataclass(frozen=True, slots=True, eq=False)
class LatePrompt:
    """A prompt that is encoded when its condition is asked for: a hundred thousand of them fit."""

    id: str
    text: str
    guidance: float | None
    encode: Callable[[Iterable[LatePrompt]], Iterator[Prompt]]
    """Encodes prompts of this kind one after the other, each when it is its turn."""
    image: Path | None = None
    """File of the image that its video begins with."""

    @property
    def condition(self) -> Condition:
        """Of this prompt alone; asked again, it is encoded again."""
        (made,) = self.encode([self])
        return made.condition


AnyPrompt = Prompt | LatePrompt


def encoded(prompts: Iterable[AnyPrompt]) -> Iterator[Prompt]:
    """Prompts with their conditions, of which one at a time is encoded and none is held."""
    for encode, alike in groupby(prompts, _encoder):
        yield from encode(alike)


def _encoder(prompt: AnyPrompt) -> Callable[[Iterable[Any]], Iterator[Prompt]]:
    return prompt.encode if isinstance(prompt, LatePrompt) else iter


def text_id(text: str) -> str:
    """The id of a prompt that is a text and no more."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _pad(x: Tensor, length: int) -> Tensor:
    missing = length - x.shape[1]
    if missing == 0:
        return x
    return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)

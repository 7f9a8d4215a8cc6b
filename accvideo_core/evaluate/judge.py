"""Judge: what an embedded teacher's procedural world knows about clips, and no other world does.

Shapes: N clips, frames [N, T, 32, 32, 3] in [0, 1]; D feature width; A attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import AccVideoError
from ..latents import key_generator
from ..sampling import SamplePlan
from . import image_world, world
from .classifier import Classifier, load_classifier, load_image_classifier
from .metrics import prompt_hits, psnr


@dataclass(eq=False)
class Judge:
    """The classifier, and what each of N clips should show: `per_prompt` clips of every prompt."""

    specs: list[world.ClipSpec]
    """One for each clip."""
    classifier: Classifier
    seed: int
    drawn: ClassVar[ModuleType] = world
    """Where the clips come from."""

    @classmethod
    def of_world(cls, texts: Sequence[str], per_prompt: int, seed: int) -> Judge | None:
        """The judge for these prompts, or None when one of them is not in the world's grammar."""
        try:
            specs = [world.parse(text) for text in texts]
        except AccVideoError:
            return None
        return cls([spec for spec in specs for _ in range(per_prompt)], load_classifier(), seed)

    def fits(self, plan: SamplePlan) -> bool:
        """Whether clips of this size are the world's."""
        return plan == self.plan

    @property
    def plan(self) -> SamplePlan:
        return SamplePlan(self.drawn.FRAMES, self.drawn.SIZE, self.drawn.SIZE)

    def judge(self, frames: Tensor, clips: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Hits by attribute [N] (see `metrics.prompt_hits`) and features [N, D] of some clips."""
        features = self.features(frames)
        with torch.no_grad():
            logits = [self.classifier.heads[name](features) for name in self.drawn.ATTRIBUTES]
        predicted = torch.stack([one.argmax(dim=1) for one in logits], dim=1)
        wanted = world.labels([self.specs[i] for i in clips])
        return prompt_hits(predicted, wanted, tuple(self.drawn.ATTRIBUTES)), features

    @torch.no_grad()
    def features(self, frames: Tensor) -> Tensor:
        """The classifier's features [N, D]."""
        return self.classifier.features(frames.permute(0, 4, 1, 2, 3) * 2 - 1)

    def real_frames(self, clips: Sequence[int]) -> Tensor:
        """Real clips of the same descriptions."""
        return self._render(clips, "real")

    def real_features(self, count: int, batch_size: int) -> Tensor:
        """Features of `count` other real clips, whose descriptions go round the prompts'."""
        parts = []
        for start in range(0, count, batch_size):
            clips = range(start, min(count, start + batch_size))
            parts.append(self.features(self._render(clips, "real reference")))
        return torch.cat(parts)

    def _render(self, clips: Sequence[int], what: str) -> Tensor:
        # One generator a clip, so that no figure depends on the batch size.
        video = torch.cat(
            [
                self.drawn.render(
                    [self.specs[i % len(self.specs)]], key_generator(self.seed, what, i)
                )
                for i in clips
            ]
        )
        return ((video + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1).contiguous()


@dataclass(eq=False)
class ImageJudge(Judge):
    """The judge of image to video: a clip must do what its first frame announces."""

    drawn: ClassVar[ModuleType] = image_world
    images: Tensor | None = None
    """The pictures [N, 32, 32, 3] that the clips continue, where first frames are held to them."""

    @classmethod
    def of_clips(cls, count: int, seed: int) -> ImageJudge:
        """The judge for `count` clips; their descriptions are as different as can be."""
        texts = world.sample_prompts(count, key_generator(seed, "image judge"))
        return cls([world.parse(text) for text in texts], load_image_classifier(), seed)

    def judge(self, frames: Tensor, clips: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Hits and features as of any clips, and how near first frames are to their pictures."""
        hits, features = super().judge(frames, clips)
        if self.images is not None:
            hits["first_frame"] = psnr(frames[:, 0], self.images[list(clips)])
        return hits, features

    def first_frames(self, clips: Sequence[int]) -> Tensor:
        """The pictures [N, 32, 32, 3] to be continued: how `real_frames` of the clips begin."""
        return self.real_frames(clips)[:, 0]

"""Classifier-free guidance: ask the network twice and go further in the prompt's direction.

Teachers without an embedded guidance scale (Wan, CogVideoX) are recorded and sampled so; a student
has the guidance in its weights and is asked once.

Shapes: B batch, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .conditioning import Condition, Prompt
from .errors import AccVideoError

if TYPE_CHECKING:
    from .models.video_model import VideoModel


@dataclass(frozen=True, slots=True)
class Cfg:
    """Guidance scale; of both experts where a model has two."""

    scale: float
    low: float | None = None
    """Scale of the low-noise expert; None is `scale`."""

    def __post_init__(self) -> None:
        for value in (self.scale, self.low):
            if value is not None and not value >= 1:
                raise AccVideoError(f"cfg is {value}; it must be at least 1, which is no guidance")

    def at(self, t: float, boundary: float) -> float:
        """The scale at time t of a model whose low-noise expert answers below `boundary`."""
        return self.scale if self.low is None or t >= boundary else self.low

    @property
    def none(self) -> bool:
        """Whether the second question can be left out."""
        return self.scale == 1 and self.low in (None, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Guided:
    """A model under classifier-free guidance: v = v_neg + s (v - v_neg)."""

    model: VideoModel
    negative: Condition = field(repr=False)
    """Of one sample, shared by all, or of every sample; without image, whose place it takes over
    from the prompt's."""
    cfg: Cfg

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def velocity(self, x_t: Tensor, t: float | Tensor, cond: Condition) -> Tensor:
        """v at (x_t [B, C, T, H, W], t), as `VideoModel.velocity`; all samples at one time."""
        time = float(t) if not isinstance(t, Tensor) else float(t.reshape(-1)[0])
        scale = self.cfg.at(time, self.model.family.boundary)
        v = self.model.velocity(x_t, t, cond)
        if scale == 1:
            return v
        v_neg = self.model.velocity(x_t, t, self._negative(cond))
        return v_neg + scale * (v - v_neg)

    def _negative(self, cond: Condition) -> Condition:
        """The negative text with the images and the embedded guidance of `cond`."""
        negative = self.negative
        if len(negative) == 1:
            negative = negative.select([0] * len(cond))
        kept = {
            name: x
            for name, x in cond.tensors().items()
            if name in ("image", "image_tokens", "guidance")
        }
        return Condition(**{**negative.tensors(), **kept})


def guided(model: VideoModel, negative: Prompt | None, cfg: Cfg | None) -> VideoModel | Guided:
    """`model` under `cfg`, away from `negative`; itself where there is nothing to guide.

    Raises:
        AccVideoError: guidance is asked for without a negative prompt.
    """
    if cfg is None or cfg.none:
        return model
    if negative is None:
        raise AccVideoError(
            f"cfg {cfg.scale:g} needs a negative prompt (an empty one will do); give one, or set "
            "cfg to 1"
        )
    return Guided(model, negative.condition, cfg)

"""Classifier-free guidance: ask the network twice and go further in the prompt's direction.

Teachers without an embedded guidance scale (Wan, CogVideoX) are recorded and sampled so; a student
has the guidance in its weights and is asked once.

Shapes: B batch, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .conditioning import Condition, Prompt
from .errors import AccVideoError
from .flow import Velocity

if TYPE_CHECKING:
    from .models.video_model import VideoModel


@dataclass(frozen=True, slots=True)
class Cfg:
    """Guidance scale; of both experts where a model has two."""

    scale: float
    low: float | None = None
    """Scale of the low-noise expert; None is `scale`."""
    first: float | None = None
    """Scale of the first frame, from which it rises in equal steps up to the last one's; None is
    one scale for all frames."""

    def __post_init__(self) -> None:
        for value in (self.scale, self.low, self.first):
            if value is not None and not value >= 1:
                raise AccVideoError(f"cfg is {value}; it must be at least 1, which is no guidance")

    def at(self, t: float, boundary: float) -> float:
        """The scale at time t of a model whose low-noise expert answers below `boundary`."""
        return self.scale if self.low is None or t >= boundary else self.low

    def over_frames(self, scale: float, v: Tensor) -> float | Tensor:
        """`scale` for v [B, C, T, H, W]: one number, or [T, 1, 1] where frames differ."""
        if self.first is None:
            return scale
        rising = torch.linspace(self.first, scale, v.shape[2], device=v.device)
        return rising.to(v.dtype).reshape(-1, 1, 1)

    @property
    def none(self) -> bool:
        """Whether the second question can be left out."""
        return self.scale == 1 and self.low in (None, 1) and self.first in (None, 1)


BATCHED = ("auto", "batched", "in turn")
"""How the two questions are put: in one batch, or one after the other."""


@dataclass(frozen=True, slots=True, eq=False)
class Guided:
    """A model under classifier-free guidance: v = v_neg + s (v - v_neg)."""

    model: VideoModel
    negative: Condition = field(repr=False)
    """Of one sample, shared by all, or of every sample; without image, whose place it takes over
    from the prompt's (zeros, where the model is guided towards the image itself)."""
    cfg: Cfg
    batched: str = "auto"
    """One of `BATCHED`. "auto" asks both at once on a GPU where memory is left for it and no text
    needs a mask for it. A CPU is as fast in turn from a few hundred tokens on, with half the
    activations, and is asked so."""

    def __post_init__(self) -> None:
        if self.batched not in BATCHED:
            raise AccVideoError(f"batched is {self.batched!r}; choose one of {', '.join(BATCHED)}")

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def velocity(self, x_t: Tensor, t: float | Tensor, cond: Condition) -> Tensor:
        """v at (x_t [B, C, T, H, W], t), as `VideoModel.velocity`; all samples at one time."""
        time = float(t) if not isinstance(t, Tensor) else float(t.reshape(-1)[0])
        with self.asking(cond) as velocity:
            return velocity(x_t, time)

    @contextmanager
    def asking(self, cond: Condition) -> Iterator[Velocity]:
        """(x_t, t) -> v for one condition, as `VideoModel.asking`."""
        both = _Both(self.model, cond, self._negative(cond), self.batched)

        def velocity(x_t: Tensor, t: float) -> Tensor:
            scale = self.cfg.at(t, self.model.family.boundary)
            if scale == 1 and self.cfg.first in (None, 1):
                return self.model.answer(x_t, t, both.positive)
            v, v_neg = both.answers(x_t, t)
            return v_neg + self.cfg.over_frames(scale, v) * (v - v_neg)

        with self.model.steady():
            yield velocity

    def _negative(self, cond: Condition) -> Condition:
        """The negative text with the images, the embedded guidance and the like of `cond`."""
        negative = self.negative
        if len(negative) == 1:
            negative = negative.select([0] * len(cond))
        kept = {
            name: x
            for name, x in cond.tensors().items()
            if name in ("image", "image_tokens", "guidance", "micro")
        }
        if "image" in kept and self.model.family.guides_image:
            kept["image"] = torch.zeros_like(kept["image"])
        return Condition(**{**negative.tensors(), **kept})


class _Both:
    """Asks a model about a prompt and its negative."""

    def __init__(
        self, model: VideoModel, cond: Condition, negative: Condition, batched: str
    ) -> None:
        self.model, self.parts = model, (cond, negative)
        self.positive, self.negative = (model.prepared(part) for part in self.parts)
        self.joined: Condition | None = None
        if batched == "batched":
            self.join()
        # Texts of different lengths would need a mask, which keeps fast attention away.
        masks = [part.mask for part in (self.positive, self.negative) if part.mask is not None]
        self.undecided = (
            batched == "auto"
            and model.device.type == "cuda"
            and (model.family.pads_text or not masks)
            and self.positive.text.shape == self.negative.text.shape
        )

    def join(self) -> None:
        self.joined = self.model.prepared(Condition.cat(self.parts))

    def answers(self, x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """v of the prompt and v of its negative."""
        model = self.model
        if self.joined is not None:
            v, v_neg = model.answer(torch.cat([x_t, x_t]), t, self.joined).chunk(2)
            return v, v_neg
        before = torch.cuda.memory_allocated(model.device) if self.undecided else 0
        v = model.answer(x_t, t, self.positive)
        if self.undecided:
            self.undecided = False
            if fits_twice(before, model.device):
                self.join()
        return v, model.answer(x_t, t, self.negative)


def fits_twice(before: int, device: torch.device) -> bool:
    """Whether a GPU has room for twice what a question needed, `before` which it held that much.

    What the most was that was ever held is known without waiting, and not reset, since others may
    read it; where something else has held more, that is taken for the question's need.
    """
    need = torch.cuda.max_memory_allocated(device) - before
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 2 * need <= free + held


def guided(
    model: VideoModel, negative: Prompt | None, cfg: Cfg | None, batched: str = "auto"
) -> VideoModel | Guided:
    """`model` under `cfg`, away from `negative`; itself where there is nothing to guide.

    Raises:
        AccVideoError: guidance is asked for without a negative prompt, or `batched` is unknown.
    """
    if cfg is None or cfg.none:
        return model
    if negative is None:
        raise AccVideoError(
            f"cfg {cfg.scale:g} needs a negative prompt (an empty one will do); give one, or set "
            "cfg to 1"
        )
    return Guided(model, negative.condition, cfg, batched)

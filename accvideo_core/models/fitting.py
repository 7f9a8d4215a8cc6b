"""Whether a sampling fits in the memory that is free, and what to set where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..conditioning import Condition
from ..errors import AccVideoError
from ..guidance import Guided
from ..wording import changes, listed
from .footprint import Footprint, footprint, gigabytes, tensor_bytes, tensors_of
from .video_model import VideoModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Savings:
    """What decides how much memory a sampling takes, by the names that users know."""

    batch: int = 1
    """Videos that go through the network at once."""
    cfg_batch: str = "auto"
    """Of `guidance.BATCHED`; "auto" is "in turn" where there is no room for more."""
    weights: str | None = None
    """Packing of the blocks' weights, beside the one that they have."""
    fp8: bool = False
    """Whether products are in fp8, which takes packed copies of weights that are not."""
    swap_blocks: int = 0


class Sampling:
    """A model and the size of the videos that it is to sample."""

    def __init__(
        self,
        asked: VideoModel | Guided,
        condition: Condition,
        size: tuple[int, int, int],
        device: torch.device | None = None,
    ) -> None:
        """`size` is (frames, height, width) in pixels; `device` None is where the model is."""
        self.asked, self.condition, self.size = asked, condition, size
        self.model = asked.model if isinstance(asked, Guided) else asked
        self.device = self.model.device if device is None else device
        self._counted: dict[Savings, Footprint] = {}

    def takes(self, savings: Savings) -> Footprint:
        """Bytes on its device; raises what `footprint` raises."""
        alike = replace(savings, swap_blocks=0)
        if alike not in self._counted:
            asked = self.asked
            if isinstance(asked, Guided):
                asked = replace(asked, batched=alike.cfg_batch)
            shape = (alike.batch, *self.model.latent_spec.shape(*self.size))
            self._counted[alike] = footprint(
                asked, self.condition, shape, self.device, alike.weights, alike.fp8
            )
        return replace(self._counted[alike], swap_blocks=savings.swap_blocks)

    def fits(self, savings: Savings, room: int) -> bool:
        """Whether it takes no more than `room`; False where it cannot be done at all."""
        try:
            return self.takes(savings).peak <= room
        except AccVideoError:  # the weights are packed already
            return False


def check_memory(sampling: Sampling, savings: Savings, free: int) -> Footprint:
    """What the sampling takes, where that fits.

    Args:
        free: bytes of the device beside what lies there already.

    Raises:
        AccVideoError: it does not fit; the message names what to set so that it does.
            `Unplannable` where it cannot be told.
    """
    needed = sampling.takes(savings)
    here = [x for x in tensors_of(sampling.model.module) if x.device == sampling.device]
    room = free + tensor_bytes(here)
    if needed.peak <= room:
        return needed
    videos = "a video" if savings.batch == 1 else f"{savings.batch} videos at once"
    frames, height, width = sampling.size
    raise AccVideoError(
        f"sampling {videos}, {frames} frames of {width} x {height} pixels, takes "
        f"{gigabytes(needed.peak)}, and {sampling.device} has {gigabytes(room)} for it; "
        f"{_remedy(sampling, savings, room)}"
    )


def _remedy(sampling: Sampling, savings: Savings, room: int) -> str:
    """Every single setting that makes it fit; where there is none, several together."""
    single = [
        change
        for change in _changes(sampling, savings, room)
        if sampling.fits(replace(savings, **change), room)
    ]
    if single:
        return f"set {listed([changes(change) for change in single])}"
    chosen: dict[str, Any] = {}
    for change in _changes(sampling, savings, room):
        least = sampling.takes(replace(savings, **chosen)).peak
        if not sampling.fits(replace(savings, **chosen, **change), least - 1):
            continue
        chosen |= change
        if sampling.fits(replace(savings, **chosen), room):
            # Beside the others, fewer blocks than all may do.
            least_swapped = replace(savings, **{**chosen, "swap_blocks": savings.swap_blocks})
            fewest = _fewest_blocks(sampling, least_swapped, room)
            return f"set {changes(chosen | ({'swap_blocks': fewest} if fewest else {}))}"
    helping = f"set {changes(chosen)}, and " if chosen else ""
    return f"{helping}choose smaller or shorter videos"


def _changes(sampling: Sampling, savings: Savings, room: int) -> Iterator[dict[str, Any]]:
    """Single settings that save memory, those that cost least time first."""
    if isinstance(sampling.asked, Guided) and savings.cfg_batch == "batched":
        yield {"cfg_batch": "in turn"}
    if savings.batch > 1:
        yield {"batch": _largest_batch(sampling, savings, room)}
    if savings.weights is None:
        yield {"weights": "fp8"}
    # On a CPU what waits, waits in the device's own memory.
    if sampling.device.type != "cpu" and savings.swap_blocks < sampling.model.num_parts:
        fewest = _fewest_blocks(sampling, savings, room)
        yield {"swap_blocks": fewest or sampling.model.num_parts}


def _largest_batch(sampling: Sampling, savings: Savings, room: int) -> int:
    """The most videos that fit at once, fewer than now and at least one."""
    fitting, too_many = 1, savings.batch
    while fitting + 1 < too_many:
        middle = (fitting + too_many) // 2
        if sampling.fits(replace(savings, batch=middle), room):
            fitting = middle
        else:
            too_many = middle
    return fitting


def _fewest_blocks(sampling: Sampling, savings: Savings, room: int) -> int | None:
    """Blocks that have to wait in main memory; None where all of them are too few."""
    for count in range(savings.swap_blocks, sampling.model.num_parts + 1):
        if sampling.fits(replace(savings, swap_blocks=count), room):
            return count
    return None

"""Room: what of a sampling is on the device when.

Text encoders come first and leave. Where they do not fit beside the network, it waits meanwhile in
main memory. Whether the sampling itself fits is counted before it begins, and what does not is
refused with the settings that would. Clips are decoded while others are sampled, or, where that has
no room, when the network has left.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .conditioning import Condition
from .errors import AccVideoError
from .guidance import Guided
from .latents import LatentSpec
from .models.fitting import Sampling, Savings, check_memory
from .models.footprint import Footprint, free_memory, tensor_bytes, tensors_of
from .models.loading import Teacher
from .models.pipeline_folder import encoder_parts
from .models.placement import MAIN_MEMORY, move
from .models.vae import VideoVAE
from .models.video_model import VideoModel
from .sampling import SamplePlan
from .speed import Speed


@contextmanager
def room_to_encode(teacher: Teacher, free: int | None = None) -> Iterator[None]:
    """Inside, text encoders may come to the device: without the network, where both do not fit.

    `free` are bytes of the device that can still be taken; None asks the device.
    """
    network, device = teacher.model.module, teacher.model.device
    if device.type == "cpu" or not teacher.has_text_encoders:
        yield
        return
    files = (path for part in encoder_parts(teacher.folder) for path in part.rglob("*.safetensors"))
    needed = sum(path.stat().st_size for path in files)
    free = free_memory(device) if free is None else free
    if free is None or needed <= free:
        yield
        return
    teacher.device = device if teacher.device is None else teacher.device
    move([network], MAIN_MEMORY)
    try:
        yield
    finally:
        move([network], device)


@dataclass(frozen=True, slots=True)
class Room:
    """What a sampling leaves of its device's memory."""

    beside: int | None
    """Bytes that are free while the network samples; None where that is not known."""
    after: int | None
    """Bytes that are free when the network has left."""

    def decodes_beside(self, vae: VideoVAE, plan: SamplePlan) -> bool:
        """Whether clips can be decoded while others are sampled, in as few tiles as alone.

        Raises:
            AccVideoError: not even alone, in the smallest tiles.
        """
        if self.beside is None or self.after is None or vae.footprint is None:
            return True
        shape = (1, *_cropped(vae.spec, plan))
        tiling = vae.footprint.choose(shape, self.after)
        return vae.footprint.needed(shape, tiling) <= self.beside


class Need:
    """What a sampling takes of its device's memory."""

    def __init__(
        self,
        asked: VideoModel | Guided,
        condition: Condition,
        plan: SamplePlan,
        batch: int,
        speed: Speed,
        device: torch.device,
    ) -> None:
        """The model is to compute on `device`, wherever it is now, `batch` videos at once."""
        # With the number of the current one, as tensors have it.
        self.device = torch.empty(0, device=device).device
        size = plan.frames, plan.height, plan.width
        self.sampling = Sampling(asked, condition, size, self.device)
        self.savings = Savings(
            batch=batch,
            cfg_batch=speed.cfg_batch,
            swap_blocks=speed.swap_blocks,
            fp8=speed.fp8,
        )

    @property
    def working(self) -> int:
        """Bytes that come and go beside the weights; 0 where that cannot be known."""
        needed = self.needed()
        return 0 if needed is None else needed.working

    def needed(self) -> Footprint | None:
        """All of it; None where it cannot be known. Counting takes seconds, and is done once."""
        sampling, savings = self.sampling, self.savings
        counted = _counted.setdefault(sampling.model.module, {})
        text, weights = sampling.condition.text.shape[1], tensor_bytes(self._tensors())
        guided = isinstance(sampling.asked, Guided)
        key = sampling.size, savings, text, weights, guided, self.device.type
        if key not in counted:
            try:
                counted[key] = sampling.takes(savings)
            except AccVideoError:  # Unplannable; or what will be refused where it is done
                counted[key] = None
        return counted[key]

    def room(self, free: int | None = None) -> Room:
        """What it leaves.

        Args:
            free: bytes of the device that can still be taken; None asks the device.

        Raises:
            AccVideoError: it does not fit; the message names settings with which it does.
        """
        free = free_memory(self.device) if free is None else free
        needed = self.needed()
        if free is None or needed is None:
            return Room(None, None)
        here = tensor_bytes(x for x in self._tensors() if x.device == self.device)
        if needed.peak > free + here:
            check_memory(self.sampling, self.savings, free)
        # From main memory a network does not leave, but for there.
        after = free if self.device.type == "cpu" else free + here
        return Room(free + here - needed.peak, after)

    def _tensors(self) -> list[Tensor]:
        return tensors_of(self.sampling.model.module)


_counted: WeakKeyDictionary[nn.Module, dict[Hashable, Footprint | None]] = WeakKeyDictionary()
"""What was counted for each network."""


def _cropped(spec: LatentSpec, plan: SamplePlan) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the latents of a clip that are decoded."""
    channels, _, height, width = spec.shape(plan.frames, plan.height, plan.width)
    return channels, (plan.frames - 1) // spec.stride_t + 1, height, width

"""Networks on ComfyUI's device while they work, in the books of its own memory management."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..accvideo_core.errors import AccVideoError
from ..accvideo_core.models.placement import MAIN_MEMORY, apart
from ..accvideo_core.models.placement import move as _move

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher
    from ..accvideo_core.models.vae import VideoVAE
    from ..accvideo_core.trajectories.stats import Decode

ACTIVATIONS = 0.2
"""Memory asked for beside the weights, in units of the weights, where it is not known."""

VAE_MEMORY = 2 * 2**30
"""Bytes that decoding a tile may take."""

ALL = 1e30
"""More bytes than any device has."""


class Network(nn.Module):
    """What ComfyUI's management keeps its books on; the network itself stays as it is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class WholePatcher(ModelPatcher):
    """A ModelPatcher whose network is on the device as a whole or not at all."""

    def partially_unload(self, *_args: Any, **_kwargs: Any) -> int:
        """Nothing: ComfyUI then takes the network off the device altogether."""
        return 0


_patchers: WeakKeyDictionary[Teacher, dict[str, ModelPatcher]] = WeakKeyDictionary()


@contextmanager
def on_device(
    teacher: Teacher, *modules: nn.Module, waiting: Sequence[nn.Module] = (), room: int = 0
) -> Iterator[list[nn.Module]]:
    """Have the teacher's network and the modules on ComfyUI's device for the block.

    The network is a model of ComfyUI's management like any other: room is made for it, and
    afterwards it stays until the room is needed. A student shares its teacher's weights, so they
    move as one, and only what the modules have beside them is moved here.

    Args:
        waiting: parts of the network whose weights stay in main memory, for the block to bring
            them over when it needs them. Everything else of ComfyUI's makes room then.
        room: bytes that the block takes beside the weights; 0 where that is not known.

    Yields the list of what is put away afterwards; append modules that were made in the block.
    """
    device = management.get_torch_device()
    placed = list(modules)
    if device.type == "cpu":
        yield placed
        return
    network, home = teacher.model.module, management.unet_offload_device()
    if waiting:
        _unload_all(device)
        _move([network], MAIN_MEMORY)
        _move([network], device, keep=nn.ModuleList(waiting))
    else:
        _load(teacher, "network", network, _bytes(placed, network), room)
    # What is shared with the teacher must stay where the teacher is.
    _move(placed, device, keep=nn.ModuleList([network, *waiting]))
    try:
        yield placed
    finally:
        _move(placed, home, keep=nn.ModuleList([network, *waiting]))
        if waiting:
            _move([network], MAIN_MEMORY)
        management.soft_empty_cache()


@contextmanager
def vae_on_device(teacher: Teacher, room: int = VAE_MEMORY) -> Iterator[VideoVAE]:
    """Have the teacher's VAE on ComfyUI's device for the block, with `room` bytes to work in.

    Networks leave the device where there is no such room beside them.
    """
    vae = teacher.vae
    if management.get_torch_device().type != "cpu":
        _load(teacher, "vae", vae.module, 0, room)
    yield vae


def decoder_beside(teacher: Teacher) -> Decode | None:
    """The teacher's decoder for use while its network is at work; None where it has no VAE.

    Not by ComfyUI's books, which could put the network away to make room. Where there is no room
    it raises torch's own error.
    """
    if teacher.vae_path is None:
        return None

    def decode(latents: Tensor) -> Tensor:
        vae = teacher.vae
        home = next(vae.module.parameters()).device
        _move([vae.module], management.get_torch_device())
        try:
            return vae.decode(latents)
        finally:
            _move([vae.module], home)

    return decode


def patcher_of(teacher: Teacher, part: str, module: nn.Module) -> ModelPatcher:
    """A part of the teacher in ComfyUI's books, until the teacher goes."""
    patchers = _patchers.setdefault(teacher, {})
    if part not in patchers:
        patchers[part] = WholePatcher(
            Network(module),
            load_device=management.get_torch_device(),
            offload_device=management.unet_offload_device(),
        )
    return patchers[part]


def _load(teacher: Teacher, part: str, module: nn.Module, beside: int, room: int = 0) -> None:
    """Let ComfyUI put `module` on its device, with room for `beside` bytes and activations, of
    which there are `room` bytes where that is known.
    """
    patcher = patcher_of(teacher, part, module)
    total: Any = management.get_total_memory(patcher.load_device)
    if patcher.model_size() > total:
        raise AccVideoError(
            f"{teacher.model.source!r} takes {patcher.model_size() / 1e9:.1f} GB and the device "
            f"has {total / 1e9:.1f} GB; choose an fp8 or GGUF file of it, or a smaller model"
        )
    # Weights that were moved inside ComfyUI's inference mode could never be trained.
    with torch.inference_mode(False):
        needed = (room or int(ACTIVATIONS * patcher.model_size())) + beside
        management.load_models_gpu([patcher], memory_required=needed, force_full_load=True)


@torch.inference_mode(False)
def _unload_all(device: torch.device) -> None:
    management.free_memory(ALL, device)


def free_memory() -> int:
    """Bytes of ComfyUI's device that can still be taken."""
    free: Any = management.get_free_memory(management.get_torch_device())
    return int(free)


def all_memory() -> int:
    """Bytes of ComfyUI's device, taken or not."""
    total: Any = management.get_total_memory(management.get_torch_device())
    return int(total)


def default_dtype() -> torch.dtype:
    """What "auto" means: float32 on a CPU, else bfloat16 where the device has it, else float16."""
    device = management.get_torch_device()
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if management.should_use_bf16(device) else torch.float16


def free_host_memory() -> int:
    """Bytes of main memory that may be filled with weights."""
    free: Any = management.get_free_memory(torch.device("cpu"))
    return int(free)


def _bytes(modules: list[nn.Module], keep: nn.Module) -> int:
    """Of what the modules hold and `keep` does not."""
    own = {id(x): x for _, _, x in apart(modules, keep)}
    return sum(x.numel() * x.element_size() for x in own.values())

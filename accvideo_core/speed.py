"""Speed: how a model computes what it is asked, put into effect for the time of a sampling.

    attention     the kernel of attention, and a sparse pattern for it (`models.attention`)
    fp8           linear layers multiply in 8 bits (`models.fp8`)
    compile       torch.compile, block by block (`models.compiling`)
    swap_blocks   weights of blocks wait in main memory (`models.swapping`)
    cuda_graphs   a pass is recorded once and played again (`models.cuda_graphs`)
    cfg_batch     how a prompt and its negative are asked about (`guidance`)

`sped_up` enters them in this order, each around what those before have made of the network:
- Attention is first, because what is compiled or recorded later has to hold the chosen kernel.
- fp8 replaces linear layers: before compiling, which joins its scaling to what stands around it,
  and before swapping, so that 8 bits travel and not 16.
- Compiling replaces the `forward` of blocks and no more. Swapping's hooks, which change the weights
  under the compiled code, then run outside of it.
- Graphs record whatever runs by then. They hold addresses: weights may not move any more.

None of them changes a weight. They change module structures (processors, layers, hooks, `forward`),
and all of it is undone at the end: between samplings a model may wait in memory for others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .errors import AccVideoError
from .guidance import BATCHED
from .models.attention import attention
from .models.compiling import Backend, check_compiler, compiled_blocks
from .models.context_parallel import processes_of
from .models.cuda_graphs import Recorder, graphed
from .models.experts import blocks_of
from .models.fp8 import fp8_products
from .models.kernels import KERNELS
from .models.placement import visiting
from .models.quantised import Fp8Linear
from .models.sparse import PATTERNS
from .models.swapping import Transfer, spread_blocks, swapped_blocks, transfer_to
from .models.video_model import VideoModel

CHOICES: dict[str, tuple[str, ...]] = {
    "attention": ("auto", *KERNELS),
    "sparse": tuple(PATTERNS),
    "cfg_batch": BATCHED,
}
"""What the fields that are names may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What is done for speed and memory. The defaults change no result but by rounding."""

    attention: str = "auto"
    """Kernel; "auto" is the exact one that was measured to be the fastest of this machine."""
    sparse: str = "dense"
    """Which tokens of the video attend to each other; all but "dense" change the result."""
    compile: bool = False
    """Compile the blocks, which takes a minute or more at the first step of every size."""
    cuda_graphs: bool = False
    """Record a pass on the GPU and play it again, which spares the CPU launching every kernel."""
    fp8: bool = False
    """Multiply in 8 bits, which changes the result a little."""
    swap_blocks: int = 0
    """Blocks of each network whose weights wait in main memory until it is their turn."""
    cfg_batch: str = "auto"
    """Whether a prompt and its negative are asked about in one batch or in turn."""

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise AccVideoError(
                    f"speed.{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}"
                )
        if self.swap_blocks < 0:
            raise AccVideoError(
                f"speed.swap_blocks is {self.swap_blocks}; give how many blocks wait in main "
                "memory, 0 for none"
            )
        if self.cuda_graphs and self.swap_blocks:
            raise AccVideoError(
                "speed.cuda_graphs needs all weights in one place, and speed.swap_blocks "
                f"{self.swap_blocks} moves them; leave one of the two out"
            )

    @property
    def inexact(self) -> str:
        """The first field that changes results by more than rounding, with its value; or ""."""
        kernel = KERNELS.get(self.attention)
        if kernel is not None and not kernel.exact:
            return f"attention {self.attention!r}"
        if self.sparse != "dense":
            return f"sparse {self.sparse!r}"
        return "fp8" if self.fp8 else ""


def check_exact(speed: Speed | None) -> None:
    """Refuse speed that changes what a dataset or a comparison is to hold.

    Raises:
        AccVideoError: with the field.
    """
    if speed is not None and speed.inexact:
        raise AccVideoError(
            f"{speed.inexact} changes what the teacher answers, and with it what is recorded or "
            "compared; leave it out here"
        )


def check_speed(speed: Speed, model: VideoModel) -> None:
    """Refuse what cannot be done with a model, before anything is.

    What devices lack shows when kernels, fp8, compiling and graphs are entered.

    Raises:
        AccVideoError: with what would do instead.
    """
    if speed.swap_blocks > model.num_parts:
        raise AccVideoError(
            f"speed.swap_blocks is {speed.swap_blocks}, but the network has {model.num_parts} "
            f"blocks; choose at most {model.num_parts}"
        )
    if speed.fp8 and speed.swap_blocks and not _packed(model):
        raise AccVideoError(
            "speed.fp8 packs the weights on the device, where those of speed.swap_blocks "
            f"{speed.swap_blocks} are not; load the model packed (--weights fp8, or an fp8 file), "
            "or leave one of the two out"
        )
    if speed.cuda_graphs and _divided(model):
        raise AccVideoError(
            "speed.cuda_graphs cannot record what processes tell each other, and this model's "
            "tokens are divided among some; leave one of the two out"
        )


def _packed(model: VideoModel) -> bool:
    """Whether every block has weights that fp8 multiplies as they lie."""
    return all(
        any(isinstance(layer, Fp8Linear) for layer in block.modules())
        for blocks in blocks_of(model)
        for block in blocks
    )


def _divided(model: VideoModel) -> bool:
    """Whether processes divide the model's tokens."""
    processors = (getattr(module, "processor", None) for module in model.module.modules())
    return any(processes_of(processor) is not None for processor in processors)


@contextmanager
def sped_up(
    model: VideoModel,
    speed: Speed | None,
    device: torch.device | None = None,
    transfer: Transfer | None = None,
    recorder: Recorder | None = None,
    backend: Backend = "inductor",
) -> Iterator[VideoModel]:
    """Inside, `model` computes as `speed` says, without gradients; afterwards it is as it was.

    Args:
        speed: None leaves the model alone.
        device: where it computes; None is where it is. Blocks that are swapped may wait in main
            memory from the beginning: all of the model never has to fit there.
        transfer: how swapped weights travel; None is the device's own way.
        recorder: of graphs; None is CUDA's.
        backend: torch.compile's.

    Raises:
        AccVideoError: model or machine lack what a field needs.
    """
    if speed is None:
        yield model
        return
    check_speed(speed, model)
    waiting = spread_blocks(model, speed.swap_blocks) if speed.swap_blocks else []
    if waiting:
        _ = model.fingerprint  # which is remembered; weights that wait cannot be read
    # Weights that travelled in ComfyUI's inference mode could never be trained through again.
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        # Kernels are chosen for the device that the model is on by then.
        stack.enter_context(visiting(model.module, device or model.device, waiting))
        stack.enter_context(attention(model, speed.attention, speed.sparse))
        if speed.fp8:
            stack.enter_context(fp8_products(model))
        if speed.compile:
            check_compiler(model.device, "speed.compile", backend)
            stack.enter_context(compiled_blocks(model, backend, training=False))
        if waiting:
            stack.enter_context(_frozen(model.module))
            chosen = transfer_to(model.device) if transfer is None else transfer
            stack.enter_context(swapped_blocks([waiting], chosen))
        if speed.cuda_graphs:
            stack.enter_context(graphed(model, recorder))
        yield model


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Inside, nothing is trained, so that all weights of a block can wait."""
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)

"""The node that says how fast a model is to compute, and at what price."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..accvideo_core.speed import CHOICES, Speed, check_speed, sped_up
from .devices import free_memory, on_device
from .sockets import SpeedSettings

if TYPE_CHECKING:
    from torch import nn

    from ..accvideo_core.models.loading import Teacher
    from ..accvideo_core.models.video_model import VideoModel
    from ..accvideo_core.sampling_room import Need


class AccVideoSpeed(io.ComfyNode):
    """Kernels, compiling, 8 bits, swapped blocks: how a model computes what it is asked."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoSpeed",
            display_name="Speed Settings",
            category="AccVideo/sample",
            description="How a model computes: which attention kernel, compiled or not, in 8 bits, "
            "with how much of it in main memory. Without this node the fastest exact kernel of the "
            "machine is used and nothing else.",
            search_aliases=[
                *("speed", "fast", "attention", "SageAttention", "flash attention", "xformers"),
                *("torch compile", "CUDA graphs", "fp8", "block swap", "low VRAM", "sparse"),
            ],
            inputs=_inputs(),
            outputs=[SpeedSettings.Output("speed", tooltip="For Sample Video and recording.")],
            is_experimental=True,
        )

    @classmethod
    def execute(
        cls,
        attention: str,
        sparse: str,
        compile: bool,
        cuda_graphs: bool,
        fp8: bool,
        swap_blocks: int,
        cfg_batch: str,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            Speed(
                attention=attention,
                sparse=sparse,
                compile=compile,
                cuda_graphs=cuda_graphs,
                fp8=fp8,
                swap_blocks=swap_blocks,
                cfg_batch=cfg_batch,
            )
        )


def speed_input(tooltip: str) -> io.Input:
    """Where Speed Settings are connected."""
    return SpeedSettings.Input("speed", optional=True, tooltip=tooltip)


@contextmanager
def at_speed(
    teacher: Teacher, network: VideoModel, speed: Speed | None, need: Need | None = None
) -> Iterator[None]:
    """Have a teacher's or a student's network on ComfyUI's device, as fast as `speed` says.

    Raises:
        AccVideoError: what it needs does not fit, or the machine lacks what `speed` asks for.
    """
    if speed is not None:
        check_speed(speed, network)
    waiting = waiting_modules([network], teacher.model, speed)
    room = 0 if need is None else need.working
    with on_device(teacher, network.module, waiting=waiting, room=room):
        if need is not None:
            need.room(free_memory())
        with sped_up(network, speed):
            yield


def waiting_modules(
    asked: Sequence[VideoModel], teacher: VideoModel, speed: Speed | None
) -> list[nn.Module]:
    """What stays in main memory while the networks that are `asked` are sampled one by one.

    Their blocks, as many as `speed` says; and all of a teacher of whose weights none is asked.
    """
    from ..accvideo_core.models.swapping import spread_blocks

    if speed is None or not speed.swap_blocks:
        return []
    shared = {id(p) for p in teacher.module.parameters()}
    used = any(id(p) in shared for network in asked for p in network.module.parameters())
    blocks = [block for network in asked for block in spread_blocks(network, speed.swap_blocks)]
    return blocks if used else [teacher.module, *blocks]


def _inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "attention",
            options=list(CHOICES["attention"]),
            default="auto",
            tooltip="Kernel of attention. auto measures once which exact one is fastest for this "
            "size on this machine. sage rounds to 8 bits: faster, and not the same video. A kernel "
            "that is not installed says what to install.",
        ),
        io.Combo.Input(
            "sparse",
            options=list(CHOICES["sparse"]),
            default="dense",
            tooltip="Which tokens of the video attend to each other. All but dense leave distant "
            "ones out: faster on long clips, and not the same video.",
        ),
        io.Boolean.Input(
            "compile",
            default=False,
            tooltip="Compile the network's blocks. Costs a minute or two at the first step, and "
            "again at other sizes; needs Triton (on Windows triton-windows).",
        ),
        io.Boolean.Input(
            "cuda_graphs",
            default=False,
            tooltip="Record a pass on the GPU and play it again. Helps small models and clips, "
            "where the CPU does not keep up; takes memory, and does not go with swap_blocks.",
        ),
        io.Boolean.Input(
            "fp8",
            default=False,
            tooltip="Multiply in 8 bits (RTX 40 series, H100 and newer). Faster, with half the "
            "weights' memory, and the video changes a little.",
        ),
        io.Int.Input(
            "swap_blocks",
            default=0,
            min=0,
            max=1000,
            tooltip="Blocks of the network that wait in main memory until it is their turn, for "
            "cards that do not hold the model. HunyuanVideo has 60, Wan 14B 40. Costs little time "
            "while copying a block takes no longer than computing the ones between.",
        ),
        io.Combo.Input(
            "cfg_batch",
            options=list(CHOICES["cfg_batch"]),
            default="auto",
            tooltip="Of a teacher under guidance: ask about prompt and negative prompt in one "
            "batch, which is faster and takes twice the activations, or in turn. Students ask "
            "once.",
        ),
    ]

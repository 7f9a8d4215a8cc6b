"""CUDA graphs: a network's forward pass is captured once and replayed, kernel after kernel.

Small videos keep a GPU waiting for the host, which launches every kernel by itself; a graph is one
launch. It is captured for given sizes: other batches, videos and lengths of text (of each prompt of
a batch) are captured when they are met, which takes about as long as `WARM_UPS` + 1 forward passes.

What is captured are addresses. Weights must stay where they are for as long as graphs live, so that
swapped blocks are refused; what changes from question to question is copied into tensors that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import AccVideoError
from .attention import decided
from .compiling import replaced_forward
from .experts import networks_of

if TYPE_CHECKING:
    from .video_model import VideoModel

WARM_UPS = 2
"""Passes before the capture: kernels are chosen and compiled, and workspaces taken, in them."""


class Recorder(Protocol):
    """What captures work and replays it."""

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """The tensors that `work` gives, and what computes them anew from what it has read."""
        ...


class CudaRecorder:
    """Captures CUDA graphs, which all use one piece of memory: never two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with torch.cuda.device(self.device):
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            # Other threads (a preview, a transfer) may go on with theirs.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                result = work()
        return result, graph.replay


@contextmanager
def graphed(model: VideoModel, recorder: Recorder | None = None) -> Iterator[VideoModel]:
    """Inside, each of the model's networks is replayed where it was asked with such sizes before.

    With gradients, and while features are taken from its blocks, a network computes as ever. What
    else changes the network (a kernel, compiled blocks) is entered before.

    Args:
        recorder: None is CUDA's.

    Raises:
        AccVideoError: the model is not on an NVIDIA GPU, or its blocks are swapped.
    """
    if recorder is None:
        if model.device.type != "cuda":
            raise AccVideoError(
                f"CUDA graphs need an NVIDIA GPU, and the model is on {model.device}; leave CUDA "
                "graphs off"
            )
        recorder = CudaRecorder(model.device)
    with ExitStack() as stack:
        for network in networks_of(model.module).values():
            blocks = model.family.body_of(network)
            if _have_hooks(blocks):
                raise AccVideoError(
                    "CUDA graphs need all weights to stay on the GPU, and blocks are swapped; set "
                    "swap_blocks to 0, or leave CUDA graphs off"
                )
            graphs = _Graphs(network.forward, blocks, recorder)
            stack.callback(graphs.captured.clear)
            stack.enter_context(replaced_forward(network, graphs))
        yield model


def _have_hooks(blocks: list[nn.Module]) -> bool:
    return any(block._forward_pre_hooks or block._forward_hooks for block in blocks)


class _Graphs:
    """A network's forward, captured for all sizes that it is asked with."""

    def __init__(
        self, forward: Callable[..., Any], blocks: list[nn.Module], recorder: Recorder
    ) -> None:
        self.forward, self.blocks, self.recorder = forward, blocks, recorder
        self.captured: dict[Hashable, _Graph] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or _have_hooks(self.blocks):
            return self.forward(*args, **kwargs)
        leaves, tree = tree_flatten((args, kwargs))
        key = (str(tree), decided(self.blocks), *(_described(x) for x in leaves))
        if key not in self.captured:
            self.captured[key] = _Graph(self.forward, leaves, tree, self.recorder)
        return self.captured[key](leaves)


class _Graph:
    """A forward pass for given sizes."""

    def __init__(
        self, forward: Callable[..., Any], leaves: list[Any], tree: Any, recorder: Recorder
    ) -> None:
        # Copies keep their places, so that a replay finds what it reads.
        self.inputs = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = tree_unflatten(self.inputs, tree)
        self.result, self.replay = recorder.record(lambda: forward(*args, **kwargs))

    def __call__(self, leaves: list[Any]) -> Any:
        for own, x in zip(self.inputs, leaves, strict=True):
            if isinstance(x, Tensor):
                own.copy_(x)
        self.replay()
        # The next replay writes over its result.
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.result)


def _described(x: Any) -> Hashable:
    return (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x

"""Ulysses sequence parallelism: the processes of a group divide the tokens of one sample.

Each computes everything but attention for its own tokens. For attention they exchange tokens for
heads, so that each sees all tokens of some heads, and back. diffusers does both by a plan that says
where a network's tensors are divided and where they are put together again; it ships one for Wan,
the one for HunyuanVideo is here. A family names its plan in its entry.

What enters and leaves a divided network is whole in every process. Gradients of weights are not:
each process has the part that comes from its own tokens, and their sum is the gradient.

Shapes: B batch, N video tokens, L text tokens, M of both, D token width; n processes of a group; in
attention H heads and D their size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..conditioning import Condition
from ..errors import AccVideoError
from .experts import networks_of

if TYPE_CHECKING:
    from .video_model import VideoModel


class Group(Protocol):
    """Of this process: its number, how many there are, and how many divide a sample."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def sequence(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """How a family's networks are divided."""

    plan: Callable[[Any], dict[str, Any]]
    """(network) -> diffusers' plan for it."""
    before_blocks: Callable[[Any, int, int], None] | None = None
    """(network, n, place in the group): puts hooks on the blocks, for what a plan cannot say."""
    divides_text: bool = False
    """Whether the text's tokens are divided too, and are therefore padded to a multiple of n."""


def check_divisible(model: VideoModel, shape: Sequence[int], n: int) -> None:
    """Refuse what `n` processes cannot divide: a network, or latents of `shape` [C, T, H, W].

    Raises:
        AccVideoError: with what would do instead.
    """
    family, spec = model.family, model.latent_spec
    if family.sequence is None:
        raise AccVideoError(
            f"there is no plan to divide the tokens of {family.title or family.name} among "
            "processes; leave --sequence-parallel out"
        )
    config: Any = model.expert(1.0).config
    heads: int = config.num_attention_heads
    _, frames, height, width = shape
    tokens = frames // spec.patch_t * (height // spec.patch) * (width // spec.patch)
    for what, number in (("attention heads", heads), ("tokens of a clip", tokens)):
        if number % n:
            fitting = [str(k) for k in range(1, n) if heads % k == 0 and tokens % k == 0]
            raise AccVideoError(
                f"{n} processes cannot share the {number} {what} equally; "
                f"give --sequence-parallel {' or '.join(fitting)}"
            )


def divided(model: VideoModel, shape: Sequence[int], group: Group) -> VideoModel:
    """`model` for latents of `shape` [C, T, H, W], its tokens divided among the group's processes.

    Raises:
        AccVideoError: as `check_divisible` and `divide_sequence`.
    """
    if group.sequence == 1:
        return model
    check_divisible(model, shape, group.sequence)
    return divide_sequence([model], group)[0]


def divide_sequence(models: Sequence[VideoModel], group: Group) -> list[VideoModel]:
    """The models over the same networks, which are changed in place to divide their tokens.

    Every process of a group must ask them the same things in the same order.

    Raises:
        AccVideoError: diffusers is too old.
    """
    mesh = _mesh(group, models[0].device.type)
    config = _config(group, mesh)
    # Of diffusers' own code.
    warnings.filterwarnings("ignore", message=".*all_gather_tensor", category=FutureWarning)
    return [_divided(model, group, config, mesh["ulysses"].get_group()) for model in models]


def _divided(model: VideoModel, group: Group, config: Any, processes: Any) -> VideoModel:
    from diffusers.hooks import apply_context_parallel

    family, n = model.family, group.sequence
    how = family.sequence
    assert how is not None
    for network in networks_of(model.module).values():
        # As diffusers' enable_parallelism does, which asks for an accelerator.
        for module in network.modules():
            if hasattr(getattr(module, "processor", None), "_parallel_config"):
                module.processor._parallel_config = config  # type: ignore[union-attr]
        apply_context_parallel(network, config.context_parallel_config, how.plan(network))
        if how.before_blocks is not None:
            how.before_blocks(network, n, group.rank % n)

    def forward(module: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return family.forward(module, x_t, t, _padded(cond, n) if how.divides_text else cond)

    def tokens(module: nn.Module, output: Any, shape: tuple[int, ...]) -> Tensor:
        if isinstance(output, tuple):
            return family.tokens(module, (_Gather.apply(output[0], processes), *output[1:]), shape)
        return family.tokens(module, _Gather.apply(output, processes), shape)

    return replace(model, family=replace(family, forward=forward, tokens=tokens))


def _mesh(group: Group, device: str) -> Any:
    """All processes, by sequence group and place in it; every process makes it at once."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (group.size // group.sequence, 1, group.sequence)
    return init_device_mesh(device, shape, mesh_dim_names=("group", "ring", "ulysses"))


def _config(group: Group, mesh: Any) -> Any:
    """diffusers' configuration of Ulysses on `mesh`."""
    try:
        from diffusers import ContextParallelConfig, ParallelConfig

        ulysses = ContextParallelConfig(ulysses_degree=group.sequence, mesh=mesh)
    except (ImportError, TypeError) as error:
        raise AccVideoError(
            "the installed diffusers cannot divide tokens among processes; install diffusers 0.37 "
            "or newer"
        ) from error
    config = ParallelConfig(context_parallel_config=ulysses)
    config.setup(group.rank, group.size, torch.device(mesh.device_type), mesh=mesh)
    return config


class _Gather(torch.autograd.Function):
    """[B, N / n, D] of every process -> [B, N, D]; backwards each keeps its own part.

    That is the gradient if what follows is the same in every process.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Any) -> Tensor:
        ctx.place, ctx.count = dist.get_rank(processes), dist.get_world_size(processes)
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(ctx.count)]
        dist.all_gather(parts, x, processes)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.chunk(ctx.count, dim=1)[ctx.place], None


class _Exchange(torch.autograd.Function):
    """[n, ...] -> [n, ...]: what every process sent to this one; gradients travel back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Any) -> Tensor:
        ctx.processes, x = processes, x.contiguous()
        found = torch.empty_like(x)
        dist.all_to_all_single(found, x, group=processes)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Exchange.apply(grad, ctx.processes), None


def processes_of(processor: Any) -> Any:
    """The group among which an attention processor's sequence is divided; None if it is not."""
    config = getattr(processor, "_parallel_config", None)
    config = getattr(config, "context_parallel_config", None)
    return None if config is None else config._ulysses_mesh.get_group()


def all_tokens(x: Tensor, text: int, processes: Any) -> Tensor:
    """[B, M/n, H, D], this process's video tokens and then its `text` ones, of all heads ->
    [B, M, H/n, D], the whole video and then the whole text, of some heads.
    """
    n, video = dist.get_world_size(processes), x.shape[1] - text
    found = _Exchange.apply(x.unflatten(2, (n, -1)).movedim(2, 0), processes)
    parts = found.transpose(0, 1).split([video, text], dim=2)
    return torch.cat([part.flatten(1, 2) for part in parts], dim=1)


def own_tokens(x: Tensor, text: int, processes: Any) -> Tensor:
    """The inverse of `all_tokens`; `text` counts the whole text's tokens."""
    n, video = dist.get_world_size(processes), x.shape[1] - text
    parts = [part.unflatten(1, (n, -1)) for part in x.split([video, text], dim=1)]
    found = _Exchange.apply(torch.cat(parts, dim=2).transpose(0, 1), processes)
    return found.movedim(0, 2).flatten(2, 3)


def _padded(cond: Condition, n: int) -> Condition:
    """With masked text tokens up to a multiple of `n`, which change nothing."""
    missing = -cond.text.shape[1] % n
    pad = nn.functional.pad
    text, mask = pad(cond.text, (0, 0, 0, missing)), pad(cond.full_mask(), (0, missing))
    return Condition(**{**cond.tensors(), "text": text, "mask": mask})


# HunyuanVideo -------------------------------------------------------------------------------------


def _hunyuan_plan(_network: Any) -> dict[str, Any]:
    """Video and text are divided each before the first block; the video is whole at the end."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    rotary = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
    part = ContextParallelInput(split_dim=1, expected_dims=3)
    return {
        "rope": {0: rotary, 1: rotary},
        "transformer_blocks.0": {"hidden_states": part, "encoder_hidden_states": part},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


def _hunyuan_blocks(network: Any, n: int, place: int) -> None:
    """Give every block its mask in the order in which attention meets the tokens.

    A process holds [its video tokens, its text tokens], so all together are in the order video 0,
    text 0, video 1, text 1, ... Attention itself does not depend on the order.

    Networks that treat the first frame apart also get the number of their own tokens that are of
    it.
    """

    def reorder(_block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        video, text, temb, mask, *rest = args
        tokens = video.shape[1]
        if tokens + text.shape[1] < mask.shape[-1]:  # already divided, as after the first block
            tokens *= n
        parts = (mask[..., :tokens], mask[..., tokens:])
        mask = torch.cat([part.unflatten(-1, (n, -1)) for part in parts], dim=-1).flatten(-2)
        if len(rest) > 2:  # rotary embeddings, the first frame's modulation, its tokens
            first = rest[2] - place * (tokens // n)
            rest[2] = min(max(first, 0), tokens // n)
        return (video, text, temb, mask, *rest)

    for block in [*network.transformer_blocks, *network.single_transformer_blocks]:
        block.register_forward_pre_hook(reorder)


HUNYUAN_VIDEO = SequencePlan(_hunyuan_plan, _hunyuan_blocks, divides_text=True)


# Wan ----------------------------------------------------------------------------------------------

WAN_PER_TOKEN = SequencePlan(lambda network: network._cp_plan)
"""Where every token may have a time of its own."""
WAN = SequencePlan(lambda network: {k: v for k, v in network._cp_plan.items() if k})
"""Without the entry that divides such times, which would be warned of."""

"""VideoModel: a diffusion network in the hands of its family.

A family is a table entry. Loops, losses and samplers see `velocity` and `features` only.

Shapes: B batch, C channels, T latent frames, H, W latent size; h, w token grid; D token width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..conditioning import Condition, Micro
from ..errors import AccVideoError
from ..flow import Times, Velocity, time_grid
from ..guidance import Cfg
from ..latents import LatentSpec
from .context_parallel import SequencePlan
from .experts import Experts
from .quantised import packed_weights
from .steady import steady
from .whole_file import WholeFile

if TYPE_CHECKING:
    from .keys.table import KeyTable
    from .vae import VideoVAE

    ImageEncoder = Callable[[Any, VideoVAE, str, Tensor, int, torch.device], Condition]

LOW_RESOLUTION = 480 * 832
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _nothing(*_args: Any) -> Any:
    return None


def _same(x: Any) -> Any:
    return x


def _any_config(_config: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What tells one model family from another. `models/__init__.py` lists them.

    Every callable takes the network (`module`, one expert where there are two) first, so that an
    entry is data about diffusers' class and never a subclass of it.
    """

    name: str
    title: str = ""
    """What people call it."""

    # Which network it is
    transformer_class: str
    """diffusers class of the network, as `transformer/config.json` names it."""
    pipeline_class: str
    """diffusers class of the whole folder, as `model_index.json` names it."""
    matches: Callable[[Mapping[str, Any]], bool] = _any_config
    """Whether a network of the class, by its diffusers configuration, is this family's."""
    experts: int = 1
    """Networks that share the work; of two, the first answers while there is much noise."""
    boundary: float = 0.0
    """Time at and above which the first of two experts answers."""

    # How it is sampled
    grid: Callable[[int, float], Times] = time_grid
    """(steps, shift) -> the family's time grid."""
    shift: float
    """Shift of the official time grid."""
    shift_low: float | None = None
    """Official shift at 480 x 832 pixels and fewer, where that differs."""
    steps: int
    """Steps of the official time grid."""
    guidance: float | None
    """Default embedded guidance, or None for a family without a guidance embedding."""
    cfg: Cfg | None = None
    """Official classifier-free guidance, or None for a family that is not sampled with any."""
    negative_prompt: str = ""
    """Official negative prompt that goes with `cfg`."""
    guides_image: bool = False
    """Whether guidance leads towards the image, so that the negative has zeros for one."""
    to_sigma: Callable[[float], float] = _same
    """Time -> the sigma that ComfyUI's samplers call it; the same number for a flow model."""
    from_sigma: Callable[[float], float] = _same
    """The inverse of `to_sigma`."""
    variance_preserving: bool = False
    """Whether the network's own state is alpha x_0 + s eps, which few samplers know."""
    latent_spec: Callable[[Mapping[str, Any], Mapping[str, Any]], LatentSpec]
    """(transformer config, VAE config, empty when there is no VAE) -> LatentSpec."""

    # How it is asked
    forward: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    """(module, x_t [B,C,T,H,W], t [B] float32, filled cond) -> v [B,C,T,H,W]."""
    blocks: Callable[[nn.Module], list[nn.Module]]
    """The network's blocks in order."""
    joint: bool = True
    """Whether frames attend to each other; in a UNet places do, and apart from that frames."""
    body: Callable[[nn.Module], list[nn.Module]] | None = None
    """All that holds attention and most weights; None where that is `blocks`. A UNet has features
    of its encoder alone."""
    tail: Callable[[nn.Module], nn.Module]
    """The module that runs right after the last block."""
    tokens: Callable[[nn.Module, Any, tuple[int, ...]], Tensor]
    """(module, a block's output, shape of x_t) -> [B, T, h, w, D]."""
    fill: Callable[[Condition], Condition] = _same
    """A condition -> as `forward` takes it, its text filled up."""
    pads_text: bool = False
    """Whether the network attends to a text's padding as to its tokens; a filled condition's mask
    then only tells them apart."""
    tables: tuple[str, ...] = ()
    """Submodules and methods of the network whose result follows from the sizes of what they are
    given (rotary tables): the same in every step of one sampling."""
    texts: tuple[str, ...] = ()
    """Those whose result follows from the condition alone (projections of the text)."""
    lora_targets: tuple[str, ...]
    """Names (suffixes) of the linear layers that adapters go on."""
    key_table: Callable[[Mapping[str, Any]], KeyTable] = _nothing
    """(transformer config) -> names between diffusers and the official release."""
    folder: str = "transformer"
    """Folder of the network in a diffusers pipeline; of the first of two."""
    whole_file: WholeFile | None = None
    """How the network lies in a file together with VAE and encoders; None where nobody does so."""
    sequence: SequencePlan | None = None
    """How several processes divide a sample's tokens; None where they cannot."""

    # What it is conditioned on
    encode: Callable[[Any, Sequence[str], torch.device], Condition]
    """(diffusers pipeline without network and VAE, prompts, device) -> Condition."""
    encode_image: ImageEncoder | None = None
    """(pipeline, VAE, prompt, image [H,W,3] in [0,1] of the video's size, frames, device) ->
    Condition of one sample; None for a text-to-video family."""
    with_micro: Callable[[Micro], ImageEncoder] | None = None
    """`encode_image` of other numbers beside the image; None for a family that takes none."""
    reads_text: bool = True
    """Whether it is prompted with a text; else with an image alone."""
    text_tokens: int | None = None
    """Tokens of a prompt that the text encoder reads, the special ones among them; it cuts the
    rest off. None where there is no such limit."""
    from_native: Callable[[Tensor, Mapping[str, Any], LatentSpec], Condition]
    """One entry of ComfyUI's CONDITIONING (tensor [1,L,D] and its dictionary) -> Condition."""

    def cfg_of(self, scale: float | None) -> Cfg | None:
        """The family's own guidance; with `scale` for the last frame, or for all, that of `scale`.

        Scale 1 is none.
        """
        if scale is None or self.cfg is None:
            return self.cfg if scale is None else Cfg(scale)
        return Cfg(scale, first=None if self.cfg.first is None else min(self.cfg.first, scale))

    def body_of(self, network: nn.Module) -> list[nn.Module]:
        """The modules of a network that hold its attention and most of its weights, in order."""
        return (self.body or self.blocks)(network)

    def time_grid(
        self,
        steps: int | None = None,
        shift: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> Times:
        """The family's own grid, `steps` + 1 falling times.

        `size` is (height, width) in pixels: some families shift small videos less.
        """
        chosen = self.steps if steps is None else steps
        return self.grid(chosen, self.shift_at(size) if shift is None else shift)

    def shift_at(self, size: tuple[int, int] | None) -> float:
        """The official shift for videos of `size` (height, width)."""
        small = size is not None and size[0] * size[1] <= LOW_RESOLUTION
        return self.shift_low if small and self.shift_low is not None else self.shift


class _StopForward(Exception):
    """Raised inside a forward pass once every asked-for feature is there."""


@dataclass(eq=False)
class VideoModel:
    """A network, its family and the geometry of its latents.

    Two VideoModels may share parameter tensors (a LoRA student and its teacher do).
    """

    module: nn.Module = field(repr=False)
    family: Family
    latent_spec: LatentSpec
    source: str = ""
    """Where the weights came from: a folder's name, for messages and provenance."""
    _fingerprint: str = field(default="", repr=False)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The number format it computes in; weights may be stored in fewer bits.

        diffusers keeps some layers of some networks in float32 whatever the rest is in.
        """
        module = self.expert(1.0)
        kept: Sequence[str] = getattr(module, "_keep_in_fp32_modules", None) or ()
        first = None
        for name, p in module.named_parameters():
            if p.dtype in COMPUTE_DTYPES:
                first = first or p.dtype
                if not any(part in name for part in kept):
                    return p.dtype
        assert first is not None
        return first

    @property
    def num_blocks(self) -> int:
        """Blocks of the network, of one expert where there are two."""
        return len(self.family.blocks(self.expert(1.0)))

    @property
    def num_parts(self) -> int:
        """Parts of the network that can be swapped: its blocks, those of a UNet's decoder too."""
        return len(self.family.body_of(self.expert(1.0)))

    def expert(self, t: float) -> nn.Module:
        """The network that answers at time t."""
        if isinstance(self.module, Experts):
            return self.module.high if t >= self.family.boundary else self.module.low
        return self.module

    def velocity(self, x_t: Tensor, t: float | Tensor, cond: Condition) -> Tensor:
        """v at (x_t, t), shape and device of `x_t` [B, C, T, H, W], in the network's dtype.

        `t` is a number or [B], in flow coordinates (1 noise, 0 data).
        """
        times = self._times(t, x_t)
        groups = self._by_expert(t, times)
        if len(groups) == 1:
            return self._ask(groups[0][0], x_t, times, self.prepared(cond))
        v = torch.empty_like(x_t, dtype=self.dtype)
        for expert, rows in groups:
            some = self.prepared(cond.select(rows.tolist()))
            v = v.index_copy(0, rows.to(v.device), self._ask(expert, x_t[rows], times[rows], some))
        return v

    def prepared(self, cond: Condition) -> Condition:
        """`cond` as the network takes it, for `answer`; what is ready already is not made again."""
        ready = self.family.fill(cond.unmasked().to(self.device, self.dtype))
        # What ComfyUI made in inference mode could change without a trace.
        plain = {n: x.clone() if x.is_inference() else x for n, x in ready.tensors().items()}
        return Condition(**plain)

    def answer(self, x_t: Tensor, t: float, ready: Condition) -> Tensor:
        """v at (x_t [B, C, T, H, W], t) of a `prepared` condition, as `velocity`.

        What follows from the condition alone is not done again, and no device is waited for.
        """
        times = torch.full((len(x_t),), t, dtype=torch.float32, device=self.device)
        return self._ask(self.expert(t), x_t, times, ready)

    @contextmanager
    def asking(self, cond: Condition) -> Iterator[Velocity]:
        """(x_t, t) -> v for one condition, as `velocity` gives it: what to sample with.

        Inside, everything that does not change from step to step is done once.
        """
        with self.steady():
            yield partial(self.answer, ready=self.prepared(cond))

    def steady(self) -> AbstractContextManager[None]:
        """Inside, what the networks compute alike in every step is computed once."""
        return steady(self)

    def features(
        self, x_t: Tensor, t: float | Tensor, cond: Condition, blocks: Sequence[int]
    ) -> list[Tensor]:
        """Outputs of the asked-for blocks as token grids [B, T, h, w, D], in the order asked.

        The forward pass stops after the last block asked for. Gradients flow to `x_t`.
        """
        groups = self._by_expert(t, self._times(t, x_t))
        if len(groups) > 1:
            raise AccVideoError(
                "features of a model with two experts are taken at times on one side of its "
                f"boundary {self.family.boundary}; split the batch there"
            )
        module = groups[0][0]
        layers = self.family.blocks(module)
        wrong = [i for i in blocks if not 0 <= i < len(layers)]
        if wrong or not blocks:
            raise AccVideoError(
                f"feature blocks {list(blocks)} must be one or more of 0..{len(layers) - 1}"
            )
        found: dict[int, Tensor] = {}

        def keep(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                found[index] = self.family.tokens(module, output, tuple(x_t.shape))

            return hook

        def stop(_module: nn.Module, _args: Any) -> None:
            raise _StopForward

        after = [*layers, self.family.tail(module)][max(blocks) + 1]
        handles = [layers[i].register_forward_hook(keep(i)) for i in set(blocks)]
        # Stopping before the next module, not inside the last block, leaves a checkpointed block
        # whole. Whatever else that module does before it computes, it does not need to do.
        handles.append(after.register_forward_pre_hook(stop, prepend=True))
        try:
            self.velocity(x_t, t, cond)
        except _StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [found[i] for i in blocks]

    def feature_block(self, t: float) -> int:
        """AccVideo's layer choice: the last block for t > 0, two thirds of the depth for t = 0.

        Sec. 4.3: layer 60 and layer 40 of HunyuanVideo's 60 (1-based); returned 0-based.
        """
        depth = self.num_blocks
        return depth - 1 if t > 0 else max(0, round(depth * 2 / 3) - 1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and a sample of every base weight; 16 hex digits.

        Adapters are left out, so a LoRA student and its teacher have the same fingerprint, and
        values are rounded to bfloat16, so float32 and bfloat16 loads of one checkpoint have too.
        """
        if not self._fingerprint:
            self._fingerprint = weight_fingerprint(self.module)
        return self._fingerprint

    def _ask(self, expert: nn.Module, x_t: Tensor, times: Tensor, ready: Condition) -> Tensor:
        v = self.family.forward(expert, x_t.to(self.device, self.dtype), times, ready)
        return v.to(x_t.device)

    def _by_expert(self, t: float | Tensor, times: Tensor) -> list[tuple[nn.Module, Tensor]]:
        """Each network that is asked, and the rows of the batch that it answers."""
        if not isinstance(self.module, Experts):
            return [(self.module, torch.arange(len(times)))]
        # One number is known here; those on a device would have to be waited for.
        if not isinstance(t, Tensor):
            return [(self.expert(t), torch.arange(len(times)))]
        noisy = (times >= self.family.boundary).cpu()
        parts = ((self.module.high, noisy), (self.module.low, ~noisy))
        return [(expert, rows.nonzero().flatten()) for expert, rows in parts if rows.any()]

    def _times(self, t: float | Tensor, x_t: Tensor) -> Tensor:
        if not isinstance(t, Tensor):  # copying a number to a device would wait for it
            return torch.full((len(x_t),), t, dtype=torch.float32, device=self.device)
        times = t.to(self.device, torch.float32)
        return times.expand(x_t.shape[0]) if times.dim() == 0 else times


def weight_fingerprint(module: nn.Module, samples: int = 64) -> str:
    """Fingerprint of a network's base weights, cheap enough for 13 billion parameters.

    Of fp8 and GGUF weights the numbers count that they stand for, which packing has rounded: such
    a file has another fingerprint than the bf16 file it was made from.
    """
    digest = hashlib.sha256()
    packed = packed_weights(module)
    for name, x in sorted(base_state_dict(module).items()):
        layer = packed.get(name)
        shape = tuple(x.shape) if layer is None else (layer.out_features, layer.in_features)
        stride = max(1, math.prod(shape) // samples)
        if layer is None:
            values = x.detach().reshape(-1)[::stride][:samples]
        else:
            index = torch.arange(0, math.prod(shape), stride, device=x.device)[:samples]
            values = layer.elements(index)
        digest.update(f"{name} {shape}".encode())
        digest.update(values.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def base_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """State dict without adapters, under the names the network had before they were put on."""
    return {
        name.replace(".base_layer.", "."): x
        for name, x in module.state_dict().items()
        if ".lora_" not in name
    }

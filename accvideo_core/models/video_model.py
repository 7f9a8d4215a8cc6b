"""VideoModel: a diffusion network in the hands of its family.

A family is a table entry. Loops, losses and samplers see `velocity` and `features` only.

Shapes: B batch, C channels, T latent frames, H, W latent size; h, w token grid; D token width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioning import Condition
from ..errors import AccVideoError
from ..flow import Times, time_grid
from ..latents import LatentSpec


@dataclass(frozen=True, slots=True)
class Family:
    """What tells one model family from another. `models/__init__.py` lists them.

    Every callable takes the network (`module`) first, so that an entry is data about diffusers'
    class and never a subclass of it.
    """

    name: str
    transformer_class: str
    """diffusers class of the network, as `transformer/config.json` names it."""
    pipeline_class: str
    """diffusers class of the whole folder, as `model_index.json` names it."""
    shift: float
    """Shift of the official time grid."""
    steps: int
    """Steps of the official time grid."""
    guidance: float | None
    """Default embedded guidance, or None for a family without a guidance embedding."""
    latent_spec: Callable[[Mapping[str, Any], Mapping[str, Any]], LatentSpec]
    """(transformer config, VAE config) -> LatentSpec."""
    forward: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    """(module, x_t [B,C,T,H,W], t [B] float32, cond) -> v [B,C,T,H,W]."""
    blocks: Callable[[nn.Module], list[nn.Module]]
    """The network's blocks in order."""
    tail: Callable[[nn.Module], nn.Module]
    """The module that runs right after the last block."""
    tokens: Callable[[nn.Module, Any, tuple[int, ...]], Tensor]
    """(module, a block's output, shape of x_t) -> [B, T, h, w, D]."""
    lora_targets: tuple[str, ...]
    """Names (suffixes) of the linear layers that adapters go on."""
    encode: Callable[[Any, Sequence[str], torch.device], Condition]
    """(diffusers pipeline without network and VAE, prompts, device) -> Condition."""
    from_native: Callable[[Tensor, Mapping[str, Any]], Condition]
    """One entry of ComfyUI's CONDITIONING (tensor [1,L,D] and its dictionary) -> Condition."""

    def time_grid(self, steps: int | None = None, shift: float | None = None) -> Times:
        """The family's own grid, `steps` + 1 falling times."""
        return time_grid(steps or self.steps, self.shift if shift is None else shift)


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
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    @property
    def num_blocks(self) -> int:
        return len(self.family.blocks(self.module))

    def velocity(self, x_t: Tensor, t: float | Tensor, cond: Condition) -> Tensor:
        """v at (x_t, t), shape and device of `x_t` [B, C, T, H, W], in the network's dtype.

        `t` is a number or [B], in flow coordinates (1 noise, 0 data).
        """
        times = self._times(t, x_t)
        moved = cond.trim().to(self.device, self.dtype)
        v = self.family.forward(self.module, x_t.to(self.device, self.dtype), times, moved)
        return v.to(x_t.device)

    def features(
        self, x_t: Tensor, t: float | Tensor, cond: Condition, blocks: Sequence[int]
    ) -> list[Tensor]:
        """Outputs of the asked-for blocks as token grids [B, T, h, w, D], in the order asked.

        The forward pass stops after the last block asked for. Gradients flow to `x_t`.
        """
        layers = self.family.blocks(self.module)
        wrong = [i for i in blocks if not 0 <= i < len(layers)]
        if wrong or not blocks:
            raise AccVideoError(
                f"feature blocks {list(blocks)} must be one or more of 0..{len(layers) - 1}"
            )
        found: dict[int, Tensor] = {}

        def keep(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                found[index] = self.family.tokens(self.module, output, tuple(x_t.shape))

            return hook

        def stop(_module: nn.Module, _args: Any) -> None:
            raise _StopForward

        after = [*layers, self.family.tail(self.module)][max(blocks) + 1]
        handles = [layers[i].register_forward_hook(keep(i)) for i in set(blocks)]
        # Stopping before the next module, not inside the last block, leaves a checkpointed block
        # whole.
        handles.append(after.register_forward_pre_hook(stop))
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

    def _times(self, t: float | Tensor, x_t: Tensor) -> Tensor:
        times = torch.as_tensor(t, dtype=torch.float32, device=self.device)
        return times.expand(x_t.shape[0]) if times.dim() == 0 else times


def weight_fingerprint(module: nn.Module, samples: int = 64) -> str:
    """Fingerprint of a network's base weights, cheap enough for 13 billion parameters."""
    digest = hashlib.sha256()
    for name, x in sorted(base_state_dict(module).items()):
        flat = x.detach().reshape(-1)
        stride = max(1, flat.numel() // samples)
        values = flat[::stride][:samples].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(x.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def base_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """State dict without adapters, under the names the network had before they were put on."""
    return {
        name.replace(".base_layer.", "."): x
        for name, x in module.state_dict().items()
        if ".lora_" not in name
    }

"""Experts: two networks of one architecture that share a denoising path (Wan 2.2 A14B)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .video_model import VideoModel


class Experts(nn.Module):
    """`high` answers while there is much noise, `low` below the family's boundary time."""

    def __init__(self, high: nn.Module, low: nn.Module) -> None:
        super().__init__()
        self.high = high
        self.low = low

    @property
    def config(self) -> Any:
        """The configuration that both networks have."""
        return self.high.config

    def enable_gradient_checkpointing(self) -> None:
        """Let both recompute activations in their backward passes."""
        for expert in (self.high, self.low):
            expert.enable_gradient_checkpointing()  # type: ignore[operator]


def networks_of(module: nn.Module) -> dict[str, nn.Module]:
    """Expert's name -> network; "" for a network that is alone."""
    return {"high": module.high, "low": module.low} if isinstance(module, Experts) else {"": module}


def blocks_of(model: VideoModel) -> list[list[nn.Module]]:
    """The blocks of each network of a model, in order; of a UNet those of its decoder too."""
    return [model.family.body_of(net) for net in networks_of(model.module).values()]

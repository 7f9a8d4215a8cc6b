"""Networks and whole pipelines of diffusers' own classes with random weights, for a CPU.

The text encoders and VAEs are as small as the embedded teacher's; the networks are so large that a
step takes most of a second. Every parameter is random, gates too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accvideo_core.conditioning import Condition
from accvideo_core.latents import seeded_noise
from accvideo_core.models import FAMILIES, VideoModel, tiny
from accvideo_core.models.pipeline_folder import diffusers_class
from accvideo_core.sampling import SamplePlan
from tests import tiny_wan
from tests.tiny import WORDS, randomise

PROMPT = "a red circle moving left a blue square moving right a red square"
NEGATIVE = "a blue circle"
HUNYUAN_BLOCKS = {"num_layers": 2, "num_single_layers": 4, "num_refiner_layers": 2}
ROPE = {128: (16, 56, 56), 16: (4, 6, 6)}
"""Width of a head -> how much of it each axis turns."""


@dataclass(frozen=True)
class Case:
    """A network, and the clip that is sampled with it."""

    family: str
    config: dict[str, Any] = field(repr=False)
    plan: SamplePlan
    text: int
    """Width of the text encoder's tokens."""
    padded: int
    """Text tokens that diffusers' pipeline gives the network, whatever the prompt."""
    pooled: int | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[C, T, H, W] of the latents."""
        return self.spec.shape(self.plan.frames, self.plan.height, self.plan.width)

    @property
    def spec(self) -> Any:
        vae = {"spatial_compression_ratio": 4} if self.family == "hunyuan_video" else {}
        return FAMILIES[self.family].latent_spec(self.config, vae)

    @property
    def tokens(self) -> int:
        """Of the video."""
        _, frames, height, width = self.shape
        return frames * height * width // 4

    def network(self) -> Any:
        """The same weights whenever it is called."""
        cls = diffusers_class(FAMILIES[self.family].transformer_class)
        module = cls(**self.config)
        randomise(module)
        return module.eval().requires_grad_(False)

    def model(self) -> VideoModel:
        return VideoModel(self.network(), FAMILIES[self.family], self.spec, source="bench")

    def condition(self, tokens: int = 20, name: str = "text") -> Condition:
        """Of one prompt with so many valid tokens."""
        pooled = None if self.pooled is None else seeded_noise((1, self.pooled), name, "pooled")
        return Condition(seeded_noise((1, tokens, self.text), name), pooled=pooled)

    def noise(self) -> Tensor:
        """[1, C, T, H, W]."""
        return seeded_noise((1, *self.shape), "noise")

    def save(self, folder: Path) -> Path:
        """A whole pipeline folder."""
        return SAVERS[self.family](self, folder)


def _save_hunyuan(case: Case, folder: Path) -> Path:
    pipeline = tiny.build_pipeline(WORDS)
    randomise(pipeline.vae)
    pipeline.register_modules(transformer=case.network())
    tiny.save_pipeline(pipeline, folder)
    return folder


def _save_wan(case: Case, folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    words: Any = tiny.tokenizer(WORDS)
    WanPipeline(
        tokenizer=words,
        text_encoder=tiny_wan.text_encoder(),
        vae=tiny_wan.vae("wan_t2v"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=case.network(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


SAVERS = {"hunyuan_video": _save_hunyuan, "wan_t2v": _save_wan}


def hunyuan(width: int, plan: SamplePlan, **blocks: int) -> Case:
    """HunyuanVideo of this width."""
    head = _head(width)
    config = {
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        **{**HUNYUAN_BLOCKS, **blocks},
        "text_embed_dim": tiny.TEXT_WIDTH,
        "pooled_projection_dim": tiny.TEXT_WIDTH,
        "rope_axes_dim": ROPE[head],
        "in_channels": tiny.LATENT_CHANNELS,
        "out_channels": tiny.LATENT_CHANNELS,
    }
    return Case("hunyuan_video", config, plan, tiny.TEXT_WIDTH, 256, tiny.TEXT_WIDTH)


def wan(width: int, plan: SamplePlan, blocks: int = 6) -> Case:
    """Wan text to video with the released ratio of widths."""
    head = _head(width)
    config = {
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "text_dim": tiny_wan.TEXT,
        "freq_dim": 64,
        "ffn_dim": width * 8960 // 1536 // 8 * 8,
        "num_layers": blocks,
        "rope_max_seq_len": 64,
    }
    return Case("wan_t2v", config, plan, tiny_wan.TEXT, 512)


def _head(width: int) -> int:
    """The released width of a head, or a small one."""
    return 128 if width % 128 == 0 else 16


def cases(quick: bool) -> dict[str, Case]:
    """By family: of the sizes that are reported, or tiny ones that show that everything works."""
    if quick:
        return {
            "hunyuan_video": hunyuan(32, SamplePlan(5, 32, 32)),
            "wan_t2v": wan(32, SamplePlan(5, 64, 64), blocks=2),
        }
    return {
        "hunyuan_video": hunyuan(512, SamplePlan(17, 128, 128)),
        "wan_t2v": wan(512, SamplePlan(17, 256, 256)),
    }


def parameters(module: torch.nn.Module) -> float:
    """In millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6

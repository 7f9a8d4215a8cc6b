"""What one network pass takes with diffusers' attention processors and with ours, as a table.

    python -m scripts.attention_speed                 what docs/sampling_speed.md shows

Random networks of width 512 (4 heads of 128), float32, one prompt, this machine's CPU. The two are
asked in turn, and the shortest passes are compared: what disturbs can only make one longer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.conditioning import Condition  # noqa: E402
from accvideo_core.latents import LatentSpec, seeded_noise  # noqa: E402
from accvideo_core.models import FAMILIES, VideoModel  # noqa: E402
from accvideo_core.models.attention import attention  # noqa: E402

HEADS, HEAD = 4, 128
GRID = (5, 16, 16)
"""Tokens of the video: 1280."""
TEXT, WIDTH = 256, 128
"""Tokens of the text, all valid, and their width."""


def hunyuan_video() -> VideoModel:
    """2 dual-stream and 4 single-stream blocks."""
    from diffusers import HunyuanVideoTransformer3DModel

    network = HunyuanVideoTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        num_layers=2,
        num_single_layers=4,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
    )
    return _model(network, "hunyuan_video")


def wan_t2v() -> VideoModel:
    """6 blocks."""
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        num_layers=6,
        ffn_dim=4 * HEADS * HEAD,
        text_dim=WIDTH,
    )
    return _model(network, "wan_t2v")


def cogvideox_5b() -> VideoModel:
    """6 blocks."""
    from diffusers import CogVideoXTransformer3DModel

    network = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        num_layers=6,
        text_embed_dim=WIDTH,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    return _model(network, "cogvideox_5b")


def _model(network: Any, family: str) -> VideoModel:
    spec = LatentSpec(network.config.in_channels, stride_t=4, stride_hw=8, scale=(1.0,), patch=2)
    return VideoModel(network.eval().requires_grad_(False), FAMILIES[family], spec)


def asked(model: VideoModel) -> tuple[Tensor, Condition]:
    frames, height, width = GRID
    shape = (1, model.latent_spec.channels, frames, 2 * height, 2 * width)
    condition = Condition(
        text=seeded_noise((1, TEXT, WIDTH), "text"), pooled=seeded_noise((1, WIDTH), "pooled")
    )
    return seeded_noise(shape, "state"), condition


@torch.no_grad()
def seconds(model: VideoModel, rounds: int) -> tuple[float, float]:
    """Of diffusers' processors and of ours."""
    x, condition = asked(model)

    def pass_seconds() -> float:
        start = time.perf_counter()
        model.velocity(x, 0.6, condition)
        return time.perf_counter() - start

    theirs, ours = [], []
    for number in range(rounds + 1):
        plain = pass_seconds()
        with attention(model):
            chosen = pass_seconds()
        if number:  # the first one warms up
            theirs.append(plain)
            ours.append(chosen)
    return min(theirs), min(ours)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args(arguments)
    print("| network | diffusers s | ours s | ours / diffusers |\n|---|---|---|---|")
    for make in (hunyuan_video, wan_t2v, cogvideox_5b):
        theirs, ours = seconds(make(), given.rounds)
        print(f"| {make.__name__} | {theirs:.3f} | {ours:.3f} | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()

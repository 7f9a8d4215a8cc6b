"""Very small random Wan networks, VAEs, encoders and whole pipeline folders, all parameters random.

Latent channels (16 or 48), CLIP's place and the folders' settings are the released models' own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from accvideo_core.conditioning import Condition
from accvideo_core.models import FAMILIES, Family, VideoModel
from accvideo_core.models.experts import Experts
from accvideo_core.models.tiny import tokenizer
from tests.tiny import WORDS, randomise

TEXT, IMAGE, WIDTH = 20, 16, 24
FAMILY_NAMES = ("wan_t2v", "wan_i2v", "wan22_t2v", "wan22_i2v", "wan22_ti2v")
IMAGE_FAMILIES = ("wan_i2v", "wan22_i2v", "wan22_ti2v")


def family(name: str) -> Family:
    return FAMILIES[name]


def channels(name: str) -> int:
    return 48 if name == "wan22_ti2v" else 16


def network(name: str, seed: int = 0) -> WanTransformer3DModel:
    """3 blocks of width 24; one expert where there are two."""
    latent = channels(name)
    clip = name == "wan_i2v"
    module = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=latent + 20 if name.endswith("_i2v") else latent,
        out_channels=latent,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=40,
        num_layers=3,
        image_dim=IMAGE if clip else None,
        added_kv_proj_dim=WIDTH if clip else None,
        rope_max_seq_len=32,
    )
    randomise(module, seed)
    return module.eval().requires_grad_(False)


def video_model(name: str, seed: int = 0) -> VideoModel:
    """With the released VAE's scaling, as there is no VAE."""
    module = network(name, seed)
    spec = family(name).latent_spec(module.config, {})
    if family(name).experts == 2:
        return VideoModel(Experts(module, network(name, seed + 1)), family(name), spec, "tiny")
    return VideoModel(module, family(name), spec, "tiny")


def latents(name: str, batch: int = 2, seed: int = 2) -> torch.Tensor:
    """[B, C, 2, 4, 4]: 5 frames of 32 x 32 pixels, or 64 x 64 for the 5B model."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels(name), 2, 4, 4, generator=generator)


def condition(name: str, batch: int = 2, length: int = 5, seed: int = 1) -> Condition:
    """Random text and, for image families, random images that go with `latents`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    given: dict[str, Any] = {}
    if name.endswith("_i2v"):
        given["image"] = random(20, 2, 4, 4)
    if name == "wan_i2v":
        given["image_tokens"] = random(5, IMAGE)
    if name == "wan22_ti2v":
        given["image"] = random(48, 1, 4, 4)
    mask = torch.ones(batch, length, dtype=torch.bool)
    return Condition(text=random(length, TEXT), mask=mask, **given)


def vae(name: str, seed: int = 0) -> AutoencoderKLWan:
    """4x in time, 8x in space (16x with patches of 2 for the 5B model), random scaling."""
    generator = torch.Generator().manual_seed(seed)
    latent = channels(name)
    patched: dict[str, Any] = {
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "decoder_base_dim": 4,
    }
    module = AutoencoderKLWan(
        base_dim=4,
        z_dim=latent,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=torch.randn(latent, generator=generator).tolist(),
        latents_std=(torch.rand(latent, generator=generator) + 0.5).tolist(),
        **(patched if latent == 48 else {}),
    )
    randomise(module, seed)
    return module.eval()


def text_encoder(seed: int = 0) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    module = UMT5EncoderModel(
        UMT5Config(
            vocab_size=5 + len(WORDS),
            d_model=TEXT,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
        )
    )
    randomise(module, seed)
    return module.eval()


def image_encoder(seed: int = 0) -> tuple[Any, Any]:
    """CLIP's vision network, 5 tokens of an image, and its preprocessing."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    module = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=IMAGE,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    )
    randomise(module, seed)
    size = {"height": 32, "width": 32}
    return module.eval(), CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)


def save_pipeline(name: str, folder: Path, seed: int = 0) -> Path:
    """A complete random pipeline folder of a family."""
    parts: dict[str, Any] = {
        "tokenizer": tokenizer(WORDS),
        "text_encoder": text_encoder(seed + 2),
        "vae": vae(name, seed + 3),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=family(name).shift),
        "transformer": network(name, seed),
        "expand_timesteps": name == "wan22_ti2v",
    }
    if family(name).experts == 2:
        parts["transformer_2"] = network(name, seed + 1)
        parts["boundary_ratio"] = family(name).boundary
    if name == "wan_i2v":
        parts["image_encoder"], parts["image_processor"] = image_encoder(seed + 4)
    cls = WanImageToVideoPipeline if name.endswith("_i2v") else WanPipeline
    cls(**parts).save_pretrained(folder, safe_serialization=True)
    return folder


def picture(name: str, size: tuple[int, int] = (32, 48), seed: int = 5) -> torch.Tensor:
    """A random image [H, W, 3] in [0, 1] of 8-bit colours; twice the size for the 5B model."""
    factor = 2 if name == "wan22_ti2v" else 1
    generator = torch.Generator().manual_seed(seed)
    shape = (size[0] * factor, size[1] * factor, 3)
    return torch.randint(0, 256, shape, generator=generator) / 255

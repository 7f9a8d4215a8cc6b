"""Tiny whole networks: what the official code gives for random weights and inputs.

A case is data; two functions run it, one for each official network. Every block's video tokens are
kept beside the velocity.

Shapes: B batch, C channels, T latent frames, H, W; L text tokens; P video tokens; D token width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from accvideo_core.latents import seeded_noise

from . import official
from .regenerate import Tensors, weight

TIMESTEPS = 1000.0
TEXT, POOLED, IMAGE_TOKENS, CLIP = 24, 20, 5, 1280


@dataclass(frozen=True, slots=True)
class Case:
    """One network: which code, which family of ours, its widths on both sides, its inputs."""

    name: str
    family: str
    code: str
    """Which checkout: a key of `make_references.CHECKOUTS`."""
    run: Callable[[Case, ModuleType], tuple[nn.Module, Tensors]] = field(repr=False)
    native: Mapping[str, Any]
    """Arguments of the official constructor."""
    config: Mapping[str, Any]
    """Configuration of the same network in diffusers."""
    shape: tuple[int, ...]
    """Of the latents x_t, [B, C, T, H, W]."""
    t: tuple[float, ...]
    lengths: tuple[int, ...]
    """Valid text tokens of every sample."""
    image_shape: tuple[int, ...] = ()
    """[C', T'] of the image condition, none when empty."""
    replaced: int = 0
    """Latent frames that the image takes the place of."""
    seed: int = 0

    def noise(self, name: str, *shape: int) -> Tensor:
        return seeded_noise(shape, "parity", self.seed, "input", name)


def make(case: Case, code: ModuleType) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and header of one case's reference file."""
    with torch.no_grad():
        network, tensors = case.run(case, code)
    info = {
        "family": case.family,
        "code": case.code,
        "seed": case.seed,
        "native": {**case.native},
        "config": {**case.config},
        "parameters": {name: list(p.shape) for name, p in network.named_parameters()},
        "blocks": sum(name.startswith("block.") for name in tensors),
        "replaced": case.replaced,
    }
    return tensors, info


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Every parameter of an official module in float32, from its name and `seed`."""
    module.float().eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.copy_(weight(name, tuple(parameter.shape), seed))
    return module


def keep_tokens(blocks: list[nn.Module], found: Tensors, tokens: int) -> None:
    """Write the video tokens [B, P, D] that each block gives into `found` when it runs."""

    def hook(index: int) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            # A double block gives (video, text), a single block both in one sequence.
            video = output[0] if isinstance(output, tuple) else output
            found[f"block.{index}"] = video[:, :tokens]

        return keep

    for index, block in enumerate(blocks):
        block.register_forward_hook(hook(index))


def _inputs(case: Case) -> Tensors:
    batch, _, _, height, width = case.shape
    longest = max(case.lengths)
    mask = torch.arange(longest) < torch.tensor(case.lengths)[:, None]
    found = {
        "x_t": case.noise("x_t", *case.shape),
        "t": torch.tensor(case.t),
        "text": case.noise("text", batch, longest, TEXT) * mask[..., None],
        "mask": mask,
    }
    if case.image_shape:
        channels, frames = case.image_shape
        found["image"] = case.noise("image", batch, channels, frames, height, width)
    return found


def _tokens(case: Case) -> int:
    return case.shape[2] * (case.shape[3] // 2) * (case.shape[4] // 2)


def run_hunyuan(case: Case, code: ModuleType) -> tuple[nn.Module, Tensors]:
    """HunyuanVideo, AccVideo's copy of it and HunyuanVideo-I2V."""
    config = {**case.native}
    args = official.hunyuan_args(
        text_states_dim=TEXT,
        text_states_dim_2=POOLED,
        i2v_condition_type=config.pop("i2v_condition_type", None),
    )
    network: Any = randomise(code.HYVideoDiffusionTransformer(args, **config), case.seed)
    tensors = _inputs(case)
    x = tensors["x_t"]
    tensors["pooled"] = case.noise("pooled", len(x), POOLED)
    if config.get("guidance_embed"):
        tensors["guidance"] = torch.tensor([6.0, 3.5])[: len(x)]
    if "image" in tensors:
        x = _with_image(x, tensors["image"], args.i2v_condition_type)
    # Two padded tokens more than any sample needs, of values that must have no influence.
    noise = case.noise("padding", *tensors["text"].shape[:1], tensors["text"].shape[1] + 2, TEXT)
    padded = nn.functional.pad(tensors["mask"], (0, 2))
    text = torch.where(padded[..., None], nn.functional.pad(tensors["text"], (0, 0, 0, 2)), noise)
    tensors |= {"text": text, "mask": padded}
    keep_tokens([*network.double_blocks, *network.single_blocks], tensors, _tokens(case))
    cos, sin = None, None
    if not hasattr(network, "get_rotary_pos_embed"):  # AccVideo's network has its own
        grid = (case.shape[2], case.shape[3] // 2, case.shape[4] // 2)
        cos, sin = official.hunyuan_rope(code, case.native["rope_dim_list"], grid)
    guidance = tensors["guidance"] * TIMESTEPS if "guidance" in tensors else None
    times = tensors["t"] * TIMESTEPS
    tensors["velocity"] = network(
        x, times, text, padded.long(), tensors["pooled"], cos, sin, guidance, return_dict=False
    )
    return network, tensors


def _with_image(x: Tensor, image: Tensor, kind: str) -> Tensor:
    """The network's input as the official pipeline puts it together from one latent frame."""
    if kind == "token_replace":
        return torch.cat([image, x[:, :, 1:]], 2)
    repeated = image.repeat(1, 1, x.shape[2], 1, 1)
    repeated[:, :, 1:] = 0
    mask = torch.ones_like(repeated[:, :1])
    mask[:, :, 1:] = 0
    return torch.cat([x, repeated, mask], 1)


def run_wan(case: Case, code: ModuleType) -> tuple[nn.Module, Tensors]:
    """Wan 2.1 and 2.2, with image conditions that are concatenated."""
    network: Any = randomise(code.WanModel(**case.native), case.seed)
    tensors = _inputs(case)
    extra: dict[str, Any] = {}
    if "image" in tensors:
        extra["y"] = list(tensors["image"])
    if hasattr(network, "img_emb"):
        tensors["image_tokens"] = case.noise("image_tokens", len(case.t), IMAGE_TOKENS, CLIP)
        extra["clip_fea"] = tensors["image_tokens"]
    times = tensors["t"] * TIMESTEPS
    if case.code == "wan22":  # one time per token
        times = times[:, None].expand(-1, _tokens(case))
    return network, _call_wan(network, case, tensors, tensors["x_t"], times, extra)


def run_wan_in_place(case: Case, code: ModuleType) -> tuple[nn.Module, Tensors]:
    """Wan 2.2 TI2V: the image is the first latent frame, whose tokens have time 0."""
    network: Any = randomise(code.WanModel(**case.native), case.seed)
    tensors = _inputs(case)
    x = torch.cat([tensors["image"], tensors["x_t"][:, :, 1:]], 2)
    per_token = (tensors["t"] * TIMESTEPS)[:, None].repeat(1, _tokens(case))
    per_token[:, : _tokens(case) // case.shape[2]] = 0
    return network, _call_wan(network, case, tensors, x, per_token, {})


def _call_wan(
    network: Any, case: Case, tensors: Tensors, x: Tensor, times: Tensor, extra: dict[str, Any]
) -> Tensors:
    keep_tokens(list(network.blocks), tensors, _tokens(case))
    context = [text[:n] for text, n in zip(tensors["text"], case.lengths, strict=True)]
    out = network(list(x), times, context, _tokens(case), **extra)
    return {**tensors, "velocity": torch.stack(out)}


def _hunyuan(
    name: str, family: str, code: str, channels: int = 4, kind: str | None = None, **changes: Any
) -> Case:
    guidance = kind != "latent_concat"  # whose release has none
    native: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": 4,
        "hidden_size": 32,
        "heads_num": 2,
        "mm_double_blocks_depth": 2,
        "mm_single_blocks_depth": 2,
        "rope_dim_list": [4, 6, 6],
        "guidance_embed": guidance,
    }
    config = {
        "in_channels": channels,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": guidance,
        "text_embed_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "rope_theta": 256.0,
        "rope_axes_dim": [4, 6, 6],
        "image_condition_type": kind,
    }
    if kind:
        native["i2v_condition_type"] = kind
    shape = (2, 4, 3, 4, 6)
    lengths, t = (7, 3), (0.9130, 0.3571)
    return Case(name, family, code, run_hunyuan, native, config, shape, t, lengths, **changes)


def _wan(
    name: str,
    family: str,
    code: str = "wan21",
    channels: int = 16,
    extra_channels: int = 0,
    kind: str = "t2v",
    run: Callable[[Case, ModuleType], tuple[nn.Module, Tensors]] = run_wan,
    **changes: Any,
) -> Case:
    clip = code == "wan21" and kind == "i2v"
    # Their checkpoints have heads of 128; two of them are few enough.
    native = {
        "model_type": kind,
        "in_dim": channels + extra_channels,
        "out_dim": channels,
        "dim": 256,
        "ffn_dim": 352,
        "text_dim": TEXT,
        "num_heads": 2,
        "num_layers": 2,
    }
    config = {
        "patch_size": [1, 2, 2],
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "in_channels": channels + extra_channels,
        "out_channels": channels,
        "text_dim": TEXT,
        "freq_dim": 256,
        "ffn_dim": 352,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": CLIP if clip else None,
        "added_kv_proj_dim": 256 if clip else None,
    }
    settings: dict[str, Any] = {"t": (0.9650, 0.4123), "lengths": (9, 5)}
    shape = (2, channels, 3, 4, 6)
    if extra_channels:
        settings["image_shape"] = (extra_channels, 3)
    return Case(name, family, code, run, native, config, shape, **{**settings, **changes})


CASES: tuple[Case, ...] = (
    _hunyuan("hunyuan_video", "hunyuan_video", "hunyuan", seed=1),
    _hunyuan("accvideo", "hunyuan_video", "accvideo", seed=2),
    _hunyuan(
        "hunyuan_video_i2v",
        "hunyuan_video_i2v",
        "hunyuan_i2v",
        channels=9,
        kind="latent_concat",
        image_shape=(4, 1),
        seed=3,
    ),
    _hunyuan(
        "hunyuan_video_i2v_replace",
        "hunyuan_video_i2v_replace",
        "hunyuan_i2v",
        kind="token_replace",
        image_shape=(4, 1),
        replaced=1,
        seed=4,
    ),
    _wan("wan_t2v", "wan_t2v", seed=5),
    _wan("wan_i2v", "wan_i2v", extra_channels=20, kind="i2v", seed=6),
    _wan("wan22_t2v_high", "wan22_t2v", "wan22", seed=7, t=(0.9650, 0.8800)),
    _wan("wan22_t2v_low", "wan22_t2v", "wan22", seed=8, t=(0.8700, 0.1234)),
    _wan(
        "wan22_i2v_high",
        "wan22_i2v",
        "wan22",
        extra_channels=20,
        kind="i2v",
        seed=9,
        t=(0.9650, 0.9050),
    ),
    _wan(
        "wan22_i2v_low",
        "wan22_i2v",
        "wan22",
        extra_channels=20,
        kind="i2v",
        seed=10,
        t=(0.8900, 0.1234),
    ),
    _wan("wan22_ti2v", "wan22_ti2v", "wan22", channels=48, kind="ti2v", seed=11),
    _wan(
        "wan22_ti2v_image",
        "wan22_ti2v",
        "wan22",
        channels=48,
        kind="ti2v",
        run=run_wan_in_place,
        image_shape=(48, 1),
        replaced=1,
        seed=12,
    ),
)

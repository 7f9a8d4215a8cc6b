"""Our HunyuanVideo network against AccVideo's own code, with the same weights and inputs.

The checkout is given by path, imported from where it lies and left as it is; its flash attention is
replaced by torch's own over the same segments (see scripts/parity/official.py). Its text is padded
to 256 tokens and masked, as its sampler gives it, and its rotary tables are made once, as there.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accvideo_core.conditioning import Condition
from accvideo_core.latents import seeded_noise
from accvideo_core.models import FAMILIES, VideoModel
from accvideo_core.speed import Speed, sped_up
from benchmarks.sampling_cases import Case, cases
from benchmarks.sampling_rows import Options, Result, against
from scripts.parity import official

SUBFOLDER = Path("models") / "hunyuan"
AIM = 1 / 1.2
TIME = 0.8235


def official_network(case: Case, folder: Path) -> tuple[nn.Module, Any]:
    """AccVideo's class at the case's size, without weights of its own; and its code."""
    code = official.hunyuan("official_accvideo", folder / SUBFOLDER)
    config = case.config
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    args = official.hunyuan_args(text_states_dim=case.text, text_states_dim_2=case.pooled)
    network = code.HYVideoDiffusionTransformer(
        args,
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        hidden_size=heads * head,
        heads_num=heads,
        mm_double_blocks_depth=config["num_layers"],
        mm_single_blocks_depth=config["num_single_layers"],
        rope_dim_list=list(config["rope_axes_dim"]),
        guidance_embed=True,
    )
    return network.eval().requires_grad_(False), code


@torch.no_grad()
def share_weights(case: Case, theirs: nn.Module) -> VideoModel:
    """Our model with the values of theirs."""
    model = case.model()
    config: Any = model.module.config
    table = FAMILIES[case.family].key_table(config)
    state: dict[str, Tensor] = {}
    for name, value in theirs.state_dict().items():
        state |= dict(table.to_diffusers(name, value))
    model.module.load_state_dict(state, strict=True)
    return model


@torch.no_grad()
def their_answer(network: Any, case: Case, cond: Condition, noise: Tensor, rope: Any) -> Tensor:
    """A forward pass as their sampler calls it."""
    missing = case.padded - cond.text.shape[1]
    mask = torch.arange(case.padded)[None] < cond.text.shape[1]
    text = nn.functional.pad(cond.text, (0, 0, 0, missing))
    time, guidance = torch.tensor([TIME * 1000]), torch.tensor([6000.0])
    pooled = cond.pooled
    return network(noise, time, text, mask.long(), pooled, *rope, guidance, return_dict=False)


@torch.no_grad()
def our_answer(model: VideoModel, cond: Condition, noise: Tensor) -> Tensor:
    """The same of ours, asked once."""
    return model.velocity(noise, TIME, cond)


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Their initialisation leaves gates at zero, which would hide most of the network."""
    for name, p in module.named_parameters():
        noise = seeded_noise(tuple(p.shape), "official", name)
        scale = 0.1 if p.dim() < 2 else p[0].numel() ** -0.5
        p.copy_(noise * scale + (1.0 if p.dim() == 1 and bool((p == 1).all()) else 0.0))
    return module


def bench(options: Options) -> list[Result]:
    """Rows of one forward pass each."""
    assert options.official is not None
    case = cases(options.quick)["hunyuan_video"]
    network, code = official_network(case, options.official)
    model = share_weights(case, randomise(network))
    cond, noise = case.condition().with_guidance(6.0), case.noise()
    grid = (case.shape[1], case.shape[2] // 2, case.shape[3] // 2)
    rope = official.hunyuan_rope(code, list(case.config["rope_axes_dim"]), grid)
    facts = {"tokens": case.tokens, "text": cond.text.shape[1], "padded_text": case.padded}
    theirs = partial(their_answer, network, case, cond, noise, rope)
    rows = []
    for name, speed in {"": Speed(), ", compiled": Speed(compile=True)}.items():
        title = f"a step{name} / AccVideo's code"
        with sped_up(model, speed, backend="eager" if options.quick else "inductor") as fast:
            ours = partial(our_answer, fast, cond, noise)
            rows.append(against(title, AIM, options.repeats, ours, theirs, **facts))
    return rows

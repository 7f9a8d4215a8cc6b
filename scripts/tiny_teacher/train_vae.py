"""Teach AutoencoderKLHunyuanVideo the latent space of the PCA codec, one half at a time.

    python scripts/tiny_teacher/train_vae.py decoder --steps 3000
    python scripts/tiny_teacher/train_vae.py encoder --steps 800

The decoder maps the codec's latents plus a little noise to the clip (mean square + mean absolute
error: both, so that edges become sharp). It goes through ``vae.decode``, because the class blends
two overlapping temporal tiles for 17 frames. The encoder regresses the codec's latents; its
variance is fixed by the bias of the last layer. Both halves are independent of each other and of
the diffusion model.

Shapes: B clips [B, 3, 17, 32, 32] in [-1, 1], VAE latents [B, 16, 5, 8, 8] = codec latents / 0.5.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import codec as codecs
import data
from accvideo_core.evaluate import world
from accvideo_core.models import tiny
from checkpoint import Checkpoint
from optim import Muon, trapezoid

WORK = Path("build/tiny_teacher")
MUON_LR = 0.03
ADAM_LR = 2e-3
NOISE = 0.05

log = logging.getLogger("train_vae")


def decoder_loss(
    vae: Any, codec: codecs.Codec, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Training loss and mean square error of one batch of decoded clips."""
    specs = world.sample_specs(batch, generator)
    choice = torch.randint(len(world.BACKGROUNDS), (batch,), generator=generator)
    fade = torch.rand(batch, generator=generator)
    fade = fade * (torch.rand(batch, generator=generator) < 0.4)
    towards = [world.BACKGROUNDS[i] for i in choice.tolist()]
    video = data.blended(specs, towards, fade, generator)
    latents = codec.encode(video)
    latents = latents + NOISE * torch.randn(latents.shape, generator=generator)
    error = vae.decode(latents / tiny.SCALING_FACTOR).sample - video
    square = error.square().mean()
    return 2 * square + 0.5 * error.abs().mean(), square


def encoder_loss(
    vae: Any, codec: codecs.Codec, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean square error of one batch of encoded clips, in units of model-space latents."""
    video = world.render(world.sample_specs(batch, generator), generator)
    mean = vae.encode(video).latent_dist.mean
    square = (mean * tiny.SCALING_FACTOR - codec.encode(video)).square().mean()
    return square, square


LOSSES = {"decoder": decoder_loss, "encoder": encoder_loss}


def half(vae: Any, part: str) -> nn.ModuleDict:
    """The modules that belong to one half."""
    conv = vae.post_quant_conv if part == "decoder" else vae.quant_conv
    return nn.ModuleDict({"body": getattr(vae, part), "conv": conv})


def initialise(vae: Any) -> None:
    """Orthogonal convolutions, and a posterior of standard deviation exp(-3)."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        vae.quant_conv.weight[tiny.LATENT_CHANNELS :] = 0
        vae.quant_conv.bias[tiny.LATENT_CHANNELS :] = -6.0


def train(options: argparse.Namespace) -> None:
    codec = codecs.load_or_fit(WORK / "codec.safetensors")
    torch.manual_seed(options.seed)
    vae: Any = tiny.vae()
    initialise(vae)
    modules = half(vae, options.part)
    matrices = [p for p in modules.parameters() if p.ndim > 1]
    rest = [p for p in modules.parameters() if p.ndim == 1]
    muon, adam = Muon(matrices, MUON_LR), torch.optim.AdamW(rest, ADAM_LR, weight_decay=0.0)
    run = Checkpoint(WORK / f"{options.part}.pt", {"modules": modules, "muon": muon, "adam": adam})
    window: list[float] = []
    while run.step < options.steps:
        factor = trapezoid(run.step, options.steps, warmup=30, decay=0.4)
        for optimiser, rate in ((muon, MUON_LR), (adam, ADAM_LR)):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            loss, square = LOSSES[options.part](vae, codec, options.batch, generator)
        loss.backward()
        for optimiser in (muon, adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        run.advance()
        window.append(square.item())
        if run.step % 50 == 0:
            report(run, options.part, sum(window) / len(window))
            window = []
        run.save_now_and_then()
    run.save()


def report(run: Checkpoint, part: str, square: float) -> None:
    # The peak-to-peak range of a clip is 2; for the encoder the figure is only indicative.
    psnr = 10 * torch.log10(torch.tensor(4 / square)).item()
    record = {
        "part": part,
        "step": run.step,
        "mse": round(square, 5),
        "psnr": round(psnr, 2),
        "seconds": round(run.seconds, 1),
    }
    log.info("%s", record)
    with (WORK / "vae.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + os.linesep)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=sorted(LOSSES))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    train(options)


if __name__ == "__main__":
    main()

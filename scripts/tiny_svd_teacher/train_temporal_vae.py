"""Teach AutoencoderKLTemporalDecoder the latent space of the frame codec, one half at a time.

    python scripts/tiny_svd_teacher/train_temporal_vae.py decoder --steps 800
    python scripts/tiny_svd_teacher/train_temporal_vae.py encoder --steps 400

The decoder maps the codec's latents plus a little noise to the clip (mean square + mean absolute
error: both, so that edges become sharp). The encoder regresses the codec's latents of single
frames; its variance is fixed by the bias of the last layer. Both halves are independent of each
other and of the diffusion model.

Shapes: B clips [B, 3, T, 32, 32] in [-1, 1], VAE latents [B * T, 8, 8, 8] = codec's / 0.18215.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import frame_codec
from accvideo_core.evaluate import image_world, world
from accvideo_core.models import tiny_svd
from accvideo_core.models.tiny_svd import LATENT_CHANNELS, SCALING_FACTOR
from checkpoint import Checkpoint
from optim import Muon, trapezoid

WORK = Path("build/tiny_svd_teacher")
MUON_LR = 0.03
ADAM_LR = 2e-3
NOISE = 0.05
WINDOW = 4  # frames of a clip that the decoder is shown at a time: more clips for the same cost

log = logging.getLogger("train_temporal_vae")


def ghosted(size: int, generator: torch.Generator) -> Tensor:
    """Clips, some mixed with another one.

    What few-step sampling leaves undecided is a mean of clips. A decoder that has seen none would
    round it to the nearest clip and hide what was lost.
    """
    video = image_world.render(world.sample_specs(size, generator), generator)
    mixed = torch.rand(size, generator=generator) < 0.3
    share = mixed * torch.rand(size, generator=generator)
    return torch.lerp(video, video.roll(1, 0), share.view(-1, 1, 1, 1, 1))


def decoder_loss(
    vae: Any, codec: frame_codec.FrameCodec, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Training loss and mean square error of one batch of decoded clips."""
    start = int(torch.randint(image_world.FRAMES - WINDOW + 1, (), generator=generator))
    video = ghosted(batch, generator)[:, :, start : start + WINDOW]
    latents = codec.encode(video).flatten(0, 1)
    latents = latents + NOISE * torch.randn(latents.shape, generator=generator)
    decoded = vae.decode(latents / SCALING_FACTOR, num_frames=WINDOW).sample
    error = decoded - _frames(video)
    square = error.square().mean()
    return 2 * square + 0.5 * error.abs().mean(), square


def encoder_loss(
    vae: Any, codec: frame_codec.FrameCodec, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean square error of one batch of encoded frames, in units of model-space latents."""
    video = image_world.render(world.sample_specs(batch, generator), generator)
    # The pipeline adds this noise to the image that it encodes.
    video = video + 0.02 * torch.randn(video.shape, generator=generator)
    mean = vae.encode(_frames(video)).latent_dist.mean
    square = (mean * SCALING_FACTOR - codec.encode(video).flatten(0, 1)).square().mean()
    return square, square


LOSSES = {"decoder": decoder_loss, "encoder": encoder_loss}


def _frames(video: Tensor) -> Tensor:
    return video.transpose(1, 2).flatten(0, 1)


def half(vae: Any, part: str) -> nn.ModuleDict:
    """The modules that belong to one half."""
    if part == "decoder":
        return nn.ModuleDict({"body": vae.decoder})
    return nn.ModuleDict({"body": vae.encoder, "conv": vae.quant_conv})


@torch.no_grad()
def initialise(vae: Any) -> None:
    """Orthogonal convolutions, latents of the right size, a posterior of deviation exp(-3)."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.dirac_(vae.decoder.time_conv_out.weight)
    vae.decoder.conv_in.weight *= SCALING_FACTOR
    vae.quant_conv.weight[:LATENT_CHANNELS] /= SCALING_FACTOR
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0
    vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0


def optimisers(modules: nn.ModuleDict) -> tuple[Muon, torch.optim.AdamW]:
    """Muon on everything with rows and columns but the scaled first and last convolutions."""
    scaled = ("body.conv_in.", "conv.", "body.time_conv_out.")
    matrices, rest = [], []
    for name, parameter in modules.named_parameters():
        plain = parameter.ndim > 1 and not name.startswith(scaled)
        (matrices if plain else rest).append(parameter)
    return Muon(matrices, MUON_LR), torch.optim.AdamW(rest, ADAM_LR, weight_decay=0.0)


def train(options: argparse.Namespace) -> None:
    codec = frame_codec.load_or_fit(WORK / "codec.safetensors")
    torch.manual_seed(options.seed)
    vae: Any = tiny_svd.vae()
    initialise(vae)
    modules = half(vae, options.part)
    muon, adam = optimisers(modules)
    run = Checkpoint(WORK / f"{options.part}.pt", {"modules": modules, "muon": muon, "adam": adam})
    window: list[float] = []
    while run.step < options.steps:
        factor = trapezoid(run.step, options.steps, warmup=30, decay=0.4)
        for optimiser, rate in ((muon, MUON_LR), (adam, ADAM_LR)):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
        loss, square = LOSSES[options.part](vae, codec, options.batch, generator)
        loss.backward()
        for optimiser in (muon, adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        run.advance()
        window.append(square.item())
        if run.step % 25 == 0:
            report(run, options.part, sum(window) / len(window))
            window = []
        run.save_now_and_then()
    run.save()


def report(run: Checkpoint, part: str, square: float) -> None:
    # The peak-to-peak range of a clip is 2; for the encoder the figure is only indicative.
    record = {
        "part": part,
        "step": run.step,
        "mse": round(square, 5),
        "psnr": round(10 * math.log10(4 / square), 2),
        "seconds": round(run.seconds, 1),
    }
    log.info("%s", record)
    with (WORK / "vae.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=sorted(LOSSES))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    train(options)


if __name__ == "__main__":
    main()

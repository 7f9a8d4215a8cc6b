"""Train the tiny UNet on latents of the frame codec; no autoencoder is needed.

    python scripts/tiny_svd_teacher/train_unet.py --steps 2000

EDM as SVD has it: x = x_0 + sigma n, the network sees x / sqrt(sigma^2 + 1) and 0.25 ln(sigma),
and answers v, from which x_0 = x / (sigma^2 + 1) - v sigma / sqrt(sigma^2 + 1). With the weight
(sigma^2 + 1) / sigma^2 the loss of x_0 is the plain square error of v. Clips are rendered afresh
for every step, from a seed made of the step, so an interrupted run continues exactly when the same
command is run again.

Shapes: B clips, latents [B, 8 frames, 8 channels, 8, 8], D = 64 of the image embedding.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frame_codec
from accvideo_core.evaluate import image_world, world
from accvideo_core.models import tiny_svd
from checkpoint import Checkpoint
from optim import Muon, trapezoid

WORK = Path("build/tiny_svd_teacher")
P_MEAN, P_STD = 0.7, 1.6  # of ln(sigma), as SVD's image-to-video training
TAIL = 0.1  # share of steps near SIGMA_MAX, which the log-normal reaches once in 7000 draws
AUGMENTATION = (-3.0, 0.5)  # mean and deviation of ln(noise on the first frame)
DROP = 0.1
MUON_LR = 0.02
ADAM_LR = 1.5e-3
EMA = 0.999

log = logging.getLogger("train_unet")


class ImageEmbedder:
    """The pipeline's own way from first frames to embeddings."""

    def __init__(self) -> None:
        from transformers import CLIPImageProcessor

        self.encoder = tiny_svd.image_encoder(seed=0)
        processor: Any = CLIPImageProcessor()
        self.mean = torch.tensor(processor.image_mean).view(1, 3, 1, 1)
        self.std = torch.tensor(processor.image_std).view(1, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """First frames [B, 3, 32, 32] in [-1, 1] to [B, 1, D]."""
        from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
            _resize_with_antialiasing,
        )

        resized = (_resize_with_antialiasing(images, (224, 224)) + 1) / 2
        return self.encoder((resized - self.mean) / self.std).image_embeds[:, None]


def draw_sigma(size: int, generator: torch.Generator) -> Tensor:
    """Noise levels [B], stratified."""
    u = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    logarithm = P_MEAN + P_STD * torch.special.ndtri(u)
    top = torch.log(torch.tensor(tiny_svd.SIGMA_MAX))
    tail = P_MEAN + 2 * P_STD  # what the log-normal still reaches
    uniform = tail + (top - tail) * torch.rand(size, generator=generator)
    chosen = torch.rand(size, generator=generator) < TAIL
    return torch.where(chosen, uniform, logarithm.clamp(max=top)).exp()


def draw_batch(
    embed: ImageEmbedder, codec: frame_codec.FrameCodec, size: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """One batch of UNet inputs and the v it should answer."""
    video = image_world.render(world.sample_specs(size, generator), generator)
    clean, first = codec.encode(video), video[:, :, :1]
    mean, deviation = AUGMENTATION
    augmentation = (mean + deviation * torch.randn(size, generator=generator)).exp()
    noise = torch.randn(first.shape, generator=generator)
    noisy = first + augmentation.view(-1, 1, 1, 1, 1) * noise
    kept = (torch.rand(size, generator=generator) >= DROP).float().view(-1, 1, 1)
    image = codec.encode(noisy) / tiny_svd.SCALING_FACTOR * kept[..., None, None]

    sigma = draw_sigma(size, generator).view(-1, 1, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=generator)
    root = (sigma * sigma + 1).sqrt()
    # Frame rate and motion bucket say nothing about this world: any value must do.
    fps = torch.randint(4, 30, (size,), generator=generator).float()
    bucket = torch.randint(1, 256, (size,), generator=generator).float()
    inputs = {
        "sample": torch.cat([(clean + sigma * noise) / root, image.expand_as(clean)], dim=2),
        "timestep": 0.25 * sigma.flatten().log(),
        "encoder_hidden_states": embed(first[:, :, 0]) * kept,
        "added_time_ids": torch.stack([fps, bucket, augmentation], dim=1),
    }
    return inputs, (noise - sigma * clean) / root


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Every residual branch and the output start as zero."""
    for name, parameter in model.named_parameters():
        if name.endswith(("conv2.weight", "conv2.bias", "proj_out.weight", "proj_out.bias")) or (
            name.startswith(("conv_out", "add_embedding.linear_2"))
        ):
            parameter.zero_()
        if name == "conv_in.weight":
            # VAE-space latents of the first frame are 1 / SCALING_FACTOR times as large.
            parameter[:, tiny_svd.LATENT_CHANNELS :] *= tiny_svd.SCALING_FACTOR


def optimisers(model: nn.Module) -> tuple[Muon, torch.optim.AdamW]:
    """Muon on the matrices and convolutions in the blocks, AdamW elsewhere."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = "block" in name and parameter.ndim > 1 and "time_" not in name
        (matrices if inside else rest).append(parameter)
    return Muon(matrices, MUON_LR), torch.optim.AdamW(
        rest, ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0
    )


class Run(Checkpoint):
    """Networks and optimisers of a run, continued from its file where there is one."""

    def __init__(self, seed: int, path: Path) -> None:
        torch.manual_seed(seed)
        self.model = tiny_svd.unet()
        initialise(self.model)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimisers = optimisers(self.model)
        muon, adam = self.optimisers
        super().__init__(path, {"model": self.model, "ema": self.ema, "muon": muon, "adam": adam})

    def set_rate(self, factor: float) -> None:
        for optimiser, rate in zip(self.optimisers, (MUON_LR, ADAM_LR), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor

    @torch.no_grad()
    def update(self) -> None:
        """One optimiser step, then the moving average of the weights."""
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.advance()
        decay = min(EMA, (1 + self.step) / (10 + self.step))
        old: list[Tensor] = list(self.ema.parameters())
        new: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(old, new, 1 - decay)


def train(options: argparse.Namespace) -> None:
    codec = frame_codec.load_or_fit(WORK / "codec.safetensors")
    embed = ImageEmbedder()
    run = Run(options.seed, WORK / "unet.pt")
    parameters = list(run.model.parameters())
    window: list[float] = []
    while run.step < options.steps:
        run.set_rate(trapezoid(run.step, options.steps, decay=0.5))
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
        inputs, target = draw_batch(embed, codec, options.batch, generator)
        loss = F.mse_loss(run.model(**inputs, return_dict=False)[0], target)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        run.update()
        window.append(loss.item())
        if run.step % 25 == 0:
            report(run, window)
            window = []
        run.save_now_and_then()
    run.save()


def report(run: Run, losses: list[float]) -> None:
    record = {
        "step": run.step,
        "loss": round(sum(losses) / len(losses), 4),
        "seconds": round(run.seconds, 1),
        "per_step": round(run.seconds / run.step, 3),
    }
    log.info("%s", record)
    with (WORK / "unet.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    train(options)


if __name__ == "__main__":
    main()

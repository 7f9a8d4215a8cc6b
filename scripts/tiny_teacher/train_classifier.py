"""Train the attribute classifier whose features carry the Frechet distance.

    python scripts/tiny_teacher/train_classifier.py --steps 1200

Half of every batch is clean, half is blurred, faded towards another texture, flattened and made
noisy by random amounts. The attributes must be right on both; a linear head must tell the amounts,
so that the features see detail.

Shapes: B clips [B, 3, 17, 32, 32] in [-1, 1].
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import data
from accvideo_core.evaluate import world
from accvideo_core.evaluate.classifier import Classifier, classifier_path
from checkpoint import Checkpoint
from optim import trapezoid

WORK = Path("build/tiny_teacher")
RATE = 3e-3

log = logging.getLogger("train_classifier")


def degraded_batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clips, their labels [B, 4] and how much they are degraded [B, 4] in [0, 1]."""
    specs = world.sample_specs(size, generator)
    amount = torch.rand(size, 4, generator=generator)
    amount = amount * (torch.rand(size, 4, generator=generator) < 0.6)
    amount[: size // 2] = 0
    # A plain background has no texture to lose, so it is asked to stay plain.
    amount[:, 1] *= torch.tensor([spec.background != "plain" for spec in specs])
    towards = ["plain"] * size
    video = data.blended(specs, towards, 0.85 * amount[:, 1], generator)
    video = blur(video, 1.2 * amount[:, 0])
    mean = video.mean((2, 3, 4), keepdim=True)
    video = mean + (video - mean) * (1 - 0.4 * amount[:, 2]).view(-1, 1, 1, 1, 1)
    noise = torch.randn(video.shape, generator=generator)
    video = video + 0.15 * amount[:, 3].view(-1, 1, 1, 1, 1) * noise
    return video.clamp(-1, 1), world.labels(specs), amount


def blur(video: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur in the image plane, ``sigma`` [B] in pixels."""
    taps = torch.arange(-3, 4.0)
    kernel = torch.exp(-0.5 * (taps / sigma.clamp(min=0.05)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    clips, channels, frames, height, width = video.shape
    flat = F.pad(video.reshape(1, -1, height, width), (3, 3, 3, 3), mode="replicate")
    each = kernel.repeat_interleave(channels * frames, 0)
    flat = F.conv2d(flat, each[:, None, None, :], groups=len(each))
    flat = F.conv2d(flat, each[:, None, :, None], groups=len(each))
    return flat.view(clips, channels, frames, height, width)


def loss_of(
    model: Classifier, video: Tensor, labels: Tensor, amount: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Training loss, share of right attributes [4], square error of the degradations [4]."""
    features = model.features(video)
    logits = [head(features) for head in model.heads.values()]
    entropy = sum(F.cross_entropy(x, labels[:, i]) for i, x in enumerate(logits))
    square = (model.degradation(features) - amount).square().mean(0)
    predicted = torch.stack([x.argmax(1) for x in logits], dim=1)
    right = (predicted == labels).float().mean(0)
    return entropy + 4 * square.sum(), right, square.detach()


@torch.no_grad()
def measure(model: Classifier, clips: int, seed: int) -> tuple[list[float], list[float]]:
    """Accuracy per attribute on clean clips and root mean square error per degradation."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    right, square = torch.zeros(4), torch.zeros(4)
    rounds = clips // 64
    for _ in range(rounds):
        video, labels, amount = degraded_batch(128, generator)
        right += loss_of(model, video[:64], labels[:64], amount[:64])[1] / rounds
        square += loss_of(model, video[64:], labels[64:], amount[64:])[2] / rounds
    model.train()
    return [round(x, 4) for x in right.tolist()], [round(x, 3) for x in square.sqrt().tolist()]


def train(options: argparse.Namespace) -> Classifier:
    torch.manual_seed(options.seed)
    model = Classifier()
    adam = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    run = Checkpoint(WORK / "classifier.pt", {"model": model, "adam": adam})
    while run.step < options.steps:
        for group in adam.param_groups:
            group["lr"] = RATE * trapezoid(run.step, options.steps, warmup=30, decay=0.6)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
        loss, right, square = loss_of(model, *degraded_batch(options.batch, generator))
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        run.advance()
        if run.step % 50 == 0:
            shown = [round(x, 2) for x in (*right.tolist(), *square.sqrt().tolist())]
            log.info("step %d loss %.3f %s", run.step, loss.item(), shown)
        run.save_now_and_then()
    run.save()
    log.info("%d steps in %.0f s", run.step, run.seconds)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    model = train(options)
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(tensors, classifier_path())
    classifier_path().chmod(0o644)
    log.info("clean accuracy, degradation error: %s", measure(model, 2048, options.seed + 1))


if __name__ == "__main__":
    main()

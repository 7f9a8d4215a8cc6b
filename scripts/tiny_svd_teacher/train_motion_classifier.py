"""Train the classifier of image-to-video clips, whose features carry the Frechet distance.

    python scripts/tiny_svd_teacher/train_motion_classifier.py --steps 1600

It must judge what moves and not what was announced: the lit edges tell a random motion, half of the
clips run backwards, and one in eight stands still. Half of every batch is clean, half is blurred,
faded, flattened and made noisy by random amounts, which a linear head must tell.

Shapes: B clips [B, 3, 8, 32, 32] in [-1, 1].
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from accvideo_core.evaluate import image_world, world
from accvideo_core.evaluate.classifier import Classifier, image_classifier_path
from checkpoint import Checkpoint
from optim import trapezoid
from train_classifier import blur, loss_of

WORK = Path("build/tiny_svd_teacher")
RATE = 3e-3
_REVERSED = {
    "moving left": "moving right",
    "moving right": "moving left",
    "moving up": "moving down",
    "moving down": "moving up",
    "growing": "shrinking",
    "shrinking": "growing",
    "bouncing": "bouncing",
}

log = logging.getLogger("train_motion_classifier")


def labelled(size: int, generator: torch.Generator, fade: Tensor) -> tuple[Tensor, Tensor]:
    """Clips whose backgrounds are faded by ``fade`` [B], and their labels [B, 4]."""
    specs = world.sample_specs(size, generator)
    told = [spec.motion for spec in world.sample_specs(size, generator)]
    state = generator.get_state()
    video = image_world.render(specs, generator, told)
    twin = torch.Generator()
    twin.set_state(state)
    plain = [replace(spec, background="plain") for spec in specs]
    video = torch.lerp(video, image_world.render(plain, twin, told), fade.view(-1, 1, 1, 1, 1))

    back, still = torch.rand(2, size, generator=generator)
    shown = [
        replace(spec, motion=_REVERSED[spec.motion]) if turned else spec
        for spec, turned in zip(specs, (back < 0.5).tolist(), strict=True)
    ]
    video = torch.where((back < 0.5).view(-1, 1, 1, 1, 1), video.flip(2), video)
    frozen = (still < 1 / 8).view(-1, 1, 1, 1, 1)
    video = torch.where(frozen, video[:, :, :1], video)
    labels = world.labels(shown)
    labels[still < 1 / 8, 2] = image_world.MOTIONS.index(image_world.STILL)
    return video, labels


def degraded_batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clips, their labels [B, 4] and how much they are degraded [B, 4] in [0, 1]."""
    amount = torch.rand(size, 4, generator=generator)
    amount = amount * (torch.rand(size, 4, generator=generator) < 0.6)
    amount[: size // 2] = 0
    video, labels = labelled(size, generator, 0.85 * amount[:, 1])
    # A plain background has no texture to lose, so it is asked to stay plain.
    amount[:, 1] *= labels[:, 3] != world.BACKGROUNDS.index("plain")
    video = blur(video, 1.2 * amount[:, 0])
    mean = video.mean((2, 3, 4), keepdim=True)
    video = mean + (video - mean) * (1 - 0.4 * amount[:, 2]).view(-1, 1, 1, 1, 1)
    noise = torch.randn(video.shape, generator=generator)
    video = video + 0.15 * amount[:, 3].view(-1, 1, 1, 1, 1) * noise
    return video.clamp(-1, 1), labels, amount


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
    model = Classifier(image_world.ATTRIBUTES, image_world.FRAMES)
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
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    model = train(options)
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(tensors, image_classifier_path())
    image_classifier_path().chmod(0o644)
    log.info("clean accuracy, degradation error: %s", measure(model, 2048, options.seed + 1))


if __name__ == "__main__":
    main()

"""Measure the shipped teacher through the real pipeline and autoencoder.

    python scripts/tiny_teacher/evaluate_teacher.py --clips 512 --steps 50 10 5 2 1

Prints the table, writes ``build/tiny_teacher/teacher.json`` and ``teacher.png``. All rows see the
same prompts and the same noise. "real via VAE" is the ceiling that the autoencoder allows.

Shapes: B clips; frames [B, 17, 32, 32, 3] in [0, 1]; videos [B, 3, 17, 32, 32] in [-1, 1].
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoPipeline
from PIL import Image
from torch import Tensor

from accvideo_core.evaluate import metrics, world
from accvideo_core.evaluate.classifier import Classifier, load_classifier
from accvideo_core.models import tiny

WORK = Path("build/tiny_teacher")
GUIDANCE = 6.0
TOKENS = 12  # every caption fits; padding is masked, so this is the same as 256
CHUNK = 32

log = logging.getLogger("evaluate_teacher")


@dataclass(frozen=True, slots=True)
class Clips:
    """Decoded clips on the CPU, their latents where there are any, and the seconds they took."""

    video: Tensor
    latents: Tensor | None
    seconds: float = 0.0


@torch.no_grad()
def sample(pipeline: Any, prompts: list[str], steps: int, noise: Tensor) -> Clips:
    """What the pipeline makes of ``prompts`` from ``noise`` [B, 16, 5, 8, 8]."""
    embeds, pooled, mask = pipeline.encode_prompt(prompts)
    videos, latents, started = [], [], time.monotonic()
    for at in range(0, len(prompts), CHUNK):
        part = slice(at, at + CHUNK)
        result = pipeline(
            prompt_embeds=embeds[part, :TOKENS],
            pooled_prompt_embeds=pooled[part],
            prompt_attention_mask=mask[part, :TOKENS],
            height=world.SIZE,
            width=world.SIZE,
            num_frames=world.FRAMES,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            latents=noise[part],
            output_type="latent",
        ).frames
        latents.append(result)
        videos.append(decode(pipeline, result))
    return Clips(torch.cat(videos), torch.cat(latents), time.monotonic() - started)


def decode(pipeline: Any, latents: Tensor) -> Tensor:
    video = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return video.clamp(-1, 1)


@torch.no_grad()
def through_vae(pipeline: Any, video: Tensor) -> Clips:
    """Real clips encoded and decoded."""
    means = torch.cat([pipeline.vae.encode(v).latent_dist.mode() for v in video.split(CHUNK)])
    latents = means * pipeline.vae.config.scaling_factor
    decoded = torch.cat([decode(pipeline, z) for z in latents.split(CHUNK)])
    return Clips(decoded, latents)


def mosaic_contrast(video: Tensor, wanted: Tensor) -> float:
    """Contrast of the corner cells of mosaic clips, relative to the drawn one (real clips: 1).

    The corners are rarely covered by the shape; every drawn cell is half the grey distance away
    from the middle grey.
    """
    chosen = video[wanted[:, 3] == world.BACKGROUNDS.index("mosaic")].mean((1, 2))  # [N, H, W]
    cells = torch.nn.functional.avg_pool2d(chosen[:, None], world.CELL)[:, 0]
    corners = torch.stack([cells[:, y, x] for y in (0, -1) for x in (0, 1, -2, -1)])
    middle, amplitude = world.DARK + world.GREY - 1, world.GREY - world.DARK
    return ((corners - middle).abs() / amplitude).clamp(max=1.5).mean().item()


@torch.no_grad()
def measure(
    clips: Clips, teacher: Clips, real: Tensor, wanted: Tensor, judge: Classifier
) -> dict[str, Any]:
    """One row of the table."""
    right = judge.predict(clips.video) == wanted
    frames = _frames(clips.video)
    row: dict[str, Any] = {
        name: right[:, i].float().mean().item() for i, name in enumerate(world.ATTRIBUTES)
    }
    row["all"] = right.all(1).float().mean().item()
    features = _features(judge, clips.video)
    row["frechet_real"] = metrics.frechet_distance(features, _features(judge, real))
    row["frechet_teacher"] = metrics.frechet_distance(features, _features(judge, teacher.video))
    row["psnr"] = metrics.psnr(frames, _frames(teacher.video)).mean().item()
    if clips.latents is not None and teacher.latents is not None:
        row["latent_mse"] = metrics.latent_mse(clips.latents, teacher.latents).mean().item()
    row["sharpness"] = metrics.edge_sharpness(frames).mean().item()
    row["detail"] = metrics.detail_contrast(frames).mean().item()
    row["mosaic_contrast"] = mosaic_contrast(clips.video, wanted)
    row["motion_energy"] = metrics.motion_energy(frames).mean().item()
    row["seconds"] = clips.seconds
    return {name: round(value, 4) for name, value in row.items()}


def _frames(video: Tensor) -> Tensor:
    return (video.permute(0, 2, 3, 4, 1) + 1) / 2


def _features(judge: Classifier, video: Tensor) -> Tensor:
    return torch.cat([judge.features(part) for part in video.split(128)])


def contact_sheet(rows: list[Tensor], path: Path, scale: int = 4) -> None:
    """One row per set of clips, three frames of each of its first eight clips."""
    lines = []
    for video in rows:
        frames = [video[i, :, t] for i in range(8) for t in (0, 8, 16)]
        lines.append(torch.cat(frames, dim=2))
    picture = ((torch.cat(lines, dim=1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    image = Image.fromarray(picture.numpy())
    size = (image.width * scale, image.height * scale)
    image.resize(size, Image.Resampling.NEAREST).save(path)


def table(report: dict[str, dict[str, Any]]) -> str:
    names = list(dict.fromkeys(key for row in report.values() for key in row))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, row in report.items():
        lines.append(f"| {title} | " + " | ".join(str(row.get(n, "-")) for n in names) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 10, 5, 2, 1])
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--folder", type=Path, default=tiny.embedded_teacher_path())
    parser.add_argument("--name", default="teacher", help="of the files in build/tiny_teacher")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(options.seed)
    prompts = world.sample_prompts(options.clips, generator)
    specs = [world.parse(text) for text in prompts]
    wanted = world.labels(specs)
    noise = torch.randn(options.clips, tiny.LATENT_CHANNELS, 5, 8, 8, generator=generator)
    real, twin = world.render(specs, generator), world.render(specs, generator)
    pipeline = HunyuanVideoPipeline.from_pretrained(
        options.folder, local_files_only=True, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    judge = load_classifier()

    made = {f"teacher@{n}": sample(pipeline, prompts, n, noise) for n in options.steps}
    best = next(iter(made.values()))
    made = {"real": Clips(twin, None), "real via VAE": through_vae(pipeline, twin), **made}
    report = {t: measure(clips, best, real, wanted, judge) for t, clips in made.items()}
    ceiling = metrics.psnr(_frames(made["real via VAE"].video), _frames(twin)).mean().item()
    log.info("%s\nPSNR of real clips through the VAE: %.2f dB", table(report), ceiling)
    summary = {"clips": options.clips, "seed": options.seed, "vae_psnr": round(ceiling, 2)}
    text = json.dumps({**summary, "rows": report}, indent=2) + "\n"
    (WORK / f"{options.name}.json").write_text(text, encoding="utf-8")
    contact_sheet([c.video[:8] for c in made.values()], WORK / f"{options.name}.png")


if __name__ == "__main__":
    main()

"""Measure the shipped image-to-video teacher through the real pipeline and autoencoder.

    python scripts/tiny_svd_teacher/evaluate_image_teacher.py --clips 256 --steps 25 8 4 2 1

Prints the table, writes ``build/tiny_svd_teacher/teacher.json`` and ``teacher.png``. All rows see
the same first frames and the same noise. "real via VAE" is the ceiling that the autoencoder allows,
"first frame" a clip that stands still.

Shapes: N clips; frames [N, 8, 32, 32, 3] in [0, 1].
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
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from torch import Tensor

from accvideo_core.evaluate import image_world, metrics
from accvideo_core.evaluate.judge import ImageJudge
from accvideo_core.models import tiny_svd

WORK = Path("build/tiny_svd_teacher")
CHUNK = 32
SHOWN = (0, 2, 5, 7)  # frames of the contact sheet

log = logging.getLogger("evaluate_image_teacher")


@dataclass(frozen=True, slots=True)
class Clips:
    """Frames and the seconds they took."""

    frames: Tensor
    seconds: float = 0.0


def pictures(first: Tensor) -> list[Image.Image]:
    """First frames [N, 32, 32, 3] in [0, 1] as 8-bit pictures."""
    return [Image.fromarray(x.numpy()) for x in (first * 255).round().byte()]


def sample(pipeline: Any, first: Tensor, steps: int, guidance: float, noise: Tensor) -> Clips:
    """What the pipeline makes of the first frames from ``noise`` [N, 8, 8, 8, 8]."""
    images, clips, started = pictures(first), [], time.monotonic()
    for at in range(0, len(images), CHUNK):
        video = pipeline(
            images[at : at + CHUNK],
            height=image_world.SIZE,
            width=image_world.SIZE,
            num_frames=image_world.FRAMES,
            num_inference_steps=steps,
            max_guidance_scale=guidance,
            fps=image_world.FPS,
            latents=noise[at : at + CHUNK],
            generator=torch.Generator().manual_seed(at),  # of the noise on the first frames
            output_type="pt",
        ).frames
        clips.append(video.permute(0, 1, 3, 4, 2))
    return Clips(torch.cat(clips), time.monotonic() - started)


@torch.no_grad()
def through_vae(pipeline: Any, frames: Tensor) -> Clips:
    """Real clips encoded and decoded."""
    flat = frames.flatten(0, 1).permute(0, 3, 1, 2) * 2 - 1
    parts = flat.split(CHUNK * image_world.FRAMES)
    latents = [pipeline.vae.encode(part).latent_dist.mode() for part in parts]
    decoded = [pipeline.vae.decode(z, num_frames=image_world.FRAMES).sample for z in latents]
    video = (torch.cat(decoded).clamp(-1, 1) + 1) / 2
    return Clips(video.permute(0, 2, 3, 1).view_as(frames))


def measure(clips: Clips, best: Clips, real: Tensor, reference: Tensor, judge: ImageJudge) -> Any:
    """One row of the table; ``reference`` [N, D] are features of other real clips."""
    hits, features = judge.judge(clips.frames, range(len(clips.frames)))
    row = {name: values.mean().item() for name, values in hits.items()}
    row["first_frame_psnr"] = metrics.psnr(clips.frames[:, :1], real[:, :1]).mean().item()
    row["frechet_real"] = metrics.frechet_distance(features, reference)
    row["frechet_teacher"] = metrics.frechet_distance(features, judge.features(best.frames))
    row["psnr_teacher"] = metrics.psnr(clips.frames, best.frames).mean().item()
    row["motion_energy"] = metrics.motion_energy(clips.frames).mean().item()
    row["sharpness"] = metrics.edge_sharpness(clips.frames).mean().item()
    row["seconds"] = clips.seconds
    return {name: round(value, 4) for name, value in row.items()}


def contact_sheet(rows: list[Tensor], path: Path, scale: int = 4) -> None:
    """One row per set of clips, four frames of each of its first six clips."""
    lines = [torch.cat([clip[t] for clip in frames[:6] for t in SHOWN], dim=1) for frames in rows]
    image = Image.fromarray((torch.cat(lines) * 255).round().byte().numpy())
    size = (image.width * scale, image.height * scale)
    image.resize(size, Image.Resampling.NEAREST).save(path)


def table(report: dict[str, dict[str, Any]]) -> str:
    names = list(next(iter(report.values())))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, row in report.items():
        lines.append(f"| {title} | " + " | ".join(str(row[name]) for name in names) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 8, 4, 2, 1])
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 1.0])
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--folder", type=Path, default=tiny_svd.embedded_image_teacher_path())
    parser.add_argument("--name", default="teacher", help="of the files in build/tiny_svd_teacher")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    judge, clips = ImageJudge.of_clips(options.clips, options.seed), range(options.clips)
    real, reference = judge.real_frames(clips), judge.real_features(options.clips, 64)
    noise = torch.randn(
        options.clips,
        image_world.FRAMES,
        tiny_svd.LATENT_CHANNELS,
        *(8, 8),
        generator=torch.Generator().manual_seed(options.seed),
    )
    pipeline = StableVideoDiffusionPipeline.from_pretrained(
        options.folder, local_files_only=True, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    made = {
        f"teacher@{steps}, guidance {guidance:g}": sample(
            pipeline, real[:, 0], steps, guidance, noise
        )
        for guidance in options.guidance
        for steps in options.steps
    }
    best = next(iter(made.values()))
    still = Clips(real[:, :1].expand_as(real))
    made = {"real": Clips(real), "real via VAE": through_vae(pipeline, real), **made}
    made["first frame"] = still
    report = {t: measure(c, best, real, reference, judge) for t, c in made.items()}
    log.info("%s", table(report))
    summary = {"clips": options.clips, "seed": options.seed, "rows": report}
    text = json.dumps(summary, indent=2) + "\n"
    (WORK / f"{options.name}.json").write_text(text, encoding="utf-8")
    contact_sheet([c.frames for c in made.values()], WORK / f"{options.name}.png")


if __name__ == "__main__":
    main()

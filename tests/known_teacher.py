"""A teacher whose VAE and text encoder are known, and folders of videos to ingest with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.models.loading import Teacher
from accvideo_core.models.video_model import VideoModel
from accvideo_core.monitor import silent
from accvideo_core.trajectories.footage import IngestSpec
from accvideo_core.trajectories.ingest import Ingestion, ingest
from tests import analytic
from tests.video_files import grey_clip, write_frames

SPEC = IngestSpec(frames=5, height=16, width=16)


class Encoder:
    """A VAE whose latents are mean colours: red and blue of every fourth frame."""

    def encode(self, frames: Tensor) -> Tensor:
        x = frames[:, ::4, :, :, ::2].permute(0, 4, 1, 2, 3)
        count, channels, length, height, width = x.shape
        return x.reshape(count, channels, length, height // 8, 8, width // 8, 8).mean((4, 6))


class KnownTeacher(Teacher):
    """Texts become their lengths; images, for a family of images, their mean colour."""

    @property
    def vae(self):
        return Encoder()

    def check_vae(self):
        pass

    def check_encoders(self):
        pass

    def encode_each(
        self,
        given: Iterable[tuple[str, Tensor | None]],
        frames: int = 1,
        guidance: float | None = None,
    ) -> Iterator[Prompt]:
        for text, image in given:
            begins = None if image is None else image.mean((0, 1)).reshape(1, 3, 1, 1, 1)
            yield Prompt.of(text, Condition(torch.full((1, 1, 2), len(text)), image=begins))


def teacher(images: bool = False) -> KnownTeacher:
    model = analytic.gaussian_model()
    if images:
        family = replace(model.family, encode_image=lambda *_: analytic.condition())
        model = VideoModel(model.module, family, model.latent_spec, model.source)
    return KnownTeacher(model, Path("known"))


def video(folder: Path, name: str, count: int = 10, text: str | None = "a clip", **more) -> Path:
    """A lossless video of `count` frames at 8 a second, with its caption."""
    path = write_frames(folder / f"{name}.mkv", grey_clip(count), **more)
    if text is not None:
        path.with_suffix(".txt").write_text(text)
    return path


def work(folder: Path, out: Path, spec: IngestSpec = SPEC, monitor=silent, **more) -> Ingestion:
    return ingest(teacher(**more), folder, spec, out, monitor)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file but the hidden ones."""
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    shown = (p for p in found if not any(part.startswith(".") for part in p.parts))
    return {str(p): (folder / p).read_bytes() for p in shown}


def footage(folder: Path, count: int = 5) -> Path:
    for number in range(count):
        video(folder, f"v{number}", 12 + 5 * number, f"video {number}")
    return folder

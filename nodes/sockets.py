"""What travels between our nodes, and the way to and from ComfyUI's own types.

Shapes: L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io

from ..accvideo_core.conditioning import Condition, Prompt
from ..accvideo_core.errors import AccVideoError
from ..accvideo_core.flow import Times

if TYPE_CHECKING:
    from ..accvideo_core.distill.student import Student
    from ..accvideo_core.latents import LatentSpec
    from ..accvideo_core.models.loading import Teacher
    from ..accvideo_core.models.video_model import Family, VideoModel

PROMPT_TEXT = "accvideo_prompt"
"""Key under which an entry of CONDITIONING carries the text it was made from."""

IMAGE_FIELDS = ("mask", "image", "image_tokens", "micro")
"""Fields of a Condition with an image that stand, as they are, under their names with OURS before.

Stock nodes leave images under keys of their own, each in its own form; a family reads those.
"""
OURS = "accvideo_"

FRAMES = "accvideo_frames"
"""Key under which a LATENT of images says how many are one clip."""

AccVideoModel = io.Custom("ACCVIDEO_MODEL")
AccVideoDataset = io.Custom("ACCVIDEO_DATASET")
AccVideoStudent = io.Custom("ACCVIDEO_STUDENT")
SpeedSettings = io.Custom("ACCVIDEO_SPEED")
"""Carried on them: models.loading.Teacher, trajectories.store.TrajectoryDataset, StudentHandle,
speed.Speed.
"""

NativeConditioning = list[list[Any]]
"""[[text embedding [1, L, D], {"pooled_output": ..., "attention_mask": ..., "guidance": ...}]]."""


@dataclass(frozen=True, slots=True, eq=False)
class StudentHandle:
    """A student, the teacher it grew from, and the metrics files of its training, oldest first."""

    student: Student
    teacher: Teacher
    metrics: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        """Short, because ComfyUI shows the inputs of a node that failed."""
        info = self.student.info
        kind = "full" if info.lora is None else f"LoRA of rank {info.lora.rank}"
        return f"{len(info.key_times) - 1}-step student of {self.teacher.model.source} ({kind})"


def network(source: Teacher | StudentHandle) -> VideoModel:
    """The video model behind either kind of socket."""
    return source.student.model if isinstance(source, StudentHandle) else source.model


def teacher_of(source: Teacher | StudentHandle) -> Teacher:
    """The teacher behind either kind of socket."""
    return source.teacher if isinstance(source, StudentHandle) else source


def prompt_lines(text: str) -> list[str]:
    """The prompts of a multiline widget: one per line, blank lines do not count."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise AccVideoError("no prompts were given; write at least one, one per line")
    return prompts


def to_native(prompts: Sequence[Prompt]) -> NativeConditioning:
    """Prompts as ComfyUI's CONDITIONING, one entry each."""
    return [_native_entry(prompt) for prompt in prompts]


def _native_entry(prompt: Prompt) -> list[Any]:
    condition = prompt.condition
    extra: dict[str, Any] = {PROMPT_TEXT: prompt.text}
    if condition.pooled is not None:
        extra["pooled_output"] = condition.pooled
    if condition.mask is not None and not condition.mask.all():
        extra["attention_mask"] = condition.mask
    if condition.guidance is not None:
        extra["guidance"] = float(condition.guidance[0])
    if condition.image is not None:
        tensors = condition.tensors()
        extra |= {OURS + name: tensors[name] for name in IMAGE_FIELDS if name in tensors}
    return [condition.text, extra]


def from_native(conditioning: NativeConditioning, model: VideoModel) -> list[Prompt]:
    """CONDITIONING of our own or of ComfyUI's text encoders as prompts of this model's family.

    An entry that holds several embeddings becomes several prompts.
    """
    prompts = []
    for embedding, extra in conditioning:
        parts = _condition(embedding, extra, model).split()
        text = extra.get(PROMPT_TEXT, "") if len(parts) == 1 else ""
        prompts += [Prompt.of(text, part) for part in parts]
    if not prompts:
        raise AccVideoError("the conditioning holds no prompts; encode at least one")
    return prompts


def _condition(embedding: torch.Tensor, extra: dict[str, Any], model: VideoModel) -> Condition:
    """One entry: with an image of ours, exactly what was encoded; else as the family reads it."""
    family = model.family
    if f"{OURS}image" not in extra:
        return family.from_native(embedding, extra, model.latent_spec)
    if family.encode_image is None:
        raise AccVideoError(
            f"this CONDITIONING has an image, which {family.title or family.name} does not take; "
            "encode the prompts without images, or load an image-to-video model"
        )
    named = {name: extra.get(OURS + name) for name in IMAGE_FIELDS}
    condition = Condition(text=embedding, pooled=extra.get("pooled_output"), **named)
    return condition.to("cpu").with_guidance(extra.get("guidance"))


def to_latent(samples: torch.Tensor, spec: LatentSpec) -> dict[str, Any]:
    """Samples [B, C, T, H, W] in VAE space as ComfyUI's LATENT.

    To a VAE that has a latent for every frame, frames are images: [B*T, C, H, W].
    """
    if spec.stride_t > 1:
        return {"samples": samples}
    return {"samples": samples.transpose(1, 2).flatten(0, 1), FRAMES: samples.shape[2]}


def from_latent(latent: dict[str, Any], spec: LatentSpec) -> torch.Tensor:
    """The inverse of `to_latent`; images that say nothing of frames are one clip."""
    samples = latent["samples"]
    if samples.dim() == 4 and spec.stride_t == 1:
        count = latent.get(FRAMES, len(samples))
        samples = samples.unflatten(0, (-1, count)).transpose(1, 2)
    return spec.check(samples, "the latents")


def to_sigmas(times: Sequence[float], family: Family | None = None) -> torch.Tensor:
    """Times as the SIGMAS of ComfyUI's samplers; without a family, of a flow model."""
    sigmas = times if family is None else [family.to_sigma(t) for t in times]
    return torch.tensor(sigmas, dtype=torch.float32)


def from_sigmas(sigmas: torch.Tensor, family: Family | None = None) -> Times:
    """The inverse of `to_sigmas`."""
    values = [float(sigma) for sigma in sigmas]
    return tuple(values if family is None else [family.from_sigma(s) for s in values])

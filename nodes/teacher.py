"""Nodes that bring a teacher and its prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io

from . import paths
from .devices import default_dtype, on_device
from .sockets import AccVideoModel, prompt_lines, to_native

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher

CATEGORY = "AccVideo/teacher"
DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class AccVideoLoadTeacher(io.ComfyNode):
    """A diffusers pipeline folder, or the embedded one, as ACCVIDEO_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoLoadTeacher",
            display_name="Load Teacher",
            category=CATEGORY,
            description="Load the video model that is to be made fast. A teacher is a diffusers "
            "pipeline folder in models/diffusers; the embedded one works without any download.",
            search_aliases=["teacher", "distillation", "HunyuanVideo", "diffusers", "few-step"],
            inputs=[
                io.Combo.Input(
                    "teacher",
                    options=[paths.EMBEDDED, *paths.teacher_folders()],
                    default=paths.EMBEDDED,
                    tooltip="The embedded tiny teacher, or a diffusers pipeline folder (one with a "
                    "model_index.json) below models/diffusers.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    tooltip="Number format of the weights. auto is float32 on a CPU and bfloat16 "
                    "on a GPU that has it, else float16.",
                ),
            ],
            outputs=[
                AccVideoModel.Output(
                    "model", tooltip="The teacher: its network, text encoders and VAE."
                )
            ],
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, teacher: str) -> bool | str:
        return paths.complaint(paths.teacher_folder, teacher)

    @classmethod
    def fingerprint_inputs(cls, teacher: str, dtype: str) -> str:
        folder = paths.teacher_folder(teacher)
        return paths.fingerprint(folder / "model_index.json", *sorted(folder.glob("transformer/*")))

    @classmethod
    def execute(cls, teacher: str, dtype: str) -> io.NodeOutput:
        from ..accvideo_core.models.loading import load_teacher

        folder = paths.teacher_folder(teacher)
        return io.NodeOutput(load_teacher(folder, dtype=DTYPES[dtype] or default_dtype()))


class AccVideoTinyPrompts(io.ComfyNode):
    """Prompts of the embedded teacher's world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoTinyPrompts",
            display_name="Tiny World Prompts",
            category=CATEGORY,
            description="Prompts that the embedded teacher understands: one per line, all "
            "different up to 378.",
            search_aliases=["prompts", "tiny", "demo", "test prompts"],
            inputs=[
                io.Int.Input("count", default=64, min=1, max=100_000, tooltip="How many prompts."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Which prompts, and in which order.",
                ),
            ],
            outputs=[io.String.Output("prompts", tooltip="The prompts, one per line.")],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, count: int, seed: int) -> io.NodeOutput:
        from ..accvideo_core.evaluate.world import sample_prompts
        from ..accvideo_core.latents import key_generator

        return io.NodeOutput("\n".join(sample_prompts(count, key_generator("prompts", seed))))


class AccVideoEncodePrompts(io.ComfyNode):
    """The teacher's own text encoders, as CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoEncodePrompts",
            display_name="Encode Prompts",
            category=CATEGORY,
            description="Encode prompts with the teacher's own text encoders, one CONDITIONING "
            "entry per line. ComfyUI's text encoders for the same model work in its place.",
            search_aliases=["text encode", "prompts", "conditioning", "CLIP"],
            inputs=[
                AccVideoModel.Input("model", tooltip="The teacher whose text encoders are used."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    tooltip="One prompt per line; blank lines are left out.",
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Embedded guidance the teacher is asked for, and the student learns. "
                    "0 is the model's own default (HunyuanVideo: 6).",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning", tooltip="One entry per prompt, with the prompt's text in it."
                )
            ],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, model: Teacher, prompts: str, guidance: float = 0.0) -> io.NodeOutput:
        texts = prompt_lines(prompts)
        with on_device(model):
            return io.NodeOutput(to_native(model.encode_prompts(texts, guidance or None)))

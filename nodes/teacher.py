"""Nodes that bring a teacher and its prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io

from ..accvideo_core.errors import AccVideoError
from . import paths
from .devices import default_dtype, free_host_memory, on_device, vae_on_device
from .inputs import video_size
from .sockets import PROMPT_TEXT, AccVideoModel, NativeConditioning, prompt_lines, to_native

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher

CATEGORY = "AccVideo/teacher"
DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
WEIGHTS = ("as stored", "fp8", "nf4")
VARIANTS = {"auto": None, "HunyuanVideo I2V (token replace)": "hunyuan_video_i2v_replace"}


class AccVideoLoadTeacher(io.ComfyNode):
    """A diffusers pipeline folder, a checkpoint, or the embedded teacher, as ACCVIDEO_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoLoadTeacher",
            display_name="Load Teacher",
            category=CATEGORY,
            description="Load the video model that is to be made fast: HunyuanVideo, Wan, "
            "CogVideoX or Stable Video Diffusion, from a diffusers folder or from a checkpoint in "
            "models/diffusion_models or models/checkpoints (safetensors, fp8, GGUF). The embedded "
            "ones work without any download.",
            search_aliases=[
                *("teacher", "distillation", "HunyuanVideo", "Wan", "CogVideoX"),
                *("diffusers", "checkpoint", "UNETLoader", "GGUF", "few-step"),
            ],
            inputs=[
                io.Combo.Input(
                    "teacher",
                    options=[paths.EMBEDDED, paths.EMBEDDED_IMAGE, *paths.teacher_names()],
                    default=paths.EMBEDDED,
                    tooltip="An embedded tiny teacher, a diffusers pipeline folder (one with a "
                    "model_index.json) below models/diffusers, or a checkpoint in "
                    "models/diffusion_models. What it is, is read from its tensors.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    tooltip="Number format of the weights. auto is float32 on a CPU and bfloat16 "
                    "on a GPU that has it, else float16. fp8 and GGUF weights stay as they are.",
                ),
                io.Combo.Input(
                    "low_noise",
                    options=[paths.NONE, *paths.model_files()],
                    default=paths.NONE,
                    optional=True,
                    tooltip="Wan 2.2 A14B as two checkpoints: the low-noise one, with the "
                    "high-noise one as teacher.",
                ),
                io.Combo.Input(
                    "variant",
                    options=list(VARIANTS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Only for checkpoints that their tensors cannot tell from another: "
                    "HunyuanVideo I2V (token replace) looks like HunyuanVideo.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(WEIGHTS),
                    default=WEIGHTS[0],
                    optional=True,
                    advanced=True,
                    tooltip="Hold the weights of the blocks' layers in fewer bytes: fp8 halves "
                    "them, nf4 (bitsandbytes, NVIDIA) takes a quarter. They are less exact, and "
                    "teach lora students only.",
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
    def validate_inputs(cls, teacher: str, low_noise: str = paths.NONE) -> bool | str:
        first = paths.complaint(paths.teacher_source, teacher)
        if first is not True or low_noise == paths.NONE:
            return first
        return paths.complaint(paths.network_file, low_noise)

    @classmethod
    def fingerprint_inputs(cls, teacher: str, low_noise: str = paths.NONE, **_: object) -> str:
        source = paths.teacher_source(teacher)
        files = [source] if source.is_file() else [source / "model_index.json"]
        files += [] if low_noise == paths.NONE else [paths.network_file(low_noise)]
        networks = (*source.glob("transformer*/*"), *source.glob("unet/*"))
        return paths.fingerprint(*files, *sorted(networks))

    @classmethod
    def execute(
        cls,
        teacher: str,
        dtype: str,
        low_noise: str = paths.NONE,
        variant: str = "auto",
        weights: str = WEIGHTS[0],
    ) -> io.NodeOutput:
        from ..accvideo_core.models.loading import load_teacher

        source = paths.teacher_source(teacher)
        low = None if low_noise == paths.NONE else paths.network_file(low_noise)
        loaded = load_teacher(
            source if low is None else (source, low),
            dtype=DTYPES[dtype] or default_dtype(),
            variant=VARIANTS[variant],
            free_memory=free_host_memory(),
        )
        return io.NodeOutput(loaded if weights == WEIGHTS[0] else _packed(loaded, weights))


class AccVideoTeacherLora(io.ComfyNode):
    """The teacher with a LoRA on it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoTeacherLora",
            display_name="Teacher LoRA",
            category=CATEGORY,
            description="Put a LoRA on the teacher, so that the student learns its style too. "
            "Chain several. LoRAs in ComfyUI's, kohya's, musubi's and diffusers' names are read; "
            "one that matches nothing is an error, not a warning.",
            search_aliases=["LoRA", "LoraLoaderModelOnly", "style", "character", "teacher"],
            inputs=[
                AccVideoModel.Input("model", tooltip="The teacher."),
                io.Combo.Input("lora", options=paths.lora_names(), tooltip="In models/loras."),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.05, tooltip="1 is all."
                ),
                io.Combo.Input(
                    "mode",
                    options=["merge", "adapter"],
                    default="merge",
                    optional=True,
                    advanced=True,
                    tooltip="merge writes it into the weights; adapter keeps it beside them: "
                    "exact on fp8 and GGUF weights, which are never merged into, and slower.",
                ),
                io.Combo.Input(
                    "experts",
                    options=["both", "high", "low"],
                    default="both",
                    optional=True,
                    tooltip="Wan 2.2 A14B: the network that the LoRA is for.",
                ),
            ],
            outputs=[AccVideoModel.Output("model", tooltip="A new teacher, with the LoRA.")],
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, lora: str) -> bool | str:
        return paths.complaint(paths.lora_file, lora)

    @classmethod
    def fingerprint_inputs(cls, lora: str, **_: object) -> str:
        return paths.fingerprint(paths.lora_file(lora))

    @classmethod
    def execute(
        cls, model: Teacher, lora: str, strength: float, mode: str = "merge", experts: str = "both"
    ) -> io.NodeOutput:
        from ..accvideo_core.models.lora import apply_loras

        files = [(paths.lora_file(lora), strength)]
        changed = apply_loras(model.model, files, how=mode, experts=experts)
        return io.NodeOutput(replace(model, model=changed))


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
            description="Encode prompts, one CONDITIONING entry per line, with the teacher's own "
            "text encoders or with ComfyUI's for the same model. With images, for image-to-video "
            "teachers, one entry per prompt and image.",
            search_aliases=["text encode", "prompts", "conditioning", "CLIP", "image to video"],
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
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="ComfyUI's text encoders for this model, for a teacher that was loaded "
                    "from a checkpoint and has none of its own.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="First frames, for an image-to-video teacher with encoders of its own: "
                    "one for each prompt, one for all prompts, or one prompt for all of them.",
                ),
                *video_size(optional=True, when="Only with images, which are fitted to it. "),
                *_micro_inputs(),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning", tooltip="One entry per prompt, with the prompt's text in it."
                )
            ],
            is_experimental=True,
        )

    @classmethod
    def execute(
        cls,
        model: Teacher,
        prompts: str,
        guidance: float = 0.0,
        clip: Any = None,
        images: torch.Tensor | None = None,
        width: int = 960,
        height: int = 544,
        frames: int = 93,
        fps: float = 7.0,
        motion_bucket: int = 127,
        augmentation: float = 0.02,
    ) -> io.NodeOutput:
        from ..accvideo_core.conditioning import Micro
        from ..accvideo_core.images import fitted

        texts = prompt_lines(prompts) if model.model.family.reads_text else _names(prompts)
        if images is not None:
            pairs = _pairs(texts, images, clip)
            fitting = ((text, fitted(image, height, width)) for text, image in pairs)
            with on_device(model), vae_on_device(model):
                told = replace(model, micro=Micro(fps, motion_bucket, augmentation))
                encoded = told.encode_images(fitting, frames, guidance or None)
            return io.NodeOutput(to_native(encoded))
        if clip is None:
            with on_device(model):
                return io.NodeOutput(to_native(model.encode_prompts(texts, guidance or None)))
        return io.NodeOutput([entry for text in texts for entry in _encode(clip, text, guidance)])


def _names(prompts: str) -> list[str]:
    """What images are called where no text is read; without any it is the prompt of no image."""
    return prompt_lines(prompts) if prompts.strip() else [""]


def _micro_inputs() -> list[io.Input]:
    """What Stable Video Diffusion is told in numbers."""
    only: dict[str, Any] = {"optional": True, "advanced": True}
    when = "Stable Video Diffusion alone: "
    return [
        io.Float.Input(
            "fps", default=7.0, min=1.0, max=1000.0, **only,
            tooltip=f"{when}frames per second that the motion is meant for.",
        ),
        io.Int.Input(
            "motion_bucket", default=127, min=0, max=1023, **only,
            tooltip=f"{when}how much motion there is, 1 to 255 or so.",
        ),
        io.Float.Input(
            "augmentation", default=0.02, min=0.0, max=10.0, step=0.01, **only,
            tooltip=f"{when}noise on the image; more lets the video leave it further.",
        ),
    ]  # fmt: skip


def _packed(teacher: Teacher, how: str) -> Teacher:
    """The teacher with its weights in fewer bytes."""
    from ..accvideo_core.models.packing import pack_weights

    # Weights that are made inside ComfyUI's inference mode could never be trained through.
    with torch.inference_mode(False):
        return replace(teacher, model=pack_weights(teacher.model, how))


def _pairs(texts: list[str], images: torch.Tensor, clip: Any) -> list[tuple[str, torch.Tensor]]:
    """Every prompt with its image [H, W, 3]; one of either serves all of the other."""
    if clip is not None:
        raise AccVideoError(
            "images are encoded by the teacher's own encoders and not by clip; leave clip out, or "
            "encode with ComfyUI's nodes for this model (WanImageToVideo, HunyuanImageToVideo)"
        )
    count = max(len(texts), len(images))
    if len(texts) not in (1, count) or len(images) not in (1, count):
        raise AccVideoError(
            f"{len(texts)} prompts and {len(images)} images do not pair; give as many of both, or "
            "one of either"
        )
    return [(texts[i % len(texts)], images[i % len(images)]) for i in range(count)]


def _encode(clip: Any, text: str, guidance: float) -> NativeConditioning:
    """ComfyUI's own encoding of one prompt, with its text and guidance in it."""
    extra = {PROMPT_TEXT: text} | ({"guidance": guidance} if guidance else {})
    entries = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return [[embedding, {**values, **extra}] for embedding, values in entries]

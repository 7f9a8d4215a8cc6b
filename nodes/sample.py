"""Nodes that sample a teacher or a student, and show the result."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import comfy.model_management as management
import torch
from comfy_api.latest import InputImpl, Types, io

from ..accvideo_core.errors import AccVideoError
from ..accvideo_core.speed import Speed
from . import paths
from .decoders import VAE, VAES, decode_with, decoder_input
from .guidance import guidance_for, guidance_inputs
from .inputs import time_shift, video_size
from .monitor import NodeMonitor
from .previews import previewer
from .schedules import OWN, preset_input, sampling_plan
from .sockets import (
    AccVideoModel,
    AccVideoStudent,
    NativeConditioning,
    StudentHandle,
    from_latent,
    from_native,
    network,
    teacher_of,
    to_latent,
)
from .speed import at_speed, speed_input

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher

CATEGORY = "AccVideo/sample"


class AccVideoSchedule(io.ComfyNode):
    """The times at which a model is to be asked, as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoSchedule",
            display_name="Few-Step Schedule",
            category=CATEGORY,
            description="The sigmas that a teacher, a student or a public few-step model is "
            "sampled at, for ComfyUI's own samplers too. Other sigmas are what makes few-step "
            "videos look burnt.",
            search_aliases=[
                *("sigmas", "scheduler", "few-step", "key steps", "turbo", "lightning"),
                *("LightX2V", "FastWan", "CausVid", "rCM", "AccVideo", "preset"),
            ],
            inputs=[
                io.MultiType.Input(
                    "model",
                    types=[AccVideoModel, AccVideoStudent],
                    optional=True,
                    tooltip="A teacher or a student. Not needed for a preset.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps of the model's own time grid. 0 is a student's key steps, or "
                    "the teacher's official number.",
                ),
                preset_input("The schedule of a public few-step model, instead of the model's."),
                time_shift(),
            ],
            outputs=[
                io.Sigmas.Output(
                    "sigmas", tooltip="steps + 1 falling numbers, from 1 to 0 for flow models."
                ),
                io.Sampler.Output("sampler", tooltip="ComfyUI's sampler that goes with them."),
                io.Float.Output("cfg", tooltip="Guidance scale that goes with them; 1 is none."),
                io.Float.Output(
                    "guidance",
                    tooltip="Embedded guidance that goes with them (HunyuanVideo: 6), for "
                    "FluxGuidance.",
                ),
            ],
            is_experimental=True,
        )

    @classmethod
    def execute(
        cls,
        steps: int,
        model: Teacher | StudentHandle | None = None,
        preset: str = OWN,
        shift: float = 0.0,
    ) -> io.NodeOutput:
        plan = sampling_plan(model, preset, steps, shift)
        return io.NodeOutput(plan.sigmas, plan.sampler(), plan.cfg, plan.guidance or 0.0)


class AccVideoSample(io.ComfyNode):
    """Videos of a teacher or a student, one per prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoSample",
            display_name="Sample Video",
            category=CATEGORY,
            description="Sample one video per prompt. The same seed gives teacher and student the "
            "same noise, so that their videos can be compared.",
            search_aliases=["sampler", "few-step", "turbo", "lightning", "lcm", "HunyuanVideo"],
            inputs=_sample_inputs(),
            outputs=[
                io.Latent.Output(
                    "latent",
                    tooltip="Latents in the VAE's own scale, as every VAE node takes them.",
                )
            ],
            is_experimental=True,
        )

    @classmethod
    def execute(
        cls,
        model: Teacher | StudentHandle,
        conditioning: NativeConditioning,
        width: int,
        height: int,
        frames: int,
        seed: int,
        steps: int,
        batch_size: int,
        sigmas: torch.Tensor | None = None,
        negative: NativeConditioning | None = None,
        cfg: float = 0.0,
        shift: float = 0.0,
        preset: str = OWN,
        speed: Speed | None = None,
    ) -> io.NodeOutput:
        from ..accvideo_core.conditioning import Condition
        from ..accvideo_core.guidance import guided
        from ..accvideo_core.sampling import SamplePlan, sample
        from ..accvideo_core.sampling_room import Need

        how = speed or Speed()
        net, teacher = network(model), teacher_of(model)
        spec = net.latent_spec
        prompts = from_native(conditioning, net)
        size = SamplePlan(frames, height, width)
        noise = size.noise(spec, prompts, seed)
        plan = sampling_plan(model, preset, steps, shift, (height, width), sigmas)
        # A few-step model has its guidance in its weights.
        against, scale = guidance_for(teacher, negative, cfg or (plan.cfg if plan.few_step else 0))
        asked = guided(net, against, scale, how.cfg_batch)
        condition = Condition.cat([prompt.condition for prompt in prompts])
        condition = condition.with_guidance(plan.guidance)
        at_once, device = min(batch_size, len(prompts)), management.get_torch_device()
        need = Need(asked, condition, size, at_once, how, device)
        monitor = NodeMonitor(previewer(teacher))
        with at_speed(teacher, net, how, need):
            x = sample(asked, condition, noise, plan.times, monitor, batch_size, plan.solver, seed)
        samples = spec.from_model(spec.crop(x, frames))
        return io.NodeOutput(to_latent(samples.to(management.intermediate_device()), spec))


def _sample_inputs() -> list[io.Input]:
    return [
        io.MultiType.Input(
            "model", types=[AccVideoModel, AccVideoStudent], tooltip="A teacher or a student."
        ),
        io.Conditioning.Input("conditioning", tooltip="The prompts: one entry, one video each."),
        *video_size(),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=True,
            tooltip="Seed of the noise; every prompt gets its own noise from it.",
        ),
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=1000,
            tooltip="0 is a student's key steps, or the teacher's official number. A link at "
            "sigmas goes before it.",
        ),
        io.Int.Input(
            "batch_size", default=1, min=1, max=1024, tooltip="Videos sampled at the same time."
        ),
        io.Sigmas.Input(
            "sigmas", optional=True, tooltip="Sample at these sigmas instead of the model's own."
        ),
        *guidance_inputs(),
        time_shift(),
        preset_input("Sample as this public few-step model wants, whose weights were loaded."),
        speed_input("Speed Settings. Without them the fastest exact attention is used."),
    ]


class AccVideoDecode(io.ComfyNode):
    """Latents through the teacher's VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoDecode",
            display_name="Decode Video",
            category=CATEGORY,
            description="Decode latents with the teacher's own VAE, or many times faster with a "
            "tiny decoder. Several clips follow one another in time; ComfyUI's VAE Decode with the "
            "model's VAE works in its place.",
            search_aliases=["VAE decode", "latent to video", "latent to image", "TAEHV", "taew2_1"],
            inputs=[
                AccVideoModel.Input("model", tooltip="The teacher whose VAE is used."),
                io.Latent.Input("latent", tooltip="Latents of one or more clips."),
                io.Int.Input(
                    "index",
                    default=-1,
                    min=-1,
                    max=100_000,
                    tooltip="Which clip of the batch, from 0. -1 is all, one after another.",
                ),
                io.Float.Input(
                    "fps", default=24.0, min=1.0, max=120.0, step=1.0,
                    tooltip="Frames per second of the video.",
                ),
                decoder_input(),
            ],
            outputs=[
                io.Image.Output("images", tooltip="The frames, in order of time."),
                io.Video.Output("video", tooltip="The same frames as a video."),
            ],
            is_experimental=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, decoder: str = VAE) -> bool | str:
        return True if decoder in VAES else paths.complaint(paths.decoder_file, decoder)

    @classmethod
    def execute(
        cls, model: Teacher, latent: dict[str, Any], index: int, fps: float, decoder: str = VAE
    ) -> io.NodeOutput:
        spec = model.model.latent_spec
        samples = from_latent(latent, spec)
        if index >= len(samples):
            raise AccVideoError(
                f"index is {index}, but the latent holds {len(samples)} clips; "
                f"use -1 for all, or 0 to {len(samples) - 1}"
            )
        chosen = samples if index < 0 else samples[index : index + 1]
        images = decode_with(decoder, model, spec.to_model(chosen))
        images = images.flatten(0, 1).to(management.intermediate_device())
        clip = Types.VideoComponents(images=images, frame_rate=Fraction(fps))
        return io.NodeOutput(images, InputImpl.VideoFromComponents(clip))

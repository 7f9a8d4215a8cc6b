"""Nodes that sample a teacher or a student, and show the result."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch
from comfy_api.latest import InputImpl, Types, io

from ..accvideo_core.errors import AccVideoError
from .devices import on_device
from .inputs import video_size
from .monitor import NodeMonitor
from .previews import previewer
from .sockets import (
    AccVideoModel,
    AccVideoStudent,
    NativeConditioning,
    StudentHandle,
    from_native,
    from_sigmas,
    guidance_of,
    network,
    times_of,
    to_sigmas,
)

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
            description="The sigmas that a teacher or a student is sampled at. A student's own are "
            "part of it: other sigmas are what makes few-step videos look burnt.",
            search_aliases=["sigmas", "scheduler", "few-step", "key steps", "turbo", "lightning"],
            inputs=[
                io.MultiType.Input(
                    "model",
                    types=[AccVideoModel, AccVideoStudent],
                    tooltip="A teacher or a student.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps of the model's own time grid. 0 is a student's key steps, or "
                    "the teacher's official number.",
                ),
            ],
            outputs=[io.Sigmas.Output("sigmas", tooltip="steps + 1 falling numbers from 1 to 0.")],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, model: Teacher | StudentHandle, steps: int) -> io.NodeOutput:
        return io.NodeOutput(to_sigmas(times_of(model, steps)))


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
    ) -> io.NodeOutput:
        from ..accvideo_core.conditioning import Condition
        from ..accvideo_core.sampling import SamplePlan, sample

        net = network(model)
        teacher = model.teacher if isinstance(model, StudentHandle) else model
        prompts = from_native(conditioning, net)
        noise = SamplePlan(frames, height, width).noise(net.latent_spec, prompts, seed)
        condition = Condition.cat([prompt.condition for prompt in prompts])
        condition = condition.with_guidance(guidance_of(model))
        times = times_of(model, steps) if sigmas is None else from_sigmas(sigmas)
        monitor = NodeMonitor(previewer(teacher))
        with on_device(teacher, net.module):
            x = sample(net, condition, noise, times, monitor, batch_size)
        samples = net.latent_spec.from_model(x).to(comfy.model_management.intermediate_device())
        return io.NodeOutput({"samples": samples})


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
    ]


class AccVideoDecode(io.ComfyNode):
    """Latents through the teacher's VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoDecode",
            display_name="Decode Video",
            category=CATEGORY,
            description="Decode latents with the teacher's own VAE. Several clips follow one "
            "another in time; ComfyUI's VAE Decode with the model's VAE works in its place.",
            search_aliases=["VAE decode", "latent to video", "latent to image"],
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
            ],
            outputs=[
                io.Image.Output("images", tooltip="The frames, in order of time."),
                io.Video.Output("video", tooltip="The same frames as a video."),
            ],
            is_experimental=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Teacher, latent: dict[str, Any], index: int, fps: float
    ) -> io.NodeOutput:
        samples = latent["samples"]
        if index >= len(samples):
            raise AccVideoError(
                f"index is {index}, but the latent holds {len(samples)} clips; "
                f"use -1 for all, or 0 to {len(samples) - 1}"
            )
        chosen = samples if index < 0 else samples[index : index + 1]
        spec = model.model.latent_spec
        with on_device(model):
            images = model.vae.decode(spec.to_model(spec.check(chosen, "the latents")))
        images = images.flatten(0, 1).to(comfy.model_management.intermediate_device())
        clip = Types.VideoComponents(images=images, frame_rate=Fraction(fps))
        return io.NodeOutput(images, InputImpl.VideoFromComponents(clip))

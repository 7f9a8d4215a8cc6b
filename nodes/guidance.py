"""Classifier-free guidance at the sockets: a negative prompt and a scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..accvideo_core.conditioning import Prompt
from ..accvideo_core.errors import AccVideoError
from ..accvideo_core.guidance import Cfg
from .sockets import NativeConditioning, from_native

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher


def guidance_inputs() -> list[io.Input]:
    """Negative prompt and scale, for nodes that ask a teacher."""
    return [
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="What classifier-free guidance points away from (Wan, CogVideoX). Without it "
            "the model's official negative prompt is used, where its text encoders are there.",
        ),
        io.Float.Input(
            "cfg",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="Scale of the teacher's classifier-free guidance. 0 is the model's official "
            "one, 1 is none. Students have it in their weights and need none.",
        ),
    ]


def guidance_for(
    model: Teacher, negative: NativeConditioning | None, cfg: float
) -> tuple[Prompt | None, Cfg]:
    """The negative prompt and the scale that the teacher is asked with; Cfg(1) is none."""
    wanted = model.model.family.cfg_of(cfg or None)
    if wanted is None or wanted.none:
        return None, Cfg(1.0)
    if negative is None and not model.has_text_encoders:
        raise AccVideoError(
            f"cfg {wanted.scale:g} needs a negative prompt, and {model.folder.name!r} has no text "
            "encoders for one; connect CLIP Text Encode to negative, or set cfg to 1"
        )
    if negative is None:
        return model.encode_negative(), wanted
    prompts = from_native(negative, model.model)
    if len(prompts) != 1:
        raise AccVideoError(
            f"negative holds {len(prompts)} prompts; give one, which serves every prompt"
        )
    return Prompt.of(prompts[0].text, prompts[0].condition.without_image()), wanted

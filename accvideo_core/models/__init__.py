"""The model families. A new family is a file beside this one and an entry in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import AccVideoError
from .cogvideox import COGVIDEOX_1_5, COGVIDEOX_2B, COGVIDEOX_5B
from .hunyuan_video import HUNYUAN_VIDEO
from .hunyuan_video_i2v import HUNYUAN_VIDEO_I2V, HUNYUAN_VIDEO_I2V_REPLACE
from .svd import SVD
from .video_model import Family, VideoModel
from .wan import WAN22_I2V, WAN22_T2V, WAN22_TI2V, WAN_I2V, WAN_T2V

__all__ = ["FAMILIES", "Family", "VideoModel", "family_of"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(HUNYUAN_VIDEO, HUNYUAN_VIDEO_I2V, HUNYUAN_VIDEO_I2V_REPLACE),
        *(WAN_T2V, WAN_I2V, WAN22_T2V, WAN22_I2V, WAN22_TI2V),
        *(COGVIDEOX_2B, COGVIDEOX_5B, COGVIDEOX_1_5),
        SVD,
    )
}


def family_of(
    transformer_class: str,
    config: Mapping[str, Any] | None = None,
    pipeline_class: str = "",
    experts: int = 1,
) -> Family:
    """The family of a diffusers network.

    Args:
        transformer_class: name of the network's class.
        config: its configuration, which tells variants of one class apart.
        pipeline_class: name of the whole folder's class, where there is one.
        experts: how many such networks the model consists of.
    """
    known = [f for f in FAMILIES.values() if f.transformer_class == transformer_class]
    if not known:
        supported = sorted({family.transformer_class for family in FAMILIES.values()})
        raise AccVideoError(
            f"networks of class {transformer_class!r} are not supported; choose a diffusers folder "
            f"whose transformer is one of: {', '.join(supported)}"
        )
    fitting = [family for family in known if family.matches(config or {})]
    if fitting and all(family.experts != experts for family in fitting):
        raise AccVideoError(
            f"{fitting[0].title} consists of {fitting[0].experts} networks, but {experts} was "
            "given; choose the whole folder, or the high-noise and the low-noise file"
        )
    fitting = [family for family in fitting if family.experts == experts]
    named = [f for f in fitting if not pipeline_class or f.pipeline_class == pipeline_class]
    if not named:
        expected = ", ".join(sorted({family.pipeline_class for family in fitting or known}))
        raise AccVideoError(
            f"this {pipeline_class or transformer_class} is a kind of model that is not supported; "
            f"choose a folder of class {expected}"
        )
    return named[0]

"""The model families. A new family is a file beside this one and an entry in `FAMILIES`."""

from __future__ import annotations

from ..errors import AccVideoError
from .hunyuan_video import HUNYUAN_VIDEO
from .video_model import Family, VideoModel

__all__ = ["FAMILIES", "Family", "VideoModel", "family_of"]

FAMILIES: dict[str, Family] = {family.name: family for family in (HUNYUAN_VIDEO,)}


def family_of(transformer_class: str) -> Family:
    """The family of a diffusers network, by the name of its class."""
    for family in FAMILIES.values():
        if family.transformer_class == transformer_class:
            return family
    supported = ", ".join(family.transformer_class for family in FAMILIES.values())
    raise AccVideoError(
        f"networks of class {transformer_class!r} are not supported; "
        f"choose a diffusers folder whose transformer is one of: {supported}"
    )

"""AccVideo: ComfyUI's door to the pack.

Nothing is imported until ComfyUI asks for the nodes: start-up stays fast, and tools that only
look at this folder (pytest, a type checker) need no ComfyUI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import AccVideoExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> AccVideoExtension:
    """What ComfyUI calls once at start-up to get the pack's nodes."""
    from .nodes import AccVideoExtension

    return AccVideoExtension()

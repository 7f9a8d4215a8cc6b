"""Widgets that several nodes have in common."""

from __future__ import annotations

from comfy_api.latest import io


def video_size() -> list[io.Input]:
    """Width, height and frames of a video, in pixels."""
    return [
        io.Int.Input("width", default=960, min=16, max=8192, step=8, tooltip="Pixels."),
        io.Int.Input("height", default=544, min=16, max=8192, step=8, tooltip="Pixels."),
        io.Int.Input(
            "frames",
            default=93,
            min=1,
            max=1025,
            step=4,
            tooltip="Frames of a clip; HunyuanVideo takes 4k+1 (17, 93, 129, ...).",
        ),
    ]

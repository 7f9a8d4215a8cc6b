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
            tooltip="Frames of a clip: 4k+1 (HunyuanVideo 93 or 129, Wan 81).",
        ),
    ]


def time_shift() -> io.Input:
    """Shift of the model's time grid."""
    return io.Float.Input(
        "shift",
        default=0.0,
        min=0.0,
        max=1000.0,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip="Shift of the time grid towards noise. 0 is the model's official one for this size "
        "(HunyuanVideo 7, Wan 2.1 5, its I2V at 480p 3).",
    )

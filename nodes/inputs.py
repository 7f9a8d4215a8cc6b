"""Widgets that several nodes have in common."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io


def video_size(optional: bool = False, when: str = "") -> list[io.Input]:
    """Width, height and frames of a video, in pixels; `when` begins each tooltip."""
    pixels: dict[str, Any] = {"min": 16, "max": 8192, "step": 8, "optional": optional}
    return [
        io.Int.Input("width", default=960, tooltip=f"{when}Pixels.", **pixels),
        io.Int.Input("height", default=544, tooltip=f"{when}Pixels.", **pixels),
        io.Int.Input(
            "frames",
            default=93,
            min=1,
            max=1025,
            optional=optional,
            tooltip=f"{when}Frames of a clip: HunyuanVideo 93 or 129 and Wan 81, of the form 4k+1; "
            "Stable Video Diffusion 14 or 25.",
        ),
    ]


def dataset_name(default: str, goes_on: str) -> io.Input:
    """The dataset that is written; `goes_on` is what goes on in one that is there."""
    return io.String.Input(
        "dataset",
        default=default,
        tooltip=f"Name of the dataset, a folder in ComfyUI's datasets. {goes_on} goes on where it "
        "stopped when the folder is there already.",
    )


def stored_dtype() -> io.Input:
    return io.Combo.Input(
        "dtype",
        options=["bfloat16", "float16", "float32"],
        default="bfloat16",
        optional=True,
        advanced=True,
        tooltip="Number format of the latents on disk.",
    )


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

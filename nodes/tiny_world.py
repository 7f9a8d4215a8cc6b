"""The node that gives videos to learn from without having any: those of the embedded world."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy_api.latest import io

from . import paths


class AccVideoTinyVideos(io.ComfyNode):
    """Videos of the embedded image-to-video teacher's world, and their first frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoTinyVideos",
            display_name="Tiny World Videos",
            category="AccVideo/teacher",
            description="Write videos of the world that the embedded image-to-video teacher knows "
            "into ComfyUI's input folder, for Ingest Videos, and give out their first frames. 8 "
            "frames of 32 x 32 pixels; lit edges tell in the first frame what will move where.",
            search_aliases=["tiny", "demo", "test videos", "start images", "image to video"],
            inputs=[
                io.Int.Input("count", default=64, min=1, max=10_000, tooltip="How many videos."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Which videos.",
                ),
            ],
            outputs=[
                io.String.Output("folder", tooltip="The folder's name, for Ingest Videos."),
                io.Image.Output("images", tooltip="The videos' first frames."),
            ],
            is_experimental=True,
        )

    @classmethod
    def fingerprint_inputs(cls, seed: int, **_: object) -> str:
        return paths.fingerprint(_folder(seed))

    @classmethod
    def execute(cls, count: int, seed: int) -> io.NodeOutput:
        from ..accvideo_core.evaluate.image_clips import write_videos
        from ..accvideo_core.video import read_video

        written = write_videos(_folder(seed), count, seed)
        firsts = [read_video(path)[0][0] for path in written]
        return io.NodeOutput(_folder(seed).name, torch.stack(firsts))


def _folder(seed: int) -> Path:
    """Of its own for each seed, so that other videos are never taken for these."""
    return paths.input_folder(f"accvideo_tiny_{seed}")

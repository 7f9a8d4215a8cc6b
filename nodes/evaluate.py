"""The node that judges real videos by others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_management as management
from comfy_api.latest import io

from ..accvideo_core.errors import AccVideoError
from . import paths
from .monitor import NodeMonitor
from .reports import shown_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ..accvideo_core.evaluate.clips import Clip
    from ..accvideo_core.evaluate.evaluate_videos import Tools

ROOM = 2 * 2**30
"""Bytes that networks and a few frames may take."""


class AccVideoEvaluate(io.ComfyNode):
    """Videos, such as a student's, judged by others, such as its teacher's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoEvaluate",
            display_name="Evaluate Videos",
            category="AccVideo/evaluate",
            description="Judge videos by reference videos, pair by pair and set by set: PSNR, "
            "SSIM, LPIPS, FVD, sharpness, motion, saturation, flicker, diversity. Writes a page "
            "with table, plots and players to output/accvideo/<name>.",
            search_aliases=["metrics", "quality", "PSNR", "SSIM", "LPIPS", "FVD", "VBench"],
            inputs=_inputs(),
            outputs=[
                io.Image.Output("plots", tooltip="Every figure by frame."),
                io.String.Output("table", tooltip="The figures as a table of text."),
            ],
            is_output_node=True,
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        return paths.complaint(paths.report_folder, name)

    @classmethod
    def fingerprint_inputs(
        cls, reference_folder: str = "", judged_folder: str = "", **_: object
    ) -> str:
        named = [name for name in (reference_folder, judged_folder) if name]
        folders = [paths.video_folder(name) for name in named]
        return paths.fingerprint(*(file for each in folders for file in sorted(each.iterdir())))

    @classmethod
    def execute(
        cls,
        name: str,
        fps: float,
        reference: torch.Tensor | None = None,
        judged: torch.Tensor | None = None,
        reference_folder: str = "",
        judged_folder: str = "",
        frames_per_clip: int = 0,
        players: int = 8,
        lpips: str = paths.NONE,
        fvd: str = paths.NONE,
    ) -> io.NodeOutput:
        from ..accvideo_core.evaluate.evaluate_videos import evaluate_videos
        from ..accvideo_core.evaluate.video_page import write_evaluation

        one = _clips("reference", reference, reference_folder, fps, frames_per_clip)
        other = _clips("judged", judged, judged_folder, fps, frames_per_clip)
        folder, monitor = paths.report_folder(name), NodeMonitor()
        labels = reference_folder or "images", judged_folder or "images"
        found = evaluate_videos(one, other, folder, _tools(lpips, fvd), labels, monitor)
        write_evaluation(found, folder, players, monitor)
        return shown_report([folder / "plots.png"], found.table())


def _inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "name",
            default="my_evaluation",
            tooltip="Folder in output/accvideo that everything is written to. What was measured "
            "there is not measured again.",
        ),
        io.Float.Input(
            "fps",
            default=24.0,
            min=1.0,
            max=120.0,
            step=1.0,
            tooltip="Frames per second of the images; files have their own.",
        ),
        io.Image.Input(
            "reference", optional=True, tooltip="Frames of the reference, such as a teacher's."
        ),
        io.Image.Input(
            "judged", optional=True, tooltip="Frames of what is judged by it, such as a student's."
        ),
        *(
            io.String.Input(
                f"{side}_folder",
                default="",
                optional=True,
                tooltip="Or a folder of videos in ComfyUI's output or input folder, such as "
                "video/teacher. Videos of one name are a pair.",
            )
            for side in ("reference", "judged")
        ),
        *_advanced_inputs(),
    ]


def _advanced_inputs() -> list[io.Input]:
    weights = [paths.NONE, *paths.metric_names()]
    return [
        io.Int.Input(
            "frames_per_clip",
            default=0,
            min=0,
            max=100_000,
            optional=True,
            advanced=True,
            tooltip="Where the images are several clips one after another: frames of each. 0 is "
            "one clip.",
        ),
        io.Int.Input(
            "players",
            default=8,
            min=0,
            max=1000,
            optional=True,
            advanced=True,
            tooltip="Pairs whose videos are shown on the page, the least alike first.",
        ),
        io.Combo.Input(
            "lpips",
            options=weights,
            default=paths.NONE,
            optional=True,
            advanced=True,
            tooltip="For LPIPS: torchvision's AlexNet or VGG-16 in models/accvideo_metrics.",
        ),
        io.Combo.Input(
            "fvd",
            options=weights,
            default=paths.NONE,
            optional=True,
            advanced=True,
            tooltip="For FVD: I3D as i3d_torchscript.pt in models/accvideo_metrics.",
        ),
    ]


def _clips(
    side: str, images: torch.Tensor | None, folder: str, fps: float, length: int
) -> Sequence[Clip]:
    from ..accvideo_core.evaluate.clips import clips_of, clips_of_batch

    if (images is None) == (not folder):
        raise AccVideoError(
            f"{side} has {'both images and a folder' if folder else 'neither images nor a folder'};"
            f" connect images or name {side}_folder"
        )
    if images is None:
        return clips_of(paths.video_folder(folder))
    return clips_of_batch(images, fps, length)


def _tools(lpips: str, fvd: str) -> Tools:
    from ..accvideo_core.evaluate.evaluate_videos import Tools
    from ..accvideo_core.evaluate.fvd import Detector
    from ..accvideo_core.evaluate.lpips import load_lpips

    device = management.get_torch_device()
    management.free_memory(ROOM, device)
    return Tools(
        lpips=None if lpips == paths.NONE else load_lpips(paths.metric_file(lpips)),
        detector=None if fvd == paths.NONE else Detector(paths.metric_file(fvd), device),
        device=str(device),
    )

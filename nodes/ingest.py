"""The node that makes a dataset of real videos."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import comfy.model_management as management
from comfy_api.latest import io

from . import paths
from .devices import vae_on_device
from .inputs import dataset_name, stored_dtype, video_size
from .monitor import NodeMonitor
from .previews import previewer
from .sockets import AccVideoDataset, AccVideoModel

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher
    from ..accvideo_core.trajectories.ingest import Ingestion


class AccVideoIngestVideos(io.ComfyNode):
    """Clips of real videos, written to disk clip by clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoIngestVideos",
            display_name="Ingest Videos",
            category="AccVideo/dataset",
            description="Cut clips of the videos in a folder and encode them with the teacher's "
            "VAE and text encoders: a dataset for methods that learn from real video. What is "
            "ingested stays when you cancel; queued again, ingesting goes on.",
            search_aliases=["real video", "dataset", "training data", "video folder", "captions"],
            inputs=_inputs(),
            outputs=[
                AccVideoDataset.Output("dataset", tooltip="The dataset: a folder on disk."),
                io.String.Output("report", tooltip="What was used, and what was left out and why."),
            ],
            is_output_node=True,
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, folder: str, dataset: str) -> bool | str:
        complaint = paths.complaint(paths.dataset_folder, dataset)
        return complaint if complaint is not True else paths.complaint(paths.video_folder, folder)

    @classmethod
    def fingerprint_inputs(cls, dataset: str, folder: str | None = None, **_: object) -> str:
        # A linked folder's name is not known yet, and its own node tells when it has changed.
        files = [] if folder is None else sorted(paths.video_folder(folder).rglob("*"))
        return f"{paths.recorded_before(dataset)} {paths.fingerprint(*files)}"

    @classmethod
    def execute(
        cls,
        model: Teacher,
        folder: str,
        dataset: str,
        width: int,
        height: int,
        frames: int,
        fps: float,
        clips: int,
        caption: str = "",
        stride: int = 1,
        spacing: float = 0.0,
        dtype: str = "bfloat16",
    ) -> io.NodeOutput:
        from ..accvideo_core.trajectories.clips import Cutting
        from ..accvideo_core.trajectories.footage import IngestSpec
        from ..accvideo_core.trajectories.ingest import ingest

        spec = IngestSpec(
            frames=frames,
            height=height,
            width=width,
            cutting=Cutting(fps or None, stride, spacing or None),
            clips=clips or None,
            caption=caption.strip() or None,
            dtype=dtype,
        )
        videos, out = paths.video_folder(folder), paths.dataset_folder(dataset)
        with vae_on_device(model):
            # The network is not asked, so it need not be where VAE and text encoders compute.
            encoders = replace(model, device=management.get_torch_device())
            done = ingest(encoders, videos, spec, out, NodeMonitor(previewer(model)))
        paths.note_recorded(dataset)
        report = _report(done)
        return io.NodeOutput(done.dataset, report, ui={"text": [report]})


def _report(done: Ingestion) -> str:
    """What came of it, a line each."""
    lines = [f"{len(done.dataset)} clips of {done.videos} videos", *done.notes]
    return "\n".join([*lines, *(f"left out {one}" for one in done.skipped)])


def _inputs() -> list[io.Input]:
    return [
        AccVideoModel.Input("model", tooltip="The teacher, with its VAE and text encoders."),
        io.String.Input(
            "folder",
            default="videos",
            tooltip="Folder of videos in ComfyUI's input or output folder. A caption stands beside "
            "its video (a.txt or a.caption for a.mp4), or in captions.jsonl or metadata.jsonl.",
        ),
        dataset_name("my_videos", "Ingesting"),
        *video_size(),
        io.Float.Input(
            "fps",
            default=0.0,
            min=0.0,
            max=240.0,
            step=0.01,
            tooltip="Frames a second to take, by the times at which they are shown. 0 is each "
            "video's own.",
        ),
        io.Int.Input(
            "clips",
            default=0,
            min=0,
            max=100_000,
            tooltip="Most clips of each video. 0 is all that fit.",
        ),
        io.String.Input(
            "caption",
            default="",
            multiline=True,
            optional=True,
            tooltip="Of videos that have none. Without it they are left out, but for "
            "image-to-video models.",
        ),
        io.Int.Input(
            "stride",
            default=1,
            min=1,
            max=1000,
            optional=True,
            advanced=True,
            tooltip="Take every so many of those frames.",
        ),
        io.Float.Input(
            "spacing",
            default=0.0,
            min=0.0,
            max=1e6,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="Seconds from the beginning of one clip to that of the next. 0 is a clip's "
            "length, so that they follow one another.",
        ),
        stored_dtype(),
    ]

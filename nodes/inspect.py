"""The node that looks into a recorded trajectory."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL.Image import Image

from ..accvideo_core.errors import AccVideoError
from .devices import vae_on_device
from .monitor import NodeMonitor
from .sockets import AccVideoDataset, AccVideoModel

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher
    from ..accvideo_core.trajectories.store import TrajectoryDataset


class AccVideoInspectTrajectory(io.ComfyNode):
    """One record of a dataset: its decoded states, and how it moved."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoInspectTrajectory",
            display_name="Inspect Trajectory",
            category="AccVideo/dataset",
            description="Look at one recorded trajectory: its states from noise to video, the clip "
            "that every step points at, and curves of speed, change and straightness.",
            search_aliases=["dataset", "trajectory", "preview", "SynVid", "states", "curves"],
            inputs=[
                AccVideoModel.Input("model", tooltip="The teacher that recorded the dataset."),
                AccVideoDataset.Input("dataset", tooltip="Its recorded trajectories."),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    tooltip="Which record, from 0 in the order of their ids.",
                ),
                io.Int.Input(
                    "frames", default=4, min=1, max=64, tooltip="Frames of each state to show."
                ),
            ],
            outputs=[
                io.Image.Output("states", tooltip="States and predicted clean clips."),
                io.Image.Output("curves", tooltip="Speed, change per step and straightness."),
                io.String.Output("facts", tooltip="The record in words."),
            ],
            is_output_node=True,
            is_experimental=True,
        )

    @classmethod
    def execute(
        cls, model: Teacher, dataset: TrajectoryDataset, index: int, frames: int
    ) -> io.NodeOutput:
        from ..accvideo_core.evaluate.trajectory_pictures import (
            record_facts,
            record_plot,
            record_sheet,
        )
        from ..accvideo_core.trajectories.stats import chosen_record, record_curves

        info, monitor = dataset.info, NodeMonitor()
        if model.model.fingerprint != info.teacher:
            raise AccVideoError(
                f"dataset {dataset.folder.name!r} was recorded from another teacher than "
                f"{model.model.source}; connect its own"
            )
        trajectory = dataset.read(chosen_record(dataset, index))
        curves = record_curves(trajectory)
        with vae_on_device(model) as vae:
            sheet = record_sheet(
                trajectory,
                lambda x: vae.decode(info.latent_spec.crop(x, info.frames)),
                frames=frames,
                monitor=monitor,
            )
        text = dataset.prompt(trajectory.prompt_id).text
        facts = record_facts(trajectory, curves, text)
        # The page takes it for HTML, and a dataset's prompts may be anybody's.
        monitor.tell(html.escape(facts, quote=False))
        return _shown(sheet, record_plot(curves, info.time_grid), facts, cls)


def _shown(sheet: Image, plot: Image, facts: str, node: type[io.ComfyNode]) -> io.NodeOutput:
    """Pictures and text on the node itself and on its sockets."""
    images = [_image(sheet), _image(plot)]
    saved = [entry for image in images for entry in ui.PreviewImage(image, cls=node).values]
    return io.NodeOutput(*images, facts, ui={"images": saved, "text": [facts]})


def _image(picture: Image) -> torch.Tensor:
    """A picture as ComfyUI's IMAGE [1, H, W, 3]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).float()[None] / 255

"""Nodes that look into a recorded trajectory, and into a network."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui
from PIL.Image import Image

from ..accvideo_core.errors import AccVideoError
from .devices import vae_on_device
from .guidance import guidance_for, guidance_inputs
from .inputs import video_size
from .monitor import NodeMonitor
from .reports import as_image
from .sockets import AccVideoDataset, AccVideoModel, NativeConditioning, from_native
from .speed import at_speed

if TYPE_CHECKING:
    from ..accvideo_core.evaluate.features import KeyStates
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
        return _shown([sheet, record_plot(curves, info.time_grid)], facts, cls)


class AccVideoInspectFeatures(io.ComfyNode):
    """What the network's blocks see at the key times, where the heads of tuning look."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoInspectFeatures",
            display_name="Inspect Features",
            category="AccVideo/dataset",
            description="Sample one clip and show what the network's blocks make of it at the key "
            "times (Figure 5 of AccVideo): what has one colour looks alike to the network. Red "
            "frames mark the blocks that the heads of adversarial tuning look at.",
            search_aliases=["features", "feature maps", "PCA", "blocks", "discriminator", "layers"],
            inputs=_feature_inputs(),
            outputs=[
                io.Image.Output("features", tooltip="A row for each key time, a block a column."),
                io.String.Output("facts", tooltip="How unlike neighbouring tokens are, as text."),
            ],
            is_output_node=True,
            is_experimental=True,
        )

    @classmethod
    def execute(
        cls,
        model: Teacher,
        conditioning: NativeConditioning,
        width: int,
        height: int,
        frames: int,
        seed: int,
        student_steps: int,
        blocks: str,
        shown: int,
        negative: NativeConditioning | None = None,
        cfg: float = 0.0,
    ) -> io.NodeOutput:
        from ..accvideo_core.evaluate.feature_pictures import feature_facts, feature_sheet
        from ..accvideo_core.evaluate.features import blocks_of, feature_maps, sample_states
        from ..accvideo_core.guidance import guided
        from ..accvideo_core.sampling import SamplePlan

        net, monitor = model.model, NodeMonitor()
        prompts = from_native(conditioning, net)[:1]
        noise = SamplePlan(frames, height, width).noise(net.latent_spec, prompts, seed)
        grid = net.family.time_grid(size=(height, width))
        asked = guided(net, *guidance_for(model, negative, cfg))
        with at_speed(model, net, None):
            cond = prompts[0].condition
            states = sample_states(asked, cond, noise, grid, student_steps, monitor)
            maps = feature_maps(net, states, blocks_of(blocks), frames=shown, monitor=monitor)
        sheet = feature_sheet(maps, _decoded(model, states, frames))
        return _shown([sheet], feature_facts(maps), cls)


def _decoded(model: Teacher, states: KeyStates, frames: int) -> torch.Tensor | None:
    """Each state as frames, clip by clip; None for a teacher without a VAE."""
    if model.vae_path is None:
        return None
    spec = model.model.latent_spec
    with vae_on_device(model) as vae:
        return torch.cat([vae.decode(spec.crop(x[None], frames)) for x in states.latents])


def _feature_inputs() -> list[io.Input]:
    return [
        AccVideoModel.Input("model", tooltip="The teacher whose blocks are looked into."),
        io.Conditioning.Input("conditioning", tooltip="The prompt; of several the first is used."),
        *video_size(),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=True,
            tooltip="Seed of the clip's noise.",
        ),
        io.Int.Input(
            "student_steps",
            default=5,
            min=1,
            max=1000,
            tooltip="Key times to look at: as many as the student has steps. It must divide the "
            "teacher's steps (HunyuanVideo: 50).",
        ),
        io.String.Input(
            "blocks",
            default="",
            tooltip="Blocks from 0, with commas between them, such as 19, 39, 59. Empty: some over "
            "the depth, and those that the heads look at.",
        ),
        io.Int.Input(
            "shown", default=1, min=1, max=16, tooltip="Latent frames of each map to show."
        ),
        *guidance_inputs(),
    ]


def _shown(pictures: list[Image], facts: str, node: type[io.ComfyNode]) -> io.NodeOutput:
    """Pictures and text on the node itself and on its sockets."""
    images = [as_image(picture) for picture in pictures]
    saved = [entry for image in images for entry in ui.PreviewImage(image, cls=node).values]
    return io.NodeOutput(*images, facts, ui={"images": saved, "text": [facts]})

"""Nodes that record a teacher's trajectories and open what was recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..accvideo_core.speed import Speed, check_exact
from . import paths
from .guidance import guidance_for, guidance_inputs
from .inputs import dataset_name, stored_dtype, time_shift, video_size
from .monitor import NodeMonitor
from .previews import previewer
from .sockets import AccVideoDataset, AccVideoModel, NativeConditioning, from_native
from .speed import at_speed, speed_input

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher

CATEGORY = "AccVideo/dataset"


class AccVideoRecordTrajectories(io.ComfyNode):
    """The teacher's denoising paths, written to disk record by record."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoRecordTrajectories",
            display_name="Record Teacher Trajectories",
            category=CATEGORY,
            description="Let the teacher denoise every prompt and keep states of the way (SynVid). "
            "What is recorded stays when you cancel; queued again, recording goes on.",
            search_aliases=["SynVid", "distillation", "dataset", "trajectory", "denoising"],
            inputs=_record_inputs(),
            outputs=[
                AccVideoDataset.Output("dataset", tooltip="The recorded dataset: a folder on disk.")
            ],
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, dataset: str) -> bool | str:
        return paths.complaint(paths.dataset_folder, dataset)

    @classmethod
    def fingerprint_inputs(cls, dataset: str, **_: object) -> float:
        return paths.recorded_before(dataset)

    @classmethod
    def execute(
        cls,
        model: Teacher,
        conditioning: NativeConditioning,
        dataset: str,
        width: int,
        height: int,
        frames: int,
        samples_per_prompt: int,
        seed: int,
        teacher_steps: int,
        keep: int,
        batch_size: int,
        dtype: str = "bfloat16",
        negative: NativeConditioning | None = None,
        cfg: float = 0.0,
        shift: float = 0.0,
        speed: Speed | None = None,
    ) -> io.NodeOutput:
        from ..accvideo_core.trajectories.record import RecordSpec, record

        check_exact(speed)

        against, scale = guidance_for(model, negative, cfg)
        spec = RecordSpec(
            frames=frames,
            height=height,
            width=width,
            samples_per_prompt=samples_per_prompt,
            seed=seed,
            steps=teacher_steps or None,
            kept=keep,
            batch_size=batch_size,
            dtype=dtype,
            cfg=scale,
            shift=shift or None,
        )
        folder = paths.dataset_folder(dataset)
        prompts = from_native(conditioning, model.model)
        with at_speed(model, model.model, speed):
            monitor = NodeMonitor(previewer(model))
            recorded = record(model.model, prompts, spec, folder, monitor, against)
        paths.note_recorded(dataset)
        return io.NodeOutput(recorded)


def _record_inputs() -> list[io.Input]:
    return [
        AccVideoModel.Input("model", tooltip="The teacher."),
        io.Conditioning.Input(
            "conditioning", tooltip="The prompts: one entry each. Hundreds make a useful dataset."
        ),
        dataset_name("my_dataset", "Recording"),
        *video_size(),
        io.Int.Input(
            "samples_per_prompt",
            default=1,
            min=1,
            max=1000,
            tooltip="Clips recorded of every prompt, each from its own noise.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=False,
            tooltip="Seed of the dataset. A record's noise follows from seed, prompt and sample.",
        ),
        io.Int.Input(
            "teacher_steps",
            default=0,
            min=0,
            max=1000,
            tooltip="Denoising steps of the teacher. 0 is the model's own (HunyuanVideo: 50).",
        ),
        io.Int.Input(
            "keep",
            default=10,
            min=1,
            max=1000,
            tooltip="How many steps of the way are kept, beside the noise. Students can have this "
            "many steps or any divisor: 10 serves students of 10, 5, 2 and 1 steps.",
        ),
        io.Int.Input(
            "batch_size", default=1, min=1, max=1024, tooltip="Clips denoised at the same time."
        ),
        stored_dtype(),
        *guidance_inputs(),
        time_shift(),
        speed_input(
            "Speed Settings that change no result but by rounding: attention, compile, "
            "cuda_graphs, swap_blocks. Without them every byte is as it always was."
        ),
    ]


class AccVideoLoadDataset(io.ComfyNode):
    """A dataset that was recorded earlier."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoLoadDataset",
            display_name="Load Trajectory Dataset",
            category=CATEGORY,
            description="Open a dataset that was recorded earlier, to train from it again.",
            search_aliases=["SynVid", "distillation", "dataset", "trajectory"],
            inputs=[
                io.Combo.Input(
                    "dataset",
                    options=[paths.NEWEST, *paths.dataset_names()],
                    default=paths.NEWEST,
                    tooltip="A recorded dataset in ComfyUI's datasets folder; (newest) is the one "
                    "that was begun last.",
                )
            ],
            outputs=[AccVideoDataset.Output("dataset", tooltip="The recorded dataset.")],
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, dataset: str) -> bool | str:
        return paths.complaint(paths.existing_dataset, dataset)

    @classmethod
    def fingerprint_inputs(cls, dataset: str) -> str:
        return paths.dataset_fingerprint(dataset)

    @classmethod
    def execute(cls, dataset: str) -> io.NodeOutput:
        from ..accvideo_core.trajectories.store import TrajectoryDataset

        return io.NodeOutput(TrajectoryDataset.open(paths.existing_dataset(dataset)))

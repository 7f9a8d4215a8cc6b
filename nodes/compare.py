"""The node that sets teacher and students side by side, with figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from comfy_api.latest import io

from . import paths
from .devices import on_device
from .guidance import guidance_for, guidance_inputs
from .monitor import NodeMonitor
from .previews import previewer
from .reports import shown_report
from .sockets import (
    AccVideoModel,
    AccVideoStudent,
    NativeConditioning,
    StudentHandle,
    from_native,
)
from .speed import speed_input, waiting_modules

if TYPE_CHECKING:
    from ..accvideo_core.evaluate.compare import Contender
    from ..accvideo_core.guidance import Guided
    from ..accvideo_core.models.loading import Teacher
    from ..accvideo_core.models.video_model import VideoModel
    from ..accvideo_core.speed import Speed


class AccVideoCompare(io.ComfyNode):
    """Teacher against student on the same prompts and noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoCompare",
            display_name="Compare With Teacher",
            category="AccVideo/evaluate",
            description="Sample teacher and students with the same prompts and noise, and write "
            "videos, a contact sheet, loss curves and a report to output/accvideo/<name>.",
            search_aliases=["evaluate", "quality", "metrics", "FVD", "side by side", "report"],
            inputs=_inputs(),
            outputs=[
                io.Image.Output("sheet", tooltip="The contact sheet."),
                io.String.Output("table", tooltip="The figures as a table of text."),
            ],
            is_output_node=True,
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        return paths.complaint(paths.report_folder, name)

    @classmethod
    def execute(
        cls,
        model: Teacher,
        student: StudentHandle,
        conditioning: NativeConditioning,
        name: str,
        count: int,
        seed: int,
        batch_size: int,
        fps: float,
        tuned: StudentHandle | None = None,
        samples_per_prompt: int = 2,
        real_clips: int = 1024,
        negative: NativeConditioning | None = None,
        cfg: float = 0.0,
        speed: Speed | None = None,
    ) -> io.NodeOutput:
        from ..accvideo_core.evaluate.compare import compare
        from ..accvideo_core.evaluate.publish import publish
        from ..accvideo_core.guidance import Guided, guided
        from ..accvideo_core.speed import check_exact

        check_exact(speed)
        folder = paths.report_folder(name)
        students = {"student": student} | ({"tuned": tuned} if tuned else {})
        against, scale = guidance_for(model, negative, cfg)
        asked = guided(model.model, against, scale, "auto" if speed is None else speed.cfg_batch)
        networks = [handle.student.model for handle in students.values()]
        waiting = waiting_modules([model.model, *networks], model.model, speed)
        with on_device(model, *(network.module for network in networks), waiting=waiting):
            report = compare(
                model,
                _contenders(asked, students),
                prompts=from_native(conditioning, model.model)[:count],
                seed=seed,
                batch_size=batch_size,
                monitor=NodeMonitor(previewer(model)),
                real_clips=real_clips,
                samples_per_prompt=samples_per_prompt,
                asked=asked if isinstance(asked, Guided) else None,
                speed=speed,
            )
        curves = {path.parent.name: path for each in students.values() for path in each.metrics}
        files = publish(report, folder, curves=curves, fps=fps)
        return shown_report([path for path in files if path.suffix == ".png"], report.table())


def _inputs() -> list[io.Input]:
    return [
        AccVideoModel.Input("model", tooltip="The teacher."),
        AccVideoStudent.Input("student", tooltip="The student."),
        io.Conditioning.Input(
            "conditioning",
            tooltip="Prompts to compare on. Exact figures (prompt accuracy, Frechet distance) need "
            "prompts of the embedded teacher's world.",
        ),
        io.String.Input(
            "name",
            default="my_comparison",
            tooltip="Folder in output/accvideo that everything is written to.",
        ),
        io.Int.Input(
            "count",
            default=64,
            min=1,
            max=100_000,
            tooltip="How many of the prompts are used, from the first. Figures need about 64 and "
            "more, 256 for a verdict; a handful is enough to look at.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=False,
            tooltip="Seed of the noise, the same for all. Choose another one than the dataset's.",
        ),
        io.Int.Input(
            "batch_size", default=1, min=1, max=1024, tooltip="Videos sampled at the same time."
        ),
        io.Float.Input(
            "fps",
            default=24.0,
            min=1.0,
            max=120.0,
            step=1.0,
            tooltip="Frames per second of the videos.",
        ),
        *_optional_inputs(),
    ]


def _optional_inputs() -> list[io.Input]:
    return [
        AccVideoStudent.Input(
            "tuned", optional=True, tooltip="A second student, after adversarial tuning."
        ),
        io.Int.Input(
            "samples_per_prompt",
            default=2,
            min=1,
            max=100,
            optional=True,
            advanced=True,
            tooltip="Videos of every prompt; diversity needs at least 2.",
        ),
        io.Int.Input(
            "real_clips",
            default=1024,
            min=2,
            max=100_000,
            optional=True,
            advanced=True,
            tooltip="Real clips that the Frechet distance is taken to (embedded teacher only).",
        ),
        *guidance_inputs(),
        speed_input("From Speed Settings: how teacher and students compute; exact ones only."),
    ]


def _contenders(
    asked: VideoModel | Guided, students: Mapping[str, StudentHandle]
) -> list[Contender]:
    """The teacher at every student's number of steps, then the students at their own times."""
    from ..accvideo_core.evaluate.compare import Contender

    times = {name: handle.student.key_times for name, handle in students.items()}
    grids = {len(grid) - 1: grid for grid in times.values()}
    teachers = [Contender(f"teacher@{steps}", asked, grid) for steps, grid in grids.items()]
    return teachers + [
        Contender(f"{name}@{len(times[name]) - 1}", handle.student, times[name])
        for name, handle in students.items()
    ]

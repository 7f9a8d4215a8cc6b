"""Nodes that keep students: one safetensors file each, with its recipe and key times inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from . import paths
from .sockets import AccVideoModel, AccVideoStudent, StudentHandle

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher

CATEGORY = "AccVideo/student"
LAYOUTS = {
    "LoRA for ComfyUI": ("loras", "native", "lora"),
    "checkpoint for ComfyUI": ("diffusion_models", "native", "full"),
    "LoRA for diffusers": ("output", "diffusers", "lora"),
    "folder for diffusers": ("diffusers", "diffusers", "full"),
}
"""Choice -> where it is written, whose names it has, and what it holds."""


class AccVideoSaveStudent(io.ComfyNode):
    """A student as one file in models/accvideo."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoSaveStudent",
            display_name="Save Student",
            category=CATEGORY,
            description="Save a student to models/accvideo as one .safetensors file. Key times, "
            "guidance and recipe are in its header, so loading it is enough to sample it right.",
            search_aliases=["save LoRA", "export", "few-step", "distillation", "turbo"],
            inputs=[
                AccVideoStudent.Input("student", tooltip="The trained student."),
                io.String.Input(
                    "name", default="my_student", tooltip="File name, without .safetensors."
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace a student of this name. Otherwise the new one gets a number.",
                ),
            ],
            outputs=[io.String.Output("file", tooltip="Name of the file that was written.")],
            is_output_node=True,
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        return paths.complaint(lambda name: paths.new_student_file(name, True), name)

    @classmethod
    def execute(cls, student: StudentHandle, name: str, overwrite: bool) -> io.NodeOutput:
        from ..accvideo_core.export import save_student

        path = save_student(student.student, paths.new_student_file(name, overwrite))
        return io.NodeOutput(path.name, ui={"text": [f"Saved {path.name}"]})


class AccVideoExportStudent(io.ComfyNode):
    """A student as a file that ComfyUI's own loaders, or diffusers, take."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoExportStudent",
            display_name="Export Student",
            category=CATEGORY,
            description="Write a student for ComfyUI's own loaders (a LoRA into models/loras, a "
            "checkpoint into models/diffusion_models) or for diffusers (a LoRA into "
            "output/accvideo/export, a folder into models/diffusers). Wan 2.2 A14B gives a "
            "high-noise and a low-noise file.",
            search_aliases=["export", "save LoRA", "save checkpoint", "merge", "few-step", "fp8"],
            inputs=[
                AccVideoStudent.Input("student", tooltip="The trained student."),
                io.String.Input("name", default="my_student", tooltip="Name, without a suffix."),
                io.Combo.Input(
                    "layout",
                    options=list(LAYOUTS),
                    default="LoRA for ComfyUI",
                    tooltip="A LoRA goes onto the teacher's own checkpoint; a checkpoint is the "
                    "teacher and the student in one.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["bfloat16", "float16", "float32", "fp8"],
                    default="bfloat16",
                    tooltip="Number format on disk. fp8 is for checkpoints for ComfyUI.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Compress the LoRA to this rank (SVD); the error is written on the "
                    "node. 0 is exact.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    tooltip="Replace files of this name. Otherwise the new ones get a number.",
                ),
            ],
            outputs=[io.String.Output("file", tooltip="Names of the files, one per line.")],
            is_output_node=True,
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        return paths.complaint(lambda name: paths.export_path("loras", name, True), name)

    @classmethod
    def execute(
        cls,
        student: StudentHandle,
        name: str,
        layout: str,
        dtype: str,
        rank: int = 0,
        overwrite: bool = False,
    ) -> io.NodeOutput:
        from ..accvideo_core.export import export_student

        place, names, what = LAYOUTS[layout]
        teacher = student.teacher
        if place == paths.NETWORKS and teacher.model.family.whole_file is not None:
            place = paths.CHECKPOINTS  # where its loader looks, which takes VAE and encoder too
        path = paths.export_path(place, name, overwrite)
        result = export_student(
            student.student, path, layout=names, what=what, dtype=dtype, rank=rank or None,
            pipeline=teacher.folder if teacher.has_text_encoders else None,
        )  # fmt: skip
        return io.NodeOutput(
            "\n".join(each.name for each in result.files), ui={"text": [result.summary()]}
        )


class AccVideoLoadStudent(io.ComfyNode):
    """A saved student, on its teacher."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoLoadStudent",
            display_name="Load Student",
            category=CATEGORY,
            description="Load a student from models/accvideo onto the teacher it was made from.",
            search_aliases=["load LoRA", "few-step", "distillation", "turbo"],
            inputs=[
                AccVideoModel.Input("model", tooltip="The teacher that the student was made from."),
                io.Combo.Input(
                    "student",
                    options=[paths.NEWEST, *paths.student_names()],
                    default=paths.NEWEST,
                    tooltip="A student's file in models/accvideo; (newest) is the one saved last.",
                ),
            ],
            outputs=[AccVideoStudent.Output("student", tooltip="The student, with its key times.")],
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, student: str) -> bool | str:
        return paths.complaint(paths.student_file, student)

    @classmethod
    def fingerprint_inputs(cls, student: str, **_: object) -> str:
        return paths.fingerprint(paths.student_file(student))

    @classmethod
    def execute(cls, model: Teacher, student: str) -> io.NodeOutput:
        from ..accvideo_core.export import load_student

        loaded = load_student(paths.student_file(student), model.model)
        return io.NodeOutput(StudentHandle(loaded, model))

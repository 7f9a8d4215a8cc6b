"""Nodes that keep students: one safetensors file each, with its recipe and key times inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from . import paths
from .sockets import AccVideoModel, AccVideoStudent, StudentHandle

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher

CATEGORY = "AccVideo/student"


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

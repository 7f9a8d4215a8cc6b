"""Students as files: one `.safetensors` that knows how it wants to be sampled.

A LoRA student is written under diffusers' own names ("transformer.<layer>.lora_A.weight"), so
diffusers' `load_lora_weights` takes the file as it is; a full student is the network's state dict.
The header carries `StudentInfo`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from .distill.student import Student, StudentInfo
from .errors import AccVideoError
from .files import read_metadata, read_safetensors, write_safetensors
from .models.video_model import VideoModel

_LORA_PREFIX = "transformer."


def save_student(student: Student, path: Path) -> Path:
    """Write `student` to `path` (suffix .safetensors), whole or not at all; returns the path."""
    if path.suffix != ".safetensors":
        raise AccVideoError(f"student file {path.name!r} must end in .safetensors; rename it")
    info, state = student.info, student.state_dict()
    if info.lora is not None:
        # Readers without our header take alpha = rank, so the scale goes into B.
        state = {_LORA_PREFIX + n: _scaled(n, x, info.lora.scale) for n, x in state.items()}
        info = replace(info, lora=replace(info.lora, alpha=None))
    write_safetensors(path, state, {"format": "pt", **info.as_metadata()})
    return path


def read_student_info(path: Path) -> StudentInfo:
    """How a student file wants to be used, without reading its weights.

    Raises:
        AccVideoError: the file is missing, truncated, or not a student of ours.
    """
    return _info(path, read_metadata(path))


def load_student(path: Path, teacher: VideoModel) -> Student:
    """The student in `path` on the weights of `teacher`.

    Raises:
        AccVideoError: as `read_student_info`; or the file is damaged, or `teacher` is not the one
            that the student was trained on.
    """
    tensors, metadata = read_safetensors(path)
    info = _info(path, metadata)
    _check_base(path, info, teacher)
    if info.lora is not None:
        tensors = {name.removeprefix(_LORA_PREFIX): x for name, x in tensors.items()}
    student = Student.create(teacher, info)
    student.load_state_dict(tensors)
    return student


def _info(path: Path, metadata: dict[str, str]) -> StudentInfo:
    try:
        return StudentInfo.from_metadata(metadata)
    except AccVideoError as error:
        raise AccVideoError(f"{path} cannot be loaded as a student: {error}") from error


def _check_base(path: Path, info: StudentInfo, teacher: VideoModel) -> None:
    if info.family != teacher.family.name:
        raise AccVideoError(
            f"student {path.name!r} is a {info.family} student, but the teacher is a "
            f"{teacher.family.name}; load a {info.family} teacher"
        )
    if info.base != teacher.fingerprint:
        raise AccVideoError(
            f"student {path.name!r} was trained on another teacher ({info.base}) than "
            f"{teacher.source or 'this one'} ({teacher.fingerprint}); load the teacher it came from"
        )


def _scaled(name: str, x: Tensor, scale: float) -> Tensor:
    return x * scale if ".lora_B." in name else x

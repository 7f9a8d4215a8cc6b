"""Reading students back from every layout that `export.py` writes.

Shapes: A [r, in], B [out, r] of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .distill.student import Student, StudentInfo
from .errors import AccVideoError
from .files import read_metadata, read_safetensors
from .models.experts import Experts, networks_of
from .models.keys.spelling import canonical, is_companion
from .models.keys.table import KeyTable
from .models.lora_file import EXPERT_KEY, LOW_PREFIX, resolve
from .models.lora_layout import split
from .models.video_model import VideoModel

_NOISE = {"high": "_high_noise", "low": "_low_noise"}
_A, _B = ".lora_A.weight", ".lora_B.weight"


def read_student_info(path: Path) -> StudentInfo:
    """How a student wants to be used, without reading its weights.

    Raises:
        AccVideoError: it is missing, truncated, or not a student of ours.
    """
    path = Path(path)
    first = next(iter(_parts(path).values()))[0]
    return _info(path, read_metadata(first))


def load_student(path: Path, teacher: VideoModel, onto: Student | None = None) -> Student:
    """The student in `path` (a file, one of a pair or their common name, or a diffusers folder) on
    the weights of `teacher`; or `onto` a student of that teacher and size, whose values change.

    Raises:
        AccVideoError: as `read_student_info`; or it is damaged, or `teacher` is not the one that
            the student was trained on.
    """
    path = Path(path)
    parts = _parts(path)
    info = read_student_info(path)
    _check_base(path, info, teacher)
    student = Student.create(teacher, info) if onto is None else replace(onto, info=info)
    read = _weights if info.lora is None else _adapters
    state: dict[str, Tensor] = {}
    for expert, files in parts.items():
        tensors: dict[str, Tensor] = {}
        for file in files:
            found, metadata = read_safetensors(file)
            if _info(file, metadata) != info:
                raise AccVideoError(f"{file.name} and its pair are two students; export them again")
            tensors |= found
        for name, own in _by_expert(tensors, expert, student).items():
            state |= read(path, own, student, name)
    student.load_state_dict(state)
    return student


def table_of(model: VideoModel, network: nn.Module) -> KeyTable:
    """The names of one network of `model`."""
    return model.family.key_table(dict(network.config))  # type: ignore[arg-type]


def pair_of(path: Path) -> dict[str, Path]:
    """Expert's name -> its file, for a name that the two have in common."""
    return {expert: path.with_stem(path.stem + noise) for expert, noise in _NOISE.items()}


def _parts(path: Path) -> dict[str, list[Path]]:
    """Expert's name ("" for everything) -> the files that hold it."""
    if path.is_dir():
        names = {"": "unet" if (path / "unet").is_dir() else "transformer"}
        if (path / "transformer_2").is_dir():
            names = {"high": "transformer", "low": "transformer_2"}
        found = {e: sorted((path / name).glob("*.safetensors")) for e, name in names.items()}
        if not all(found.values()):
            raise AccVideoError(f"{path} is a folder without a student; choose a student's file")
        return found
    pair = pair_of(path)
    if path.exists() or not all(file.exists() for file in pair.values()):
        expert = read_metadata(path).get(EXPERT_KEY)
        if expert not in _NOISE:
            return {"": [path]}
        pair = pair_of(path.with_stem(path.stem.removesuffix(_NOISE[expert])))
    missing = [file.name for file in pair.values() if not file.exists()]
    if missing:
        raise AccVideoError(
            f"{path.name!r} is one of two experts and {missing[0]!r} is missing; put the other "
            "beside it under that name"
        )
    return {expert: [file] for expert, file in pair.items()}


def _by_expert(
    tensors: dict[str, Tensor], expert: str, student: Student
) -> dict[str, dict[str, Tensor]]:
    """A part's tensors for each expert; one file of ours may hold both."""
    if expert or not isinstance(student.model.module, Experts):
        return {expert: tensors}
    both: dict[str, dict[str, Tensor]] = {"high": {}, "low": {}}
    for name, x in tensors.items():
        both["low" if name.startswith((LOW_PREFIX, "low.")) else "high"][name] = x
    return both


def _adapters(
    path: Path, tensors: Mapping[str, Tensor], student: Student, expert: str
) -> dict[str, Tensor]:
    """What is trained of one expert, from adapters under native or diffusers' names."""
    table = table_of(student.model, networks_of(student.model.module)[expert])
    prefix = f"{expert}." if expert else ""
    own = {name: p for name, p in student.trainable().items() if name.startswith(prefix)}
    layers = {n.removeprefix(prefix).removesuffix(_A) for n in own if n.endswith(_A)}
    pairs = {n.removesuffix(_A): x for n, x in tensors.items() if n.endswith(_A)}
    places = resolve(pairs, table)
    state = {}
    for name, a in pairs.items():
        b = tensors.get(name + _B)
        if b is None or name not in places:
            raise _foreign(path, name)
        naming, layer = places[name]
        found = split(table, layer, a, b, layers) if naming == "native" else {layer: (a, b)}
        for part, factors in found.items():
            for ending, x, dim in zip((_A, _B), factors, (0, 1), strict=True):
                state[prefix + part + ending] = _widened(x, own.get(prefix + part + ending), dim)
    return state


def _widened(x: Tensor, like: Tensor | None, dim: int) -> Tensor:
    """A factor with the student's rank: the rest of A stays as it was made, the rest of B zero."""
    if like is None or x.shape[dim] >= like.shape[dim]:
        return x
    rest = like.detach().narrow(dim, x.shape[dim], like.shape[dim] - x.shape[dim])
    return torch.cat([x.to(rest), rest], dim)


def _weights(
    path: Path, tensors: Mapping[str, Tensor], student: Student, expert: str
) -> dict[str, Tensor]:
    """What is trained of one expert, from whole weights under native or diffusers' names."""
    network = networks_of(student.model.module)[expert]
    prefix = f"{expert}." if expert else ""
    own = {name.removeprefix(prefix): p for name, p in student.trainable().items()
           if name.startswith(prefix)}  # fmt: skip
    given = {name.removeprefix(prefix): x for name, x in tensors.items()}
    if not given.keys() <= network.state_dict().keys():
        native = {name: given[key] for key, name in canonical(given).items()}
        given = _from_native(path, native, table_of(student.model, network))
        # What native names have no place for is read by no network.
        read = canonical(own)
        given |= {name: p for name, p in own.items() if name not in read}
    return {prefix + name: x for name, x in given.items() if name in own}


def _from_native(path: Path, tensors: Mapping[str, Tensor], table: KeyTable) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if is_companion(name):
            continue
        scale = tensors.get(f"{name.removesuffix('.weight')}.scale_weight")
        x = x.float() if scale is None else x.float() * scale
        try:
            found |= dict(table.to_diffusers(name, x))
        except KeyError as error:
            raise _foreign(path, name) from error
    return found


def _foreign(path: Path, name: str) -> AccVideoError:
    return AccVideoError(f"{path.name} has {name!r}, which its teacher has not; export it again")


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

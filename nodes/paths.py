"""Where things lie in ComfyUI: teachers, datasets, runs, students, reports. All chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import folder_paths

from ..accvideo_core.embedded import TINY, TINY_SVD
from ..accvideo_core.errors import AccVideoError
from ..accvideo_core.names import child

EMBEDDED = "tiny (embedded)"
EMBEDDED_IMAGE = "tiny image to video (embedded)"
_SHIPPED = {EMBEDDED: TINY, EMBEDDED_IMAGE: TINY_SVD}
NEWEST = "(newest)"
"""Choice that means the dataset or student made last; with it a workflow fits any machine."""

NONE = "(none)"

NETWORKS = "diffusion_models"
"""Key of ComfyUI's folders of networks; models/unet is one of them."""

CHECKPOINTS = "checkpoints"
"""Key of ComfyUI's folders of files that hold VAE and encoders beside the network."""

DECODERS = "vae_approx"
"""Key of ComfyUI's folder of small networks that stand in for VAEs."""

STUDENTS = "accvideo"
"""Key of our folder among ComfyUI's model folders, and its name in models/."""

METRICS = "accvideo_metrics"
"""Key of the folder of networks that figures need, and its name in models/."""

_recorded: set[str] = set()


def register_folders() -> None:
    """Make our folders in models/ known, so that extra_model_paths.yaml can add to them."""
    for key in (STUDENTS, METRICS):
        folder_paths.add_model_folder_path(key, str(Path(folder_paths.models_dir) / key))


def teacher_names() -> list[str]:
    """What can be a teacher: diffusers folders, the files of models/diffusion_models, and those of
    models/checkpoints with that folder's name before theirs.
    """
    whole = [f"{CHECKPOINTS}/{name}" for name in _checkpoints()]
    return [*teacher_folders(), *model_files(), *whole]


def teacher_folders() -> list[str]:
    """Names of the diffusers pipelines below models/diffusers, / between folders."""
    found = set()
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        # A pipeline lies at most one folder deep (author/model): no walk through its weights.
        for pattern in ("*/model_index.json", "*/*/model_index.json"):
            found |= {path.parent.relative_to(root).as_posix() for path in root.glob(pattern)}
    return sorted(found)


def model_files() -> list[str]:
    """Names of the networks in models/diffusion_models and models/unet, GGUF files among them."""
    names = set(folder_paths.get_filename_list(NETWORKS))
    # ComfyUI itself does not list GGUF files.
    for root in map(Path, folder_paths.get_folder_paths(NETWORKS)):
        names |= {path.relative_to(root).as_posix() for path in root.rglob("*.gguf")}
    return sorted(name.replace("\\", "/") for name in names)


def teacher_source(name: str) -> Path:
    """The folder or file of a teacher that `teacher_names` lists, or the embedded one's."""
    if name in _SHIPPED:
        return _SHIPPED[name].path
    name = name.replace("\\", "/")
    if name in teacher_folders():
        roots = map(Path, folder_paths.get_folder_paths("diffusers"))
        return next(root / name for root in roots if (root / name / "model_index.json").is_file())
    if name in model_files():
        return _model_file(name)
    place, _, file = name.partition("/")
    if place == CHECKPOINTS and file in _checkpoints():
        return Path(str(folder_paths.get_full_path(CHECKPOINTS, file)))
    raise AccVideoError(
        f"there is no teacher {name!r}; put a diffusers pipeline folder (with a model_index.json) "
        "into models/diffusers or a checkpoint into models/diffusion_models (Stable Video "
        f"Diffusion: models/checkpoints), or choose {EMBEDDED!r}"
    )


def _checkpoints() -> list[str]:
    """Files of models/checkpoints, networks together with VAE and encoders."""
    return sorted(x.replace("\\", "/") for x in folder_paths.get_filename_list(CHECKPOINTS))


def network_file(name: str) -> Path:
    """The file of a network that `model_files` lists."""
    if name.replace("\\", "/") not in model_files():
        raise AccVideoError(
            f"there is no checkpoint {name!r}; put it into models/diffusion_models and refresh"
        )
    return _model_file(name)


def lora_names() -> list[str]:
    """Names of the files in models/loras."""
    return folder_paths.get_filename_list("loras")


def lora_file(name: str) -> Path:
    """The file of a LoRA that `lora_names` lists."""
    return _listed_file("loras", name, "LoRA")


def decoder_names() -> list[str]:
    """Names of the files in models/vae_approx."""
    return folder_paths.get_filename_list(DECODERS)


def decoder_file(name: str) -> Path:
    """The file of a decoder that `decoder_names` lists."""
    return _listed_file(DECODERS, name, "decoder")


def metric_names() -> list[str]:
    """Names of the files in models/accvideo_metrics."""
    return folder_paths.get_filename_list(METRICS)


def metric_file(name: str) -> Path:
    """The file of a network that `metric_names` lists."""
    return _listed_file(METRICS, name, "file")


def _listed_file(kind: str, name: str, what: str) -> Path:
    """A file that ComfyUI lists in one of its folders of models."""
    listed = name in folder_paths.get_filename_list(kind)
    found = folder_paths.get_full_path(kind, name) if listed else None
    if found is None:
        raise AccVideoError(
            f"there is no {what} {name!r} in models/{kind}; put it there and refresh"
        )
    return Path(found)


def video_folder(name: str) -> Path:
    """A folder of videos by its place in ComfyUI's output or input folder, / between folders."""
    for root in (folder_paths.get_output_directory(), folder_paths.get_input_directory()):
        folder = Path(root)
        for part in name.replace("\\", "/").split("/"):
            folder = child(folder, part, "folder")
        if folder.is_dir():
            return folder
    raise AccVideoError(
        f"there is no folder {name!r} in ComfyUI's output or input folder; name one there, such "
        "as video/teacher"
    )


def input_folder(name: str) -> Path:
    """A folder in ComfyUI's input folder, there or not."""
    return child(Path(folder_paths.get_input_directory()), name, "folder")


def _model_file(name: str) -> Path:
    roots = map(Path, folder_paths.get_folder_paths(NETWORKS))
    return next(root / name for root in roots if (root / name).is_file())


def dataset_names() -> list[str]:
    """Names of the recorded datasets."""
    return sorted({p.parent.name for root in _dataset_roots() for p in root.glob("*/dataset.json")})


def dataset_folder(name: str) -> Path:
    """The folder a dataset is recorded into: the one that is there, or a new one's."""
    folders = [child(root, name, "dataset") for root in _dataset_roots()]
    return next((folder for folder in folders if folder.exists()), folders[0])


def existing_dataset(name: str) -> Path:
    """The folder of a dataset that was recorded earlier."""
    names = dataset_names()
    if name == NEWEST and names:
        return _newest([dataset_folder(each) / "dataset.json" for each in names]).parent
    folder = dataset_folder(name)
    if not (folder / "dataset.json").is_file():
        raise AccVideoError(
            f"there is no dataset {name!r}; record one first, or choose one of: {_listed(names)}"
        )
    return folder


def run_folder(name: str) -> Path:
    """The folder of a training run."""
    return child(_output() / "runs", name, "run")


def report_folder(name: str) -> Path:
    """The folder of a comparison."""
    if name in ("runs", "datasets"):
        raise AccVideoError(f"the name {name!r} is taken by AccVideo itself; choose another")
    return child(_output(), name, "name")


def student_names() -> list[str]:
    """File names of the saved students."""
    return [n for n in folder_paths.get_filename_list(STUDENTS) if n.endswith(".safetensors")]


def student_file(name: str) -> Path:
    """The file of a saved student."""
    names = student_names()
    if name == NEWEST and names:
        return _newest([student_file(each) for each in names])
    found = folder_paths.get_full_path(STUDENTS, name) if name in names else None
    if found is None:
        raise AccVideoError(
            f"there is no student {name!r} in models/{STUDENTS}; save one first, or choose one of: "
            f"{_listed(names)}"
        )
    return Path(found)


def new_student_file(name: str, overwrite: bool) -> Path:
    """Where a student is saved: `name`, or the first free `name_2`, `name_3`, ..."""
    root = Path(folder_paths.get_folder_paths(STUDENTS)[0])
    stem = name.removesuffix(".safetensors")
    path = child(root, f"{stem}.safetensors", "student")
    number = 2
    while path.exists() and not overwrite:
        path = child(root, f"{stem}_{number}.safetensors", "student")
        number += 1
    return path


def export_path(place: str, name: str, overwrite: bool) -> Path:
    """Where an export goes: a file (or, in models/diffusers, a folder) `name`, `name_2`, ...

    `place` is a key of ComfyUI's model folders, or "output".
    """
    if place == "output":
        root = _output() / "export"
    else:
        root = Path(folder_paths.get_folder_paths(place)[0])
    stem = name.removesuffix(".safetensors")
    suffix = "" if place == "diffusers" else ".safetensors"
    path = child(root, f"{stem}{suffix}", "export")
    number = 2
    # A model of two experts becomes two files that begin with the name.
    while not overwrite and (path.exists() or any(root.glob(f"{path.stem}_*_noise{suffix}"))):
        path = child(root, f"{stem}_{number}{suffix}", "export")
        number += 1
    return path


def complaint(resolve: Callable[[str], object], name: str | None) -> bool | str:
    """For `validate_inputs`: True, or why `name` cannot be used. A linked name is not known yet."""
    try:
        if name is not None:
            resolve(name)
    except AccVideoError as error:
        return str(error)
    return True


def fingerprint(*files: Path) -> str:
    """For `fingerprint_inputs`: changes when a file or a folder's list of files does."""
    return " ".join(f"{path} {path.stat().st_mtime_ns}" for path in files if path.exists())


def dataset_fingerprint(name: str) -> str:
    """For `fingerprint_inputs`: changes when records are added to the dataset or removed."""
    folder = existing_dataset(name)
    return fingerprint(folder / "dataset.json", *sorted((folder / "records").glob("??")))


def note_recorded(name: str) -> None:
    """Remember that this process has recorded the dataset."""
    _recorded.add(name)


def recorded_before(name: str) -> float:
    """For `fingerprint_inputs`: equal to itself unless a recorded dataset has been deleted since.

    A NaN makes ComfyUI record again instead of handing out its cached result.
    """
    gone = name in _recorded and not (dataset_folder(name) / "dataset.json").is_file()
    return float("nan") if gone else 0.0


def _newest(files: list[Path]) -> Path:
    return max(files, key=lambda path: path.stat().st_mtime_ns)


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none yet"


def _output() -> Path:
    return Path(folder_paths.get_output_directory()) / "accvideo"


def _dataset_roots() -> list[Path]:
    """ComfyUI's datasets folders, where it has them (0.30 and later), else one in the output."""
    if "datasets" in folder_paths.folder_names_and_paths:
        return [Path(root) / "accvideo" for root in folder_paths.get_folder_paths("datasets")]
    return [_output() / "datasets"]

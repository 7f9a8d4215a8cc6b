"""A diffusers pipeline folder: its index, its parts, and one sentence for each way it can be wrong.

Nothing is fetched: a folder is complete or it is refused.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import AccVideoError
from .building import Network
from .checkpoint import open_checkpoint
from .video_model import Family

INDEX = "model_index.json"
NETWORKS = ("transformer", "transformer_2", "unet")
"""Folders of a pipeline's networks; of two, the first answers while there is much noise."""
_T = TypeVar("_T")


def is_pipeline(path: Path) -> bool:
    """Whether `path` is a pipeline folder, whole or not; AccVideoError when its index is gone."""
    if (path / INDEX).is_file():
        return True
    for name in NETWORKS:
        if (path / name).is_dir():
            raise AccVideoError(
                f"{str(path)!r} has no {INDEX}, so it is no complete diffusers pipeline folder; "
                f"download the model again, or choose its folder {name!r}"
            )
    return False


def open_networks(folder: Path) -> tuple[Family, list[Network]]:
    """The family of a folder that has every part its index names, and its networks, not loaded."""
    from . import family_of  # which knows families that read such folders

    parts = components(folder)
    names = [name for name in NETWORKS if name in parts]
    missing = [name for name in parts if not (folder / name).is_dir()]
    configs = [read_json(folder / name / "config.json") for name in names if name not in missing]
    family = family_of(
        parts[names[0]] if names else "none",
        configs[0] if configs else {},
        str(read_json(folder / INDEX).get("_class_name")),
        experts=max(1, len(names)),
    )
    if missing:
        raise AccVideoError(
            f"{str(folder)!r} lacks the folder {missing[0]!r} that its {INDEX} names; "
            "download the model again"
        )
    check_weights([folder / "vae"])
    return family, [
        Network(open_checkpoint(folder / name), diffusers_class(parts[name]), config)
        for name, config in zip(names, configs, strict=True)
    ]


def components(folder: Path) -> dict[str, str]:
    """Name -> class of every part that the folder's index lists."""
    index = read_json(folder / INDEX)
    named = {name: value for name, value in index.items() if isinstance(value, list)}
    return {name: str(value[1]) for name, value in named.items() if len(value) == 2 and value[1]}


def encoder_parts(folder: Path) -> list[Path]:
    """Folders of the text and image encoders and of their tokenizers and processors; or the file
    that holds everything.
    """
    if folder.is_file():
        return [folder]
    others = (*NETWORKS, "vae", "scheduler")
    return [folder / name for name in components(folder) if name not in others]


def load_text_pipeline(folder: Path, pipeline_class: str, dtype: torch.dtype) -> Any:
    """The folder's pipeline without its networks and its VAE."""
    parts = components(folder)
    check_weights([folder / name for name in parts if name not in NETWORKS])
    without = [name for name in ("vae", *NETWORKS) if name in parts]
    pipeline = _pipeline(folder, pipeline_class, without, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_tokenizer(folder: Path, pipeline_class: str) -> Any | None:
    """The tokenizer of the folder's text encoder, without the encoder; None without either."""
    parts = components(folder)
    if "tokenizer" not in parts:
        return None
    without = [name for name in parts if name != "tokenizer"]
    return _pipeline(folder, pipeline_class, without).tokenizer


def _pipeline(folder: Path, pipeline_class: str, without: Sequence[str], **options: Any) -> Any:
    """The folder's pipeline, of which the parts `without` are not loaded."""
    cls = diffusers_class(pipeline_class)
    return _reading(
        folder,
        lambda: cls.from_pretrained(
            folder,
            **dict.fromkeys(without),
            local_files_only=True,
            use_safetensors=True,
            **options,
        ),
    )


def load_component(folder: Path, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """The frozen diffusers model in a folder with a config.json."""
    config = read_json(folder / "config.json")
    cls = diffusers_class(str(config.get("_class_name")))
    check_weights([folder])
    # Parameters made inside inference mode could never be trained against.
    with torch.inference_mode(False):
        module, info = _reading(
            folder,
            lambda: cls.from_pretrained(
                folder,
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            ),
        )
        refuse_missing(folder, info["missing_keys"])
        return module.to(device).eval().requires_grad_(False)


def refuse_missing(path: Path, missing: Sequence[str]) -> None:
    """Raise AccVideoError when weights are missing, which would stay random."""
    if missing:
        raise AccVideoError(
            f"{str(path)!r} lacks {len(missing)} of the network's weights (such as "
            f"{', '.join(sorted(missing)[:3])}); download the model again"
        )


def check_weights(folders: Sequence[Path]) -> None:
    """Read the header of every safetensors file, so that a damaged one is named."""
    for path in sorted(path for folder in folders for path in folder.glob("*.safetensors")):
        open_checkpoint(path).close()


def diffusers_class(name: str) -> Any:
    """The class of diffusers called `name`."""
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None:
        raise AccVideoError(
            f"diffusers {diffusers.__version__} has no class {name!r}; update diffusers"
        )
    return cls


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object of a downloaded model."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AccVideoError(f"{str(path)!r} cannot be read; download the model again") from error
    except ValueError as error:
        raise AccVideoError(f"{str(path)!r} is not valid JSON; download it again") from error
    if not isinstance(value, dict):
        raise AccVideoError(f"{str(path)!r} is not a JSON object; download it again")
    return value


def _reading(path: Path, load: Callable[[], _T]) -> _T:
    """`load()`, with whatever the libraries say about a bad folder turned into one sentence."""
    try:
        with warnings.catch_warnings():
            # New diffusers call the argument dtype, old ones know only torch_dtype.
            warnings.simplefilter("ignore", FutureWarning)
            return load()
    except Exception as error:  # tokenizers raises the bare class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AccVideoError(
            f"{str(path)!r} could not be loaded ({reason}); check that the download is complete"
        ) from error

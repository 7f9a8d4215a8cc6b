"""Teacher: a diffusers pipeline folder as the recorder, the trainer and the nodes want it.

Nothing is fetched: a folder is complete or it is refused. The network is loaded at once; VAE and
text encoders, which need memory of their own, when they are first used.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..conditioning import Prompt
from ..errors import AccVideoError
from . import family_of
from .experts import Experts
from .vae import VideoVAE
from .video_model import Family, VideoModel

PROMPTS_AT_ONCE = 16
_NETWORKS = ("transformer", "transformer_2")
"""Folders of a pipeline's networks; of two, the first answers while there is much noise."""
_T = TypeVar("_T")


@dataclass(eq=False)
class Teacher:
    """A frozen network with what stands around it: text encoders and VAE, loaded when needed."""

    model: VideoModel
    folder: Path
    _text: Any = field(default=None, repr=False)
    _vae: VideoVAE | None = field(default=None, repr=False)

    def encode_prompts(self, texts: Sequence[str], guidance: float | None = None) -> list[Prompt]:
        """Texts -> prompts whose conditions are float32, trimmed and on the CPU.

        `guidance` is the embedded guidance to ask for; None is the family's default.
        """
        if not texts:
            raise AccVideoError("the list of prompts is empty; give at least one prompt")
        family, device = self.model.family, self.model.device
        scale = family.guidance if guidance is None else guidance
        prompts = []
        with torch.inference_mode(False), torch.no_grad():
            pipeline = self._text_pipeline().to(device)
            for start in range(0, len(texts), PROMPTS_AT_ONCE):
                part = list(texts[start : start + PROMPTS_AT_ONCE])
                conditions = family.encode(pipeline, part, device).to("cpu").split()
                for text, condition in zip(part, conditions, strict=True):
                    prompts.append(Prompt.of(text, condition.with_guidance(scale)))
            pipeline.to("cpu")  # the encoders of a large model would crowd the network out
        return prompts

    def encode_image(
        self, text: str, image: Tensor, frames: int, guidance: float | None = None
    ) -> Prompt:
        """A text and the image [H, W, 3] in [0, 1] that a video of `frames` begins with -> prompt.

        The image has the video's own height and width. Raises AccVideoError for sizes that do not
        fit the model, and for a model that takes no image.
        """
        family, device = self.model.family, self.model.device
        if family.encode_image is None:
            raise AccVideoError(
                f"{family.title or family.name} takes no image; leave the image out, or load an "
                "image-to-video model"
            )
        if image.dim() != 3 or image.shape[-1] != 3:
            raise AccVideoError(
                f"the image has shape {tuple(image.shape)}; expected [height, width, 3]"
            )
        self.model.latent_spec.shape(frames, *image.shape[:2])
        scale = family.guidance if guidance is None else guidance
        with torch.inference_mode(False), torch.no_grad():
            pipeline = self._text_pipeline().to(device)
            condition = family.encode_image(pipeline, self.vae, text, image, frames, device)
            pipeline.to("cpu")
        return Prompt.of(text, condition.to("cpu").with_guidance(scale))

    @property
    def vae(self) -> VideoVAE:
        """The folder's VAE, in float32 on the network's device."""
        if self._vae is None:
            module = _load_component(self.folder, "vae", self.model.device, torch.float32)
            self._vae = VideoVAE(module, self.model.latent_spec)
        return self._vae

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Teacher:
        """This teacher, its network moved in place (and its VAE, which stays float32)."""
        with torch.inference_mode(False):
            self.model.module.to(device=device, dtype=dtype)
            if self._vae is not None:
                self._vae.module.to(device)
        return self

    def _text_pipeline(self) -> Any:
        if self._text is None:
            parts = _components(self.folder)
            _check_weights(self.folder, list(parts))
            without = {name: None for name in ("vae", *_NETWORKS) if name in parts}
            cls = _diffusers_class(self.model.family.pipeline_class)
            self._text = _reading(
                self.folder,
                lambda: cls.from_pretrained(
                    self.folder,
                    **without,
                    torch_dtype=self.model.dtype,
                    local_files_only=True,
                    use_safetensors=True,
                ),
            )
            self._text.set_progress_bar_config(disable=True)
        return self._text


def load_teacher(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Teacher:
    """Load a diffusers pipeline folder, offline; the network is frozen and in eval mode.

    Raises:
        AccVideoError: the folder is missing, foreign, incomplete or damaged.
    """
    folder = Path(folder)
    family = _check_folder(folder)
    configs = [_read_json(folder / part / "config.json") for part in ("transformer", "vae")]
    networks = [
        _load_component(folder, name, device, dtype) for name in _NETWORKS[: family.experts]
    ]
    module = Experts(*networks) if family.experts == 2 else networks[0]
    spec = family.latent_spec(*configs)
    return Teacher(VideoModel(module, family, spec, source=folder.name), folder)


def _check_folder(folder: Path) -> Family:
    """The family of a folder that has every part its index names."""
    if not folder.exists():
        raise AccVideoError(f"teacher folder {str(folder)!r} does not exist; check the path")
    if not folder.is_dir():
        raise AccVideoError(
            f"{str(folder)!r} is a file; choose the diffusers pipeline folder (with its "
            "model_index.json), not a single checkpoint"
        )
    if not (folder / "model_index.json").is_file():
        raise AccVideoError(
            f"{str(folder)!r} has no model_index.json, so it is not a diffusers pipeline folder; "
            "choose the folder that holds model_index.json, transformer and vae"
        )
    index = _read_json(folder / "model_index.json")
    parts = _components(folder)
    config = _read_json(folder / "transformer" / "config.json") if "transformer" in parts else {}
    cls = str(parts.get("transformer", "none"))
    networks = [name for name in _NETWORKS if name in parts]
    family = family_of(cls, config, str(index.get("_class_name")), experts=max(1, len(networks)))
    missing = [name for name in parts if not (folder / name).is_dir()]
    if missing:
        raise AccVideoError(
            f"{str(folder)!r} lacks the folder {missing[0]!r} that its model_index.json names; "
            "download the model again"
        )
    _check_weights(folder, [*networks, "vae"])
    return family


def _components(folder: Path) -> dict[str, str]:
    """Name -> class of every part that the folder's index lists."""
    index = _read_json(folder / "model_index.json")
    named = {name: value for name, value in index.items() if isinstance(value, list)}
    return {name: value[1] for name, value in named.items() if len(value) == 2 and value[1]}


def _check_weights(folder: Path, names: Sequence[str]) -> None:
    """Open every safetensors file, so that a damaged one is named (its header tells its size)."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(path for name in names for path in (folder / name).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise AccVideoError(
                f"{str(path)!r} is damaged or cut short ({error}); download it again"
            ) from error


def _load_component(
    folder: Path, name: str, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """One frozen diffusers model of the folder."""
    from diffusers.utils import is_accelerate_available

    cls = _diffusers_class(_components(folder)[name])
    _check_weights(folder, [name])
    # Parameters made inside inference mode could never be trained against.
    with torch.inference_mode(False):
        module, info = _reading(
            folder / name,
            lambda: cls.from_pretrained(
                folder / name,
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=is_accelerate_available(),
                output_loading_info=True,
            ),
        )
        if info["missing_keys"]:
            raise AccVideoError(
                f"{str(folder / name)!r} lacks {len(info['missing_keys'])} of the network's "
                f"weights (such as {sorted(info['missing_keys'])[0]}); download the model again"
            )
        return module.to(device).eval().requires_grad_(False)


def _diffusers_class(name: str) -> Any:
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None:
        raise AccVideoError(
            f"diffusers {diffusers.__version__} has no class {name!r}; update diffusers"
        )
    return cls


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AccVideoError(f"{str(path)!r} cannot be read; download the model again") from error
    except ValueError as error:
        raise AccVideoError(f"{str(path)!r} is not valid JSON; download it again") from error
    if not isinstance(value, dict):
        raise AccVideoError(f"{str(path)!r} is not a JSON object; download it again")
    return value

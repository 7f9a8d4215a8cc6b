"""Teacher: a network with its text encoders and VAE, as recorder, trainer and nodes want it.

A teacher comes from a diffusers pipeline folder, from a folder or file of the network alone, or
from the two files of a pair of networks. The network is loaded at once; VAE and text encoders,
which need memory of their own, when they are first used. Nothing is fetched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Condition, Micro, Prompt
from ..errors import AccVideoError
from .building import Network
from .checkpoint import open_checkpoint
from .experts import Experts
from .pipeline_folder import (
    diffusers_class,
    encoder_parts,
    is_pipeline,
    load_text_pipeline,
    load_tokenizer,
    open_networks,
)
from .text_cache import TextCache, encoder_name
from .tiny_decoder import TinyDecoder, load_tiny_decoder
from .vae import VideoVAE
from .vae_file import load_vae, vae_config
from .vae_speed import fast_decoder
from .video_model import Family, VideoModel

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Teacher:
    """A frozen network with what stands around it: text encoders and VAE, loaded when needed."""

    model: VideoModel
    folder: Path
    """The pipeline folder; for a teacher without one, the (first) file it was loaded from."""
    sources: tuple[Path, ...] = ()
    """The folder or the files that were given."""
    vae_path: Path | None = None
    """Folder or file of the VAE, if there is one."""
    device: torch.device | None = None
    """Where text encoders and VAE compute; None is where the network is."""
    vae_dtype: torch.dtype = torch.float32
    """Number format that the VAE is loaded in."""
    micro: Micro = Micro()
    """What a family that takes it is told beside an image."""
    whole: bool = False
    """Whether `folder` is a file that holds encoders and VAE too."""
    text_cache: Path | None = None
    """Folder where encoded prompts are kept, and looked for before they are encoded."""
    _text: Any = field(default=None, repr=False)
    _vae: VideoVAE | None = field(default=None, repr=False)
    _tiny: dict[Path, TinyDecoder] = field(default_factory=dict, repr=False)
    _cache: TextCache | None = field(default=None, repr=False)

    def encode_prompts(self, texts: Sequence[str], guidance: float | None = None) -> list[Prompt]:
        """Texts -> prompts whose conditions are float32, trimmed and on the CPU.

        `guidance` is the embedded guidance to ask for; None is the family's default.
        """
        if not texts:
            raise AccVideoError("the list of prompts is empty; give at least one prompt")
        return list(self.encode_each(((text, None) for text in texts), guidance=guidance))

    def encode_each(
        self,
        given: Iterable[tuple[str, Tensor | None]],
        frames: int = 1,
        guidance: float | None = None,
    ) -> Iterator[Prompt]:
        """Texts, some with the image that a video of `frames` begins with -> prompts, one by one.

        Each is taken, and encoded, when it is asked for, and alone: its numbers never follow from
        its neighbours, so that they come out the same when only some are made again.
        """
        family, device = self.model.family, self.compute_device
        scale = family.guidance if guidance is None else guidance
        cache, pipeline = self._text_cache(), None

        def encode(text: str, image: Tensor | None) -> Condition:
            nonlocal pipeline
            if pipeline is None:
                pipeline = self._text_pipeline().to(device)
            return self._encode(pipeline, text, image, frames).to("cpu")

        try:
            for text, image in given:
                if image is not None:
                    self._check_image(image, frames)
                # Not around `yield`: what happens there is the caller's.
                with torch.inference_mode(False), torch.no_grad():
                    if cache is None:
                        condition = encode(text, image)
                    else:
                        told = f" {self.micro}" if family.with_micro else ""
                        key = cache.key(text + told, image, frames)
                        condition = cache.get(key, partial(encode, text, image))
                    prompt = Prompt.of(text, condition.with_guidance(scale))
                yield prompt
        finally:
            if pipeline is not None:
                pipeline.to("cpu")  # the encoders of a large model would crowd the network out

    @property
    def has_text_encoders(self) -> bool:
        return self.whole or is_pipeline(self.folder)

    def encode_negative(self) -> Prompt:
        """The family's official negative prompt, for classifier-free guidance."""
        return self.encode_prompts([self.model.family.negative_prompt])[0]

    def encode_image(
        self, text: str, image: Tensor, frames: int, guidance: float | None = None
    ) -> Prompt:
        """A text and the image [H, W, 3] in [0, 1] that a video of `frames` begins with -> prompt.

        The image has the video's own height and width. Raises AccVideoError for sizes that do not
        fit the model, and for a model that takes no image.
        """
        return self.encode_images([(text, image)], frames, guidance)[0]

    def encode_images(
        self, pairs: Iterable[tuple[str, Tensor]], frames: int, guidance: float | None = None
    ) -> list[Prompt]:
        """`encode_image` of many (text, image), which are taken one after the other."""
        return list(self.encode_each(pairs, frames, guidance))

    def check_encoders(self) -> None:
        """Raise AccVideoError where there are no text encoders."""
        if not self.has_text_encoders:
            raise AccVideoError(
                f"{self.folder.name!r} holds the network alone and no text encoders; encode "
                "prompts with ComfyUI's CLIP nodes, or load the teacher from its diffusers folder"
            )

    def check_vae(self) -> None:
        """Raise AccVideoError where there is no VAE."""
        if self.vae_path is None:
            raise AccVideoError(
                f"{self.folder.name!r} holds the network alone and no VAE; use ComfyUI's VAE "
                "nodes, or load the teacher together with a VAE or from its diffusers folder"
            )

    def check_images(self, frames: int, height: int, width: int) -> None:
        """Raise AccVideoError when no video of this size can begin with an image."""
        family = self.model.family
        if family.encode_image is None:
            raise AccVideoError(
                f"{family.title or family.name} takes no image; leave the image out, or load an "
                "image-to-video model"
            )
        self.model.latent_spec.shape(frames, height, width)

    def _encode(self, pipeline: Any, text: str, image: Tensor | None, frames: int) -> Condition:
        family, device = self.model.family, self.compute_device
        if image is None:
            return family.encode(pipeline, [text], device)
        encode = family.encode_image
        if family.with_micro is not None:
            encode = family.with_micro(self.micro)
        assert encode is not None
        return encode(pipeline, self.vae, text, image, frames, device)

    def _check_image(self, image: Tensor, frames: int) -> None:
        if image.dim() != 3 or image.shape[-1] != 3:
            raise AccVideoError(
                f"the image has shape {tuple(image.shape)}; expected [height, width, 3]"
            )
        self.check_images(frames, *image.shape[:2])

    @property
    def tokenizer(self) -> Any | None:
        """The text encoder's tokenizer, or None where there are no text encoders.

        Of a text it gives the tokens that count against the family's `text_tokens`. The encoders,
        which are large, are not loaded for it.
        """
        if self._text is not None:
            return getattr(self._text, "tokenizer", None)
        if self.whole or not self.has_text_encoders:
            return None
        return load_tokenizer(self.folder, self.model.family.pipeline_class)

    @property
    def vae(self) -> VideoVAE:
        """The VAE, in `vae_dtype`."""
        if self._vae is None:
            self.check_vae()
            assert self.vae_path is not None
            module = load_vae(self.vae_path, self.compute_device, self.vae_dtype)
            self._vae = VideoVAE(module, self.model.latent_spec)
        return self._vae

    @contextmanager
    def decoding(self, how: str) -> Iterator[None]:
        """Inside, the VAE is loaded and decodes as one of `vae_speed.WAYS` says."""
        with fast_decoder(self.vae, how):
            yield

    def tiny_vae(self, path: Path) -> TinyDecoder:
        """The tiny decoder in a file, in the network's number format."""
        if path not in self._tiny:
            model = self.model
            self._tiny[path] = load_tiny_decoder(path, model, self.compute_device, model.dtype)
        return self._tiny[path]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Teacher:
        """This teacher, its network moved in place (and its VAE, which keeps its number format)."""
        with torch.inference_mode(False):
            self.model.module.to(device=device, dtype=dtype)
            if self._vae is not None:
                self._vae.module.to(device)
            self._tiny.clear()  # which are soon loaded again
        self.device = None
        return self

    @property
    def compute_device(self) -> torch.device:
        """Where everything is computed, though blocks of the network may wait elsewhere."""
        return self.model.device if self.device is None else self.device

    def _text_cache(self) -> TextCache | None:
        if self.text_cache is None:
            return None
        if self._cache is None or self._cache.folder != self.text_cache:
            parts = [*encoder_parts(self.folder), *([self.vae_path] if self.vae_path else [])]
            name = f"{self.model.family.name}, {encoder_name(parts, self.model.dtype)}"
            self._cache = TextCache(self.text_cache, name)
        return self._cache

    def _text_pipeline(self) -> Any:
        if self._text is None:
            self.check_encoders()
            family, dtype = self.model.family, self.model.dtype
            if self.whole and family.whole_file is not None:
                self._text = family.whole_file.load_pipeline(self.folder, dtype)
            else:
                self._text = load_text_pipeline(self.folder, family.pipeline_class, dtype)
        return self._text


def load_teacher(
    source: Path | str | Sequence[Path | str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    vae: Path | None = None,
    free_memory: int | None = None,
) -> Teacher:
    """Load a teacher, offline; its network is frozen and in eval mode.

    Args:
        source: a diffusers pipeline folder; the folder, file or any shard of a network; or two of
            the latter, the high-noise and the low-noise network of a pair.
        dtype: of the weights; what a file has packed (fp8, GGUF) stays packed and is computed in
            `dtype`.
        variant: family to take a network for that its tensors cannot tell from another.
        vae: folder of a diffusers VAE or Wan's official file, in place of the pipeline folder's.
        free_memory: bytes that loading may take; more is refused before anything is read. What
            stays in a mapped file, which the system can read again, takes none on the CPU.

    Raises:
        AccVideoError: the source is missing, foreign, incomplete, damaged or too large.
    """
    single = isinstance(source, (str, Path))
    sources = tuple(Path(path) for path in ([source] if single else source))
    if len(sources) not in (1, 2):
        raise AccVideoError(
            f"a teacher is loaded from one file or folder or from a pair, and {len(sources)} were "
            "given; give one, or the high-noise and the low-noise file"
        )
    if not sources[0].exists():
        raise AccVideoError(f"teacher {str(sources[0])!r} does not exist; check the path")
    pipeline = len(sources) == 1 and is_pipeline(sources[0])
    family, networks = open_networks(sources[0]) if pipeline else _open_files(sources, variant)
    whole = not pipeline and _is_whole(family, networks[0])
    if vae is None and (pipeline or whole):
        vae = sources[0] / "vae" if pipeline else sources[0]
    vae_path = vae
    config = {} if vae_path is None else vae_config(Path(vae_path))
    spec = family.latent_spec(networks[0].config, config)
    name = " and ".join(path.name for path in sources)
    on_cpu = torch.device(device).type == "cpu"
    _check_memory(name, family, networks, dtype, on_cpu, free_memory)
    modules = [network.load(device, dtype) for network in networks]
    module = Experts(*modules) if len(modules) == 2 else modules[0]
    model = VideoModel(module, family, spec, source=name)
    vae_path = None if vae_path is None else Path(vae_path)
    return Teacher(model, sources[0], sources, vae_path, whole=whole)


def _is_whole(family: Family, network: Network) -> bool:
    kind = family.whole_file
    return kind is not None and kind.is_whole(network.checkpoint.names)


def _open_files(sources: Sequence[Path], variant: str | None) -> tuple[Family, list[Network]]:
    """The family that the tensors of one network or of a pair show, and the networks."""
    from .detect import detect, pair

    found, networks = [], []
    for path in sources:
        checkpoint = open_checkpoint(path)
        metadata = dict(checkpoint.metadata)
        if (path / "config.json").is_file():
            metadata["config"] = (path / "config.json").read_text(encoding="utf-8")
        try:
            seen = detect(checkpoint.shapes, metadata=metadata, variant=variant)
        except AccVideoError as error:
            raise AccVideoError(f"{path.name!r} cannot be loaded: {error}") from error
        table = seen.family.key_table(seen.config) if seen.naming == "native" else None
        cls = diffusers_class(seen.family.transformer_class)
        networks.append(Network(checkpoint, cls, seen.config, table))
        found.append(seen)
    family = pair(*found) if len(found) == 2 else found[0].family
    if family.experts != len(networks):
        raise AccVideoError(
            f"{sources[0].name!r} is one of the two networks of {family.title or family.name}; "
            "give the high-noise and the low-noise file together"
        )
    return family, networks


def _check_memory(
    name: str,
    family: Family,
    networks: Sequence[Network],
    dtype: torch.dtype,
    on_cpu: bool,
    free: int | None,
) -> None:
    """Say what loading will take, and refuse what does not fit."""
    whole = sum(network.bytes(dtype) for network in networks)
    needed = sum(network.copied_bytes(dtype) for network in networks) if on_cpu else whole
    parameters = sum(x.numel() for network in networks for x in network.module.parameters())
    number = str(dtype).removeprefix("torch.")
    _log.info(
        "%s: %s, %.2f billion parameters, about %.2f GB to be computed with in %s",
        *(name, family.title or family.name, parameters / 1e9, whole / 1e9, number),
    )
    if free is not None and needed > free:
        narrower = "" if dtype.itemsize <= 2 else "load it in bfloat16, "
        raise AccVideoError(
            f"loading {name!r} in {number} takes about {needed / 1e9:.2f} GB of memory and only "
            f"{free / 1e9:.2f} GB are free; {narrower}choose an fp8 or GGUF file or a smaller "
            "model, or close other programs"
        )

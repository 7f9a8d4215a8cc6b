"""Where a teacher is loaded from and how: plain data that can travel to another machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AccVideoError

if TYPE_CHECKING:
    import torch

    from ..speed import Speed
    from .loading import Teacher


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA on a teacher: on "both" experts, the "high"-noise or the "low"-noise one."""

    path: Path
    strength: float = 1.0
    experts: str = "both"


@dataclass(frozen=True, slots=True)
class TeacherSource:
    """Everything that loading a teacher needs to know; the same on every machine."""

    path: Path | None = None
    """Folder or file; None is the tiny embedded HunyuanVideo."""
    low_noise: Path | None = None
    """File of the low-noise expert, where `path` is the high-noise one."""
    variant: str | None = None
    """Family that a checkpoint's tensors cannot tell."""
    vae: Path | None = None
    loras: tuple[LoraFile, ...] = ()
    lora_mode: str = "merge"
    device: str | None = None
    """None is cuda where there is one, else cpu."""
    dtype: str | None = None
    """None is bfloat16 on cuda and float32 elsewhere."""
    weights: str | None = None
    """"fp8" or "nf4" packs the blocks' weights; None leaves them as they are stored."""
    threads: int | None = None
    """CPU threads of torch, for the whole process; None leaves them as they are."""
    in_main_memory: bool = False
    """Leaves the network there; only text encoders and VAE use `device`."""
    speed: Speed | None = None
    """How whoever loads the teacher is to have it compute; None as it does by itself."""

    def absolute(self) -> TeacherSource:
        """The same files, independent of the current folder."""
        return replace(
            self,
            path=self.path and self.path.absolute(),
            low_noise=self.low_noise and self.low_noise.absolute(),
            vae=self.vae and self.vae.absolute(),
            loras=tuple(replace(lora, path=lora.path.absolute()) for lora in self.loras),
        )

    def load(self) -> Teacher:
        """The teacher with its LoRAs on. Raises AccVideoError for whatever stands in the way."""
        import torch
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from .loading import load_teacher
        from .packing import pack_weights
        from .tiny import embedded_teacher_path

        for library in (diffusers_logging, transformers_logging):
            library.disable_progress_bar()  # the terminal has one progress line, ours
        if self.threads:
            torch.set_num_threads(self.threads)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        path = self.path or embedded_teacher_path()
        # What is packed goes to its device packed: it may not fit there otherwise.
        at_once = self.weights is None and not self.in_main_memory
        teacher = load_teacher(
            path if self.low_noise is None else (path, self.low_noise),
            device=device if at_once else "cpu",
            dtype=self._dtype(device),
            variant=self.variant,
            vae=self.vae,
            # On the CPU memory is the system's business.
            free_memory=(
                torch.cuda.mem_get_info(device)[0]
                if at_once and device.startswith("cuda")
                else None
            ),
        )
        teacher = self._with_loras(replace(teacher, device=torch.device(device)))
        if self.weights is None:
            return teacher
        home = "cpu" if self.in_main_memory else device
        return replace(teacher, model=pack_weights(teacher.model, self.weights, home))

    def _dtype(self, device: str) -> torch.dtype:
        import torch

        name = self.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise AccVideoError(f"dtype {name} is unknown; use float32, bfloat16 or float16")
        return dtype

    def _with_loras(self, teacher: Teacher) -> Teacher:
        from .lora import apply_loras

        model = teacher.model
        for experts, group in groupby(self.loras, key=lambda lora: lora.experts):
            files = [(lora.path, lora.strength) for lora in group]
            model = apply_loras(model, files, self.lora_mode, experts)
        return replace(teacher, model=model)

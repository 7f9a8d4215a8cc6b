"""Students as files: for this project, for stock ComfyUI and for diffusers.

`save_student` writes the project's own: a LoRA under diffusers' names in float32, or the network's
state dict. `export_student` writes what others load. Every file carries `StudentInfo` in its
header, and `load_student` reads every layout back.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .distill.student import Student, StudentInfo
from .errors import AccVideoError
from .files import Later, disk_errors, write_json, write_safetensors
from .merged import Fp8Scaled, block_matrices, merged_weights, native_weights
from .models.experts import networks_of
from .models.lora_file import EXPERT_KEY, LOW_PREFIX
from .models.lora_layout import Factors, fuse, truncate
from .solvers import COMFY_SAMPLERS
from .student_file import load_student, pair_of, read_student_info, table_of

__all__ = [
    "Exported",
    "export_student",
    "load_student",
    "native_lora",
    "read_student_info",
    "save_student",
]

LAYOUTS = ("native", "diffusers")
KINDS = ("lora", "full")
DTYPES = {
    **{"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32},
    **{"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32},
    "fp8": torch.float8_e4m3fn,
}
SHARD_BYTES = 5_000_000_000
_WEIGHTS = "diffusion_pytorch_model"
_PREFIX = "transformer."
_NATIVE_PREFIX = "diffusion_model."


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    files: tuple[Path, ...]
    """One file, two for a model of two experts, or one folder."""
    errors: tuple[float, ...] = ()
    """Relative Frobenius error of each file's weights by fp8, or of its adapters by the rank."""

    def summary(self) -> str:
        """A line for each file."""
        lines = []
        for i, path in enumerate(self.files):
            parts = path.rglob("*.safetensors") if path.is_dir() else [path]
            size = sum(part.stat().st_size for part in parts) / 1e6
            error = f", relative error {self.errors[i]:.2e}" if self.errors else ""
            lines.append(f"{path.name} ({size:.1f} MB{error})")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Job:
    """One export; checked before anything is written."""

    student: Student
    path: Path
    layout: str
    what: str
    dtype: str
    rank: int | None

    def __post_init__(self) -> None:
        for name, known in (("layout", LAYOUTS), ("what", KINDS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise AccVideoError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}"
                )
        lora = self.student.info.lora
        if self.what == "lora" and lora is None:
            raise AccVideoError("the student has full weights and no LoRA; export it as full")
        if self.rank is not None and (self.what == "full" or self.rank < 1):
            raise AccVideoError(
                f"rank is {self.rank}; it must be at least 1 and goes with what = lora only"
            )
        if self.dtype == "fp8" and (self.what, self.layout) != ("full", "native"):
            raise AccVideoError(
                "fp8 is for full weights in the native layout, which ComfyUI loads; "
                "choose bf16 for a LoRA or for diffusers"
            )
        if self.is_folder == (self.path.suffix == ".safetensors"):
            kind = "a folder and must not" if self.is_folder else "a file and must"
            raise AccVideoError(f"{self.path.name!r} becomes {kind} end in .safetensors; rename it")

    @property
    def is_folder(self) -> bool:
        return (self.layout, self.what) == ("diffusers", "full")


def save_student(
    student: Student, path: Path, weights: Mapping[str, Tensor] | None = None
) -> Path:
    """Write `student` to `path` (suffix .safetensors), whole or not at all; returns the path.

    `weights` are its state dict where that is known; of sharded ones only all processes can ask.

    A LoRA is under diffusers' names ("transformer.<layer>.lora_A.weight"), so that diffusers'
    `load_lora_weights` takes it too; of two experts the second is "transformer_2.".
    """
    if path.suffix != ".safetensors":
        raise AccVideoError(f"student file {path.name!r} must end in .safetensors; rename it")
    info, tensors = student.info, weights or student.state_dict()
    if info.lora is not None:
        networks = networks_of(student.model.module)
        tensors = {
            f"{_PREFIX if expert != 'low' else LOW_PREFIX}{layer}.lora_{side}.weight": x
            for expert in networks
            for layer, factors in _adapters(student, expert).items()
            for side, x in zip("AB", factors, strict=True)
        }
        info = _folded(info)
    write_safetensors(path, tensors, _header(student, info))
    return path


def export_student(
    student: Student,
    path: Path,
    *,
    layout: str = "native",
    what: str = "lora",
    dtype: str = "bf16",
    rank: int | None = None,
    pipeline: Path | None = None,
) -> Exported:
    """Write a student for ComfyUI ("native" names) or diffusers.

    A model of two experts gives `<stem>_high_noise` and `<stem>_low_noise` files. A LoRA in native
    layout is exact: adapters of the parts of a fused layer become one of the sum of their ranks.

    Args:
        student: its teacher's weights and adapters are merged for "full".
        path: a .safetensors file; for full weights in diffusers' layout a folder.
        layout: "native" or "diffusers".
        what: "lora" (the student's adapters) or "full" (teacher and student in one).
        dtype: one of `DTYPES`; fp8 is ComfyUI's scaled fp8.
        rank: the largest rank of the file's adapters; what does not fit is cut off (SVD) and the
            error told. None is exact.
        pipeline: diffusers folder whose other parts a folder is completed with, by hard links; of
            a family that has them in one file with the network, that or such a file, for either.

    Raises:
        AccVideoError: a choice that does not go with another, or the disk is full.
    """
    job = _Job(student, Path(path), layout, what, dtype, rank)
    with torch.inference_mode(False), torch.no_grad():
        if job.is_folder:
            return Exported((_write_folder(job, pipeline),))
        write = _write_lora if what == "lora" else partial(_write_full, pipeline)
        networks = networks_of(student.model.module)
        written = [write(job, expert, network) for expert, network in networks.items()]
    errors = tuple(error for _, error in written) if rank is not None or dtype == "fp8" else ()
    return Exported(tuple(path for path, _ in written), errors)


def native_lora(student: Student, dtype: str = "bf16") -> dict[str, Tensor]:
    """A student's LoRA under ComfyUI's names, the tensors that `export_student` writes.

    Raises:
        AccVideoError: the student has full weights, or two experts and so two LoRAs.
    """
    if student.info.lora is None:
        raise AccVideoError("the student has full weights and no LoRA; use Save Student instead")
    if len(networks_of(student.model.module)) > 1:
        raise AccVideoError(
            "the student has two experts and so two LoRAs; use Export Student instead"
        )
    with torch.inference_mode(False), torch.no_grad():
        return _named(_native_adapters(student, ""), _NATIVE_PREFIX, dtype)


def _write_lora(job: _Job, expert: str, network: nn.Module) -> tuple[Path, float]:
    """One expert's adapters; the path and the relative error by a lower rank."""
    native = job.layout == "native"
    factors = (_native_adapters if native else _adapters)(job.student, expert)
    error, info = 0.0, _folded(job.student.info)
    if job.rank is not None and any(a.shape[0] > job.rank for a, _ in factors.values()):
        info = _of_rank(info, job.rank, factors)
        factors, error = _truncated(factors, job.rank)
    tensors = _named(factors, _NATIVE_PREFIX if native else _PREFIX, job.dtype)
    path = pair_of(job.path).get(expert, job.path)
    write_safetensors(path, tensors, _header(job.student, info, expert))
    return path, error


def _write_full(
    pipeline: Path | None, job: _Job, expert: str, network: nn.Module
) -> tuple[Path, float]:
    """One expert's weights under native names; the path and the relative error of fp8."""
    fp8 = job.dtype == "fp8"
    table = table_of(job.student.model, network)
    # What is not rounded to fp8 (embedders, norms, the last layer) is as sensitive as it is small.
    weights = merged_weights(network, torch.bfloat16 if fp8 else DTYPES[job.dtype])
    tensors = native_weights(weights, table)
    scaled = Fp8Scaled()
    if fp8:
        matrices = block_matrices(network, job.student.model.family.body_of(network), weights)
        layers = {table.whole(name.removesuffix(".weight")) for name in matrices}
        tensors = scaled.quantise(tensors, sorted(f"{layer}.weight" for layer in layers))
    whole = job.student.model.family.whole_file
    if whole is not None:
        beside = {} if pipeline is None else whole.others(pipeline)
        tensors = {whole.network + name: x for name, x in tensors.items()} | beside
    path = pair_of(job.path).get(expert, job.path)
    info = replace(job.student.info, lora=None)
    header = _header(job.student, info, expert) | {"config": json.dumps(_config(network, True))}
    write_safetensors(path, tensors, header)
    return path, scaled.error


def _write_folder(job: _Job, pipeline: Path | None) -> Path:
    """Full weights as diffusers' folder, put in place whole or not at all."""
    folder = job.path
    if folder.exists() and not _is_ours(folder):
        raise AccVideoError(f"{folder} already exists and is no export; choose another name")
    temp = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    header = _header(job.student, replace(job.student.info, lora=None))
    with disk_errors("write", folder):
        try:
            temp.mkdir(parents=True)
            family = job.student.model.family
            names = {"": family.folder, "high": family.folder, "low": "transformer_2"}
            for expert, network in networks_of(job.student.model.module).items():
                _write_network(temp / names[expert], network, job, header)
            if pipeline is not None and pipeline.is_file() and family.whole_file:
                family.whole_file.write_parts(pipeline, temp)
            elif pipeline is not None:
                _complete(temp, pipeline)
            if folder.exists():
                shutil.rmtree(folder)
            temp.rename(folder)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
    return folder


def _write_network(folder: Path, network: nn.Module, job: _Job, header: dict[str, str]) -> None:
    weights = merged_weights(network, DTYPES[job.dtype])
    shards: list[dict[str, Later]] = [{}]
    filled = 0
    for name, x in weights.items():
        size = x.dtype.itemsize * torch.Size(x.shape).numel()
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = x
        filled += size
    places = {}
    for i, shard in enumerate(shards):
        part = "" if len(shards) == 1 else f"-{i + 1:05d}-of-{len(shards):05d}"
        write_safetensors(folder / f"{_WEIGHTS}{part}.safetensors", shard, header)
        places |= dict.fromkeys(shard, f"{_WEIGHTS}{part}.safetensors")
    if len(shards) > 1:
        total = sum(x.dtype.itemsize * torch.Size(x.shape).numel() for x in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / f"{_WEIGHTS}.safetensors.index.json", index)
    write_json(folder / "config.json", _config(network))


def _complete(folder: Path, pipeline: Path) -> None:
    """The rest of a pipeline, as hard links where the disk allows it."""
    if not (pipeline / "model_index.json").is_file():
        raise AccVideoError(f"{pipeline} is no diffusers pipeline folder; leave it out")
    networks = {entry.name for entry in folder.iterdir()}
    for source in sorted(pipeline.rglob("*")):
        relative = source.relative_to(pipeline)
        if relative.parts[0] in networks or not source.is_file():
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, target)


def _is_ours(folder: Path) -> bool:
    try:
        read_student_info(folder)
    except AccVideoError:
        return False
    return True


def _adapters(student: Student, expert: str) -> dict[str, Factors]:
    """diffusers layer -> (A, B) of one expert, the scale in B; float32 on the CPU."""
    scale = student.info.lora.scale if student.info.lora else 1.0
    state, prefix = student.state_dict(), f"{expert}." if expert else ""
    ending = ".lora_A.weight"
    layers = [n.removesuffix(ending) for n in state if n.startswith(prefix) and n.endswith(ending)]
    return {
        layer.removeprefix(prefix): (
            state[layer + ending],
            state[f"{layer}.lora_B.weight"] * scale,
        )
        for layer in layers
    }


def _native_adapters(student: Student, expert: str) -> dict[str, Factors]:
    """native layer -> (A, B) of one expert; the parts of a fused layer are one."""
    network = networks_of(student.model.module)[expert]
    return fuse(table_of(student.model, network), _adapters(student, expert))


def _named(factors: Mapping[str, Factors], prefix: str, dtype: str) -> dict[str, Tensor]:
    return {
        f"{prefix}{layer}.lora_{side}.weight": x.to(DTYPES[dtype]).contiguous()
        for layer, pair in factors.items()
        for side, x in zip("AB", pair, strict=True)
    }


def _truncated(factors: Mapping[str, Factors], rank: int) -> tuple[dict[str, Factors], float]:
    """Adapters of at most `rank`, and the relative Frobenius error of all together."""
    found = {layer: truncate(a, b, rank) for layer, (a, b) in factors.items()}
    lost, total = (sum(getattr(x, name) for x in found.values()) for name in ("lost", "total"))
    error = (lost / total) ** 0.5 if total else 0.0
    return {layer: (x.a.contiguous(), x.b.contiguous()) for layer, x in found.items()}, error


def _folded(info: StudentInfo) -> StudentInfo:
    """Readers without our header take alpha = rank, so the scale went into B."""
    assert info.lora is not None
    return replace(info, lora=replace(info.lora, alpha=None))


def _of_rank(info: StudentInfo, rank: int, factors: Mapping[str, Factors]) -> StudentInfo:
    width = min(a.shape[1] for a, _ in factors.values())
    if rank > width:
        raise AccVideoError(
            f"rank {rank} is more than the width {width} of the narrowest layer with an adapter; "
            f"choose a rank of at most {width}"
        )
    assert info.lora is not None
    return replace(info, lora=replace(info.lora, rank=rank))


def _header(student: Student, info: StudentInfo, expert: str = "") -> dict[str, str]:
    """What the file says of itself: to `load_student`, and in plain words to other programs."""
    family, times = student.teacher.family, info.key_times
    steps = len(times) - 1
    sigmas = [family.to_sigma(t) for t in times]
    listed = ", ".join(f"{sigma:.4g}" for sigma in sigmas)
    guidance = "" if info.guidance is None else f", guidance {info.guidance:g}"
    plain = {
        "accvideo.sigmas": json.dumps(sigmas),
        "accvideo.steps": str(steps),
        "accvideo.cfg": "1.0",
        "accvideo.teacher": student.teacher.source,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"{family.title or family.name} in {steps} steps (AccVideo student)",
        "modelspec.usage_hint": f"{COMFY_SAMPLERS[info.solver]}, sigmas {listed}; cfg 1{guidance}",
    }
    own = {EXPERT_KEY: expert} if expert else {}
    return {"format": "pt", **info.as_metadata(), **plain, **own}


def _config(network: Any, for_comfy: bool = False) -> dict[str, Any]:
    """diffusers' configuration; ComfyUI reads what it cannot see in Wan's tensors beside it."""
    import diffusers

    config = {name: x for name, x in dict(network.config).items() if not name.startswith("_")}
    if for_comfy:
        seen = {"num_heads": "num_attention_heads", "text_dim": "text_dim"}
        told = {name: config[key] for name, key in seen.items() if key in config}
        return config | {"transformer": told}
    names = {
        "_class_name": type(network).__name__,
        "_diffusers_version": diffusers.__version__,
    }
    return {**names, **config}

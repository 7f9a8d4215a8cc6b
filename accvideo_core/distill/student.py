"""Student: a few-step network that shares its teacher's weights.

A LoRA student is a copy of the teacher's module *structure* whose parameters are the teacher's own
tensors, with adapters in the copy only. Base weights therefore exist once, the teacher is never
changed, no adapter is ever switched on or off, and gradient checkpointing cannot recompute a pass
with adapters in another state. A full student (no LoRA) has float32 weights of its own.

What is trained is float32 even when the base is bfloat16: small updates would vanish in bfloat16's
8 bits. An adapter casts its input up and its output down, so the base network is not touched.

Shapes: B batch, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioning import Condition
from ..errors import AccVideoError
from ..flow import Times, Velocity, validate_times
from ..latents import LatentSpec, key_generator
from ..models.lora import shared_copy
from ..models.quantised import trainable_in_full
from ..models.video_model import Family, VideoModel
from .sharded_tensors import assign, whole

_ADAPTER = "default"
_METADATA_PREFIX = "accvideo."
_FINER = 10


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Size and place of the adapters: W + (alpha / rank) B A."""

    rank: int = 32
    """Inner width of every adapter."""
    alpha: float | None = None
    """Scale numerator; None means `rank`, a scale of 1."""
    targets: tuple[str, ...] | None = None
    """Names (suffixes) of the adapted linear layers; None means the family's own list."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AccVideoError(f"LoRA rank is {self.rank}; it must be at least 1 (try 32)")
        if self.alpha is not None and not self.alpha > 0:
            raise AccVideoError(
                f"LoRA alpha is {self.alpha}; it must be positive (try {self.rank})"
            )

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoraSpec:
        targets = data.get("targets")
        return cls(**{**data, "targets": None if targets is None else tuple(targets)})


@dataclass(frozen=True, slots=True)
class StudentInfo:
    """All that is needed to sample a student right; travels in its file's header."""

    family: str
    base: str
    """Fingerprint of the teacher."""
    key_times: Times
    """The falling times the student was trained to step between."""
    guidance: float | None
    """Embedded guidance it was trained with; None for a family without one."""
    lora: LoraSpec | None
    """None: a full student."""
    latent_spec: LatentSpec
    frames: int
    height: int
    width: int
    """Pixels of the videos it was trained on."""
    recipe: dict[str, Any] = field(default_factory=dict)
    steps_trained: int = 0
    solver: str = "euler"
    """How to sample it between its key times: a name in `solvers.SOLVERS`."""

    def __post_init__(self) -> None:
        validate_times(self.key_times)

    @property
    def any_steps(self) -> bool:
        """Whether other times than its own may be tried: it predicts clean latents from each."""
        return self.solver == "renoise"

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form; `StudentInfo.from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StudentInfo:
        """The inverse of `as_dict`."""
        lora = data["lora"]
        changed = {
            "key_times": tuple(data["key_times"]),
            "lora": None if lora is None else LoraSpec.from_dict(lora),
            "latent_spec": LatentSpec.from_dict(data["latent_spec"]),
        }
        return cls(**{**data, **changed})

    def as_metadata(self) -> dict[str, str]:
        """Header strings of a safetensors file, one JSON value per field."""
        values = self.as_dict()
        return {_METADATA_PREFIX + name: json.dumps(value) for name, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> StudentInfo:
        """The inverse of `as_metadata`; fields it does not know are left out.

        Raises:
            AccVideoError: the header was not written by `as_metadata`.
        """
        try:
            names = [f.name for f in fields(cls)]
            # What came later is not in every file.
            known = [n for n in names if n != "solver" or _METADATA_PREFIX + n in metadata]
            return cls.from_dict({n: json.loads(metadata[_METADATA_PREFIX + n]) for n in known})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise AccVideoError(
                f"the file's header does not describe an AccVideo student ({error!r}); "
                "choose a file that AccVideo saved"
            ) from error


@dataclass(eq=False)
class Student:
    """A VideoModel that is trained, the frozen teacher it came from, and how to sample it."""

    model: VideoModel
    info: StudentInfo
    teacher: VideoModel

    @classmethod
    def create(
        cls, teacher: VideoModel, info: StudentInfo, seed: int = 0, own: bool = True
    ) -> Student:
        """A student that computes exactly what `teacher` computes.

        Args:
            teacher: frozen; shares its weights with a LoRA student and is not changed.
            info: `info.lora` chooses adapters or, when None, a full copy.
            seed: of the adapters' A matrices (B starts at zero).
            own: False leaves a full student without weights of its own until they are sharded
                (`sharding.spread`), because no process could hold all of them.
        """
        # ComfyUI runs nodes in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(False), torch.no_grad():
            if info.lora is None:
                if reason := trainable_in_full(teacher.module):
                    raise AccVideoError(reason)
                if own:
                    module = copy.deepcopy(teacher.module).float().requires_grad_(True)
                else:
                    module = shared_copy(teacher.module)
            else:
                module = shared_copy(teacher.module)
                _add_adapters(module, info.lora, teacher.family.lora_targets, seed)
        model = replace(teacher, module=module, _fingerprint=teacher.fingerprint)
        return cls(model, info, teacher)

    @property
    def key_times(self) -> Times:
        return self.info.key_times

    @property
    def device(self) -> torch.device:
        return self.model.device

    def velocity(self, x_t: Tensor, t: float | Tensor, cond: Condition) -> Tensor:
        """v at (x_t [B, C, T, H, W], t), as `VideoModel.velocity`."""
        return self.model.velocity(x_t, t, cond)

    def asking(self, cond: Condition) -> AbstractContextManager[Velocity]:
        """(x_t, t) -> v for one condition, as `VideoModel.asking`."""
        return self.model.asking(cond)

    def as_teacher(self) -> VideoModel:
        """The frozen teacher network; shares its weights with a LoRA student."""
        return self.teacher

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained (adapters, or every weight), by the names a file holds."""
        named = self.model.module.named_parameters()
        return {name.replace(f".{_ADAPTER}.", "."): p for name, p in named if p.requires_grad}

    def state_dict(self, keep: bool = True) -> dict[str, Tensor]:
        """A float32 CPU copy of what is trained.

        Every process must ask where weights are sharded; those with `keep` False get nothing.
        """
        state = {}
        for name, p in self.trainable().items():
            x = whole(p.detach())
            if keep:
                state[name] = x.to("cpu", torch.float32, copy=True)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the values of a `state_dict` of a student of the same shape."""
        mine = self.trainable()
        wrong = sorted(mine.keys() ^ state.keys())
        wrong += [
            name for name, p in mine.items() if name in state and state[name].shape != p.shape
        ]
        if wrong:
            raise AccVideoError(
                f"{len(wrong)} weights do not fit this student, {wrong[0]!r} among them; "
                "load the file on the teacher that it was trained from"
            )
        with torch.inference_mode(False), torch.no_grad():
            for name, p in mine.items():
                assign(p, state[name])

    def clone(self) -> Student:
        """A student with the same values that can be trained without changing this one."""
        twin = Student.create(self.teacher, self.info)
        twin.load_state_dict(self.state_dict())
        return twin


def student_grid(
    family: Family,
    steps: int,
    shift: float | None = None,
    size: tuple[int, int] | None = None,
) -> Times:
    """`steps` + 1 times of a student that predicts clean latents from any: every tenth of the
    family's grid of ten times as many steps, for videos of `size` (height, width).

    Of a shifted uniform grid that is the family's own of `steps`. Levels between fixed ends (Karras
    et al.) would have a step at the lowest one, where hardly anything is left to predict.
    """
    return family.time_grid(_FINER * steps, shift, size)[::_FINER]


def _add_adapters(
    module: nn.Module, spec: LoraSpec, family_targets: tuple[str, ...], seed: int
) -> None:
    """Put LoRA layers into `module`; A is uniform in +-1/sqrt(inputs) as in peft, B is zero."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = family_targets if spec.targets is None else spec.targets
    _check_targets(module, spec.rank, targets)
    alpha = spec.rank if spec.alpha is None else spec.alpha
    config = LoraConfig(r=spec.rank, lora_alpha=alpha, target_modules=list(targets))  # type: ignore[arg-type]
    # peft draws from the global generator, which is the caller's; ours are named after the layer.
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, module, _ADAPTER)
    device = next(module.parameters()).device
    for name, p in module.named_parameters():
        if ".lora_" not in name:
            continue
        # Adapters are where the network computes, even if a layer's own weights wait elsewhere.
        p.data = p.data.to(device, torch.float32)
        if ".lora_A." in name:
            bound = 1 / math.sqrt(p.shape[1])
            generator = key_generator(seed, "lora", name)
            p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))


def _check_targets(module: nn.Module, rank: int, targets: tuple[str, ...]) -> None:
    linear = {name: x for name, x in module.named_modules() if isinstance(x, nn.Linear)}
    hit = [n for n in linear if any(n == t or n.endswith("." + t) for t in targets)]
    if not hit:
        raise AccVideoError(
            f"no linear layer is called like any of the LoRA targets {list(targets)}; "
            f"layers are called like {sorted(linear)[:3]}"
        )
    thin = min(hit, key=lambda n: min(linear[n].in_features, linear[n].out_features))
    width = min(linear[thin].in_features, linear[thin].out_features)
    if rank > width:
        raise AccVideoError(
            f"LoRA rank {rank} is more than the width {width} of layer {thin}; "
            f"choose a rank of at most {width}"
        )

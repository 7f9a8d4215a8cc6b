"""Recipe: every choice of a distillation run in one frozen, validated record; and named presets.

AccVideo leaves much open (optimiser details, head layers, what an iteration is); each such point is
one field here, with our default and its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import AccVideoError
from ..fields import check_fields
from ..flow import Times, key_indices
from .recipe_checks import CHOICES, GAN_NAMES, SCHEDULES, check_recipe
from .specs import SPECS, ConsistencySpec, LaddSpec, SfvSpec, Spec, UfogenSpec
from .student import LoraSpec

__all__ = ["CHOICES", "GAN_NAMES", "PRESETS", "SCHEDULES", "Recipe", "preset"]

@dataclass(frozen=True, slots=True)
class Recipe:
    """How a student is distilled. `dataclasses.replace(PRESETS["paper"], ...)` makes a variant."""

    name: str = "custom"
    """What the recipe is called; it changes nothing."""

    student_steps: int = 5
    """m: steps the student will take. It must divide the teacher's steps."""
    key_times: Times | None = None
    """m + 1 falling times; None takes every n/m-th of the dataset's own grid, as the paper does."""
    adversarial: bool = False
    """Add the adversarial term (Eq. 7) to trajectory guidance (Eq. 6)."""
    sf_v: SfvSpec | None = None
    """Train by SF-V instead of AccVideo's method."""
    ladd: LaddSpec | None = None
    """Train by LADD."""
    ufogen: UfogenSpec | None = None
    """Train by UFOGen."""
    consistency: ConsistencySpec | None = None
    """Train by latent consistency distillation."""
    lora: LoraSpec | None = LoraSpec()
    """Adapters, or None for full fine-tuning. A run that starts from a student keeps that one's."""

    train_steps: int = 1200
    """Optimiser updates."""
    iteration: str = "interval"
    """What one update trains: an "interval" k, where k runs m-1, ..., 0 and again, or the mean over
    a whole "sweep" of all k on the same samples. Either way 1200 updates of 32 samples are the
    paper's 38.4K; a sweep computes m times as much."""
    trajectories: int | None = None
    """Learn from this many of the dataset's trajectories, the first by id; None takes all."""
    batch_size: int = 32
    """Samples per update."""
    accumulate: int = 1
    """Parts that a batch is computed in; only memory and speed depend on it."""
    optimizer: str = "adamw"
    """"adamw" as published, "adamw_8bit" (bitsandbytes) or "adafactor" (torch) for less memory; the
    last one's learning rates are relative to the weights' size, so take 1e-3 to 1e-2."""
    lr: float = 5e-6
    """Learning rate of the student, the published one; adapters want a higher one."""
    head_lr: float | None = None
    """Learning rate of the heads; None takes `lr`, the paper gives one for both."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Momentum and memory of the squared gradient in the student's optimiser."""
    head_betas: tuple[float, float] = (0.0, 0.999)
    """No momentum for heads: they chase a moving target (FastVideo, SF-V)."""
    weight_decay: float = 1e-3
    """Decoupled decay (AdamW) of everything that is trained, as published."""
    clip: float | None = 1.0
    """Largest gradient norm of the student and of the heads; None does not clip."""
    warmup: int = 0
    """Updates over which the learning rate rises from zero."""
    schedule: str = "constant"
    """"constant", or a fall to zero at `train_steps`: "cosine" or "linear"."""
    ema: float | None = None
    """Decay of a running average of the weights, which the finished student then has."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    swap_blocks: int = 0
    """Blocks of the network whose weights wait in main memory until they are needed; only frozen
    ones can, so a LoRA student's, and only with `gradient_checkpointing`."""
    offload_activations: bool = False
    """Keep what the backward pass needs in main memory meanwhile."""
    compile: bool = False
    """Compile the network's blocks (torch.compile): minutes at the start, faster updates."""

    trajectory_weight: float = 1.0
    """Weight of trajectory guidance (Eq. 6)."""
    adv_weight: float = 0.1
    """lambda of the adversarial term."""
    gan_loss: str = "logistic"
    """"logistic" (non-saturating) or "hinge"; Eq. 7 fixes only the game's value."""
    updates: str = "summed"
    """"summed": the student takes one step on L_traj + lambda L_adv; "separate": a step on each, as
    Algorithm 1 writes it. They differ by the optimiser's state alone, and one step is cheaper."""
    rollout: str = "direct"
    """Where fakes come from: "direct" rolls each from fresh noise at every update; "queued" spreads
    a rollout over m updates as Algorithm 1 does, which costs one step instead of up to m, and lets
    fakes be up to m - 1 updates old. The gradient goes through the last step in both."""
    head_updates: int = 1
    """Updates of the heads for each of the student; the paper gives equal counts. Every further one
    reads a batch of its own; with queues, it looks at the waiting fakes once more."""
    heads: str = "timestep"
    """"timestep": heads of their own for every key time (the paper's), or one "shared" by all key
    times that look at the same block (all of them where `feature_blocks` are named)."""
    head_kind: str = "spatial"
    """"spatial": 2-D convolutions on every latent frame, as published; "spatial_temporal" adds 1-D
    ones along time (SF-V), should students learn to stand still; "temporal" has those alone, for
    SF-V's ablation."""
    head_conditioning: bool = False
    """Project the prompt onto the heads' features, and the frame's index onto the spatial ones'
    (SF-V, StyleGAN-T); the paper tells none."""
    head_width: int = 256
    """Channels of a head."""
    feature_blocks: tuple[int, ...] | None = None
    """Teacher blocks (from 0) that the heads look at; None takes the paper's: the last one for
    t > 0, the one at two thirds of the depth for t = 0. SF-V, LADD and UFOGen take four of them,
    evenly spaced: all that the encoder of SF-V's network has."""
    clean_time_shift: float | None = None
    """How the frozen teacher is shown clean latents (k = 0): None at t = 0 as published, a number s
    at times drawn from shift_s(U(0, 1)) (Seaweed-APT, s = 12), should t = 0 tell too little."""
    r1: str = "approximate"
    """The regulariser that `r1_weight` weighs: "approximate" R1 by finite noise on real latents
    (Seaweed-APT), or the R1 gradient penalty on the heads' input "features" (SF-V)."""
    r1_weight: float = 0.0
    """Weight of the heads' R1; the paper needs none. Try 0.1 to 100 (features: 0.1 to 10) where
    real_accuracy and fake_accuracy stay near 1."""
    r1_sigma: float = 0.1
    """Size of the noise of that regulariser."""

    validate_every: int = 0
    """Updates between looks at fixed clips, student beside teacher; 0 never looks."""
    validation_clips: int = 4
    """Recorded trajectories that are looked at; two samples of one prompt tell diversity."""
    best_by: str | None = None
    """Figure of the looks by which the best student is kept and returned: "latent_mse" to the
    teacher's own result, or nearness of "motion", "saturation" or "diversity" to the teacher's."""
    patience: int | None = None
    """Stop after so many looks in a row that are no better by `best_by`; None never stops early."""

    seed: int = 0
    """Everything random follows from it and the number of the update."""
    checkpoint_every: int = 100
    """Updates between checkpoints; one is also written at the end and on cancelling."""
    keep_checkpoints: int = 2
    """So many checkpoints are kept, the last ones."""

    def __post_init__(self) -> None:
        check_recipe(self)

    @property
    def method(self) -> str:
        """Which of `methods.METHODS` trains; AccVideo's own where none is named."""
        return next((name for name in SPECS if getattr(self, name) is not None), "accvideo")

    @property
    def spec(self) -> Spec | None:
        """What is chosen for that method; None for AccVideo's own, whose fields are here."""
        return getattr(self, self.method, None)

    @property
    def has_heads(self) -> bool:
        """Whether a discriminator is trained beside the student."""
        return self.adversarial if self.spec is None else self.spec.has_heads

    @property
    def title(self) -> str:
        """What the student learns by, for people."""
        if self.spec is not None:
            return self.spec.title
        return "trajectory + adversarial" if self.adversarial else "trajectory"

    def times(self, grid: Times) -> Times:
        """The m + 1 falling key times on a dataset whose teacher used `grid`."""
        if self.key_times is not None:
            return self.key_times
        if len(grid) == 2 and self.student_steps > 1:
            raise AccVideoError(
                "the dataset holds no states between noise and data, as one of videos, and "
                f"{self.student_steps} student steps learn from a teacher's; record a dataset with "
                "accvideo record, or choose a recipe for videos"
            )
        return tuple(grid[i] for i in key_indices(len(grid) - 1, self.student_steps))

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form; `Recipe.from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `as_dict`, also from JSON, where tuples have become lists.

        Raises:
            AccVideoError: an unknown field, or a value of another type or out of range.
        """
        check_fields(cls, data, "recipe")
        values: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in data.items()
        }
        if isinstance(values.get("lora"), Mapping):
            check_fields(LoraSpec, values["lora"], "recipe.lora")
            values["lora"] = LoraSpec.from_dict(values["lora"])
        for name, spec in SPECS.items():
            if isinstance(values.get(name), Mapping):
                check_fields(spec, values[name], f"recipe.{name}")
                values[name] = spec(**values[name])
        return cls(**values)


_PAPER = Recipe(name="paper", adversarial=True, lora=None, validate_every=100)
_TINY = Recipe(
    name="tiny-trajectory",
    lora=LoraSpec(rank=64),
    train_steps=400,
    batch_size=16,
    lr=1e-3,
    head_lr=1e-3,
    warmup=10,
    schedule="cosine",
    ema=0.98,
    head_width=64,
)
# Without R1 the heads soon tell every fake of so small a world, and their gradient turns to noise:
# docs/quality.md.
_TINY_ADVERSARIAL = replace(
    _TINY, name="tiny-adversarial", adversarial=True, lr=3e-4, train_steps=120, r1_weight=10.0
)

_SF_V = Recipe(
    name="sf-v",
    sf_v=SfvSpec(),
    student_steps=1,
    lora=None,
    train_steps=50_000,
    batch_size=32,
    accumulate=4,
    lr=1e-5,
    head_lr=1e-4,
    betas=(0.5, 0.999),
    head_betas=(0.5, 0.999),
    weight_decay=0.0,
    ema=0.95,
    adv_weight=1.0,
    gan_loss="hinge",
    head_kind="spatial_temporal",
    head_conditioning=True,
    r1="features",
    r1_weight=1.0,
    validate_every=100,
)
_LADD = replace(
    _SF_V, name="ladd", sf_v=None, ladd=LaddSpec(), student_steps=4,
    key_times=(1.0, 0.75, 0.5, 0.25, 0.0),
)  # fmt: skip
_CONSISTENCY = Recipe(
    name="consistency", consistency=ConsistencySpec(), student_steps=4, lora=LoraSpec(),
    train_steps=10_000, lr=1e-4, ema=0.95, weight_decay=0.0, validate_every=100,
)  # fmt: skip
_TINY_SF_V = replace(
    _SF_V, name="tiny-sf-v", lora=LoraSpec(rank=64), train_steps=800, batch_size=16, accumulate=1,
    lr=6e-4, head_lr=2e-3, warmup=10, schedule="cosine", ema=0.98, head_width=64, validate_every=0,
)  # fmt: skip

PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # As published: full fine-tuning of all weights, 1200 updates of 32 samples.
        _PAPER,
        replace(_PAPER, name="accvideo"),  # the same under the name people look for
        # One card: the same with adapters, and only Eq. 6.
        replace(_PAPER, name="trajectory", adversarial=False, lora=LoraSpec(), lr=1e-4, warmup=20),
        # One card: adapters, Eq. 6 and Eq. 7, usually from a trajectory student.
        replace(_PAPER, name="adversarial", lora=LoraSpec(), lr=5e-5, warmup=20),
        # The embedded teacher, minutes on a laptop CPU.
        _TINY,
        _TINY_ADVERSARIAL,
        replace(_TINY, name="tiny-trajectory-2", student_steps=2),
        replace(_TINY_ADVERSARIAL, name="tiny-adversarial-2", student_steps=2),
        # SF-V, and what it compares itself with.
        _SF_V,
        _LADD,
        replace(_LADD, name="ufogen", ladd=None, ufogen=UfogenSpec()),
        _CONSISTENCY,
        _TINY_SF_V,
        replace(_TINY_SF_V, name="tiny-ladd", sf_v=None, ladd=LaddSpec(), student_steps=4),
        replace(_TINY_SF_V, name="tiny-ufogen", sf_v=None, ufogen=UfogenSpec(), student_steps=4),
        replace(_TINY, name="tiny-consistency", consistency=ConsistencySpec(), student_steps=4),
    )
}


def preset(name: str) -> Recipe:
    """The preset called `name`."""
    if name not in PRESETS:
        raise AccVideoError(f"there is no recipe {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]

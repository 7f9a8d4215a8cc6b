"""Recipe: every choice of a distillation run in one frozen, validated record; and named presets.

AccVideo leaves much open (optimiser details, head layers, what an iteration is); each such point is
one field here, with our default and its reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import AccVideoError
from ..fields import check_fields
from ..flow import Times, key_indices, validate_times
from .student import LoraSpec

SCHEDULES = ("constant", "cosine", "linear")
GAN_NAMES = ("logistic", "hinge")
CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": SCHEDULES,
    "gan_loss": GAN_NAMES,
    "iteration": ("interval", "sweep"),
    "updates": ("summed", "separate"),
    "rollout": ("direct", "queued"),
    "heads": ("timestep", "shared"),
    "head_kind": ("spatial", "spatial_temporal"),
    "r1": ("approximate", "features"),
    "optimizer": ("adamw", "adamw_8bit", "adafactor"),
    "best_by": ("latent_mse", "motion", "saturation", "diversity"),
}
"""What the fields that hold a name may be."""


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
    ones along time (SF-V), should students learn to stand still."""
    head_conditioning: bool = False
    """Project the prompt onto the heads' features, and the frame's index onto the spatial ones'
    (SF-V, StyleGAN-T); the paper tells none."""
    head_width: int = 256
    """Channels of a head."""
    feature_blocks: tuple[int, ...] | None = None
    """Teacher blocks (from 0) that the heads look at; None takes the paper's: the last one for
    t > 0, the one at two thirds of the depth for t = 0."""
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
        for check in (_check_numbers, _check_names, _check_shapes, _check_together):
            check(self)

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
        return cls(**values)


def _check_numbers(recipe: Recipe) -> None:
    rules = [
        (1, None, ("student_steps", "train_steps", "batch_size", "accumulate", "head_width")),
        (1, None, ("checkpoint_every", "keep_checkpoints", "trajectories", "head_updates")),
        (1, None, ("validation_clips", "patience")),
        (0, None, ("warmup", "weight_decay", "trajectory_weight", "adv_weight", "r1_weight")),
        (0, None, ("swap_blocks", "validate_every")),
        (0, 1, ("ema",)),
    ]
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, float) and math.isinf(value):
            raise AccVideoError(f"recipe.{field.name} is {value}; it must be finite")
    for low, high, names in rules:
        for name in names:
            value = getattr(recipe, name)
            if value is not None and not (value >= low and (high is None or value < high)):
                bound = f"at least {low}" + ("" if high is None else f" and below {high}")
                raise AccVideoError(f"recipe.{name} is {value}; it must be {bound}")
    for name in ("lr", "head_lr", "clip", "clean_time_shift", "r1_sigma"):
        value = getattr(recipe, name)
        if value is not None and not value > 0:
            raise AccVideoError(f"recipe.{name} is {value}; it must be positive")
    for name in ("betas", "head_betas"):
        betas = getattr(recipe, name)
        if len(betas) != 2 or any(not 0 <= beta < 1 for beta in betas):
            raise AccVideoError(
                f"recipe.{name} is {betas}; it holds two numbers of at least 0 and below 1"
            )


def _check_names(recipe: Recipe) -> None:
    for name, choices in CHOICES.items():
        value = getattr(recipe, name)
        if value not in choices and not (value is None and name == "best_by"):
            raise AccVideoError(f"recipe.{name} is {value!r}; choose one of {', '.join(choices)}")


def _check_shapes(recipe: Recipe) -> None:
    if recipe.feature_blocks == ():
        raise AccVideoError("recipe.feature_blocks is empty; name a block, or use None")
    blocks = recipe.feature_blocks or ()
    if any(block < 0 for block in blocks) or len(set(blocks)) < len(blocks):
        raise AccVideoError(
            f"recipe.feature_blocks is {blocks}; name every block once, counted from 0"
        )
    if recipe.batch_size % recipe.accumulate:
        raise AccVideoError(
            f"recipe.accumulate is {recipe.accumulate}, which does not divide "
            f"recipe.batch_size {recipe.batch_size}; choose a divisor"
        )
    if recipe.key_times is None:
        return
    if len(validate_times(recipe.key_times)) != recipe.student_steps + 1:
        raise AccVideoError(
            f"recipe.key_times holds {len(recipe.key_times)} times; {recipe.student_steps} "
            f"student steps need {recipe.student_steps + 1}"
        )


def _check_together(recipe: Recipe) -> None:
    """Fields that need one another."""
    if recipe.swap_blocks and recipe.lora is None:
        raise AccVideoError(
            f"recipe.swap_blocks is {recipe.swap_blocks}, but weights that are trained cannot wait "
            "in main memory; train a LoRA, or set it to 0"
        )
    if recipe.swap_blocks and not recipe.gradient_checkpointing:
        raise AccVideoError(
            f"recipe.swap_blocks is {recipe.swap_blocks}, which needs gradient_checkpointing; "
            "switch that on, or set swap_blocks to 0"
        )
    for name in ("best_by", "patience"):
        if getattr(recipe, name) is not None and not recipe.validate_every:
            raise AccVideoError(
                f"recipe.{name} is {getattr(recipe, name)}, but nothing is looked at; "
                "set validate_every, such as 100"
            )
    if recipe.patience is not None and recipe.best_by is None:
        raise AccVideoError(
            f"recipe.patience is {recipe.patience} without a figure to go by; "
            f"set best_by to one of {', '.join(CHOICES['best_by'])}"
        )


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
    )
}


def preset(name: str) -> Recipe:
    """The preset called `name`."""
    if name not in PRESETS:
        raise AccVideoError(f"there is no recipe {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]

"""Nodes that train: a student from recorded trajectories, and its adversarial tuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import comfy.model_management
from comfy_api.latest import io

from ..accvideo_core.distill.recipes import GAN_NAMES, PRESETS, Recipe
from ..accvideo_core.distill.recipes import preset as preset_recipe
from ..accvideo_core.distill.student import LoraSpec
from . import paths
from .devices import on_device
from .monitor import NodeMonitor
from .previews import previewer
from .sockets import AccVideoDataset, AccVideoModel, AccVideoStudent, StudentHandle

if TYPE_CHECKING:
    from ..accvideo_core.models.loading import Teacher
    from ..accvideo_core.trajectories.store import TrajectoryDataset

CATEGORY = "AccVideo/train"
ALIASES = ["distillation", "training", "few-step", "turbo", "lightning", "lcm", "LoRA"]


class AccVideoDistill(io.ComfyNode):
    """A few-step student, trained on recorded trajectories."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoDistill",
            display_name="Distill Student",
            category=CATEGORY,
            description="Train a student to take in one step what took the teacher many "
            "(trajectory guidance). Cancelled training goes on where it stopped when queued again.",
            search_aliases=ALIASES,
            inputs=[
                AccVideoModel.Input("model", tooltip="The teacher that recorded the dataset."),
                AccVideoDataset.Input("dataset", tooltip="Its recorded trajectories."),
                _run_name("my_student"),
                _preset("trajectory"),
                io.Int.Input(
                    "student_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps the student will take; they must divide the dataset's kept "
                    "steps. 0 is the preset's number.",
                ),
                *_training_widgets(),
                io.Combo.Input(
                    "student_type",
                    options=["preset", "lora", "full"],
                    default="preset",
                    tooltip="lora trains small adapters on the teacher's weights, full trains a "
                    "copy of all weights, which needs several times the memory.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Rank of the adapters of a lora student. 0 is the preset's.",
                ),
                _seed(),
                *_memory_widgets(),
            ],
            outputs=_outputs(),
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, run: str) -> bool | str:
        return paths.complaint(paths.run_folder, run)

    @classmethod
    def execute(
        cls,
        model: Teacher,
        dataset: TrajectoryDataset,
        run: str,
        preset: str,
        student_steps: int,
        train_steps: int,
        batch_size: int,
        learning_rate: float,
        student_type: str,
        rank: int,
        seed: int,
        **memory: Any,
    ) -> io.NodeOutput:
        base = preset_recipe(preset)
        recipe = _changed(
            base, train_steps=train_steps, batch_size=batch_size, lr=learning_rate,
            student_steps=student_steps,
        )  # fmt: skip
        recipe = replace(recipe, lora=_lora(base, student_type, rank), seed=seed, **memory)
        return _train(model, dataset, recipe, run)


class AccVideoAdversarialTune(io.ComfyNode):
    """The second stage: the student against heads on the teacher's features."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoAdversarialTune",
            display_name="Tune Student Adversarially",
            category=CATEGORY,
            description="Go on training a student, now also against discriminator heads on the "
            "frozen teacher's features, which sharpens what few steps blur.",
            search_aliases=[*ALIASES, "GAN", "adversarial"],
            inputs=[
                AccVideoModel.Input("model", tooltip="The teacher that recorded the dataset."),
                AccVideoDataset.Input("dataset", tooltip="Its recorded trajectories."),
                AccVideoStudent.Input(
                    "student", tooltip="The student to start from; it is not changed itself."
                ),
                _run_name("my_student_tuned"),
                _preset("adversarial"),
                *_training_widgets(),
                io.Float.Input(
                    "adversarial_weight",
                    default=0.1,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Weight of the adversarial term beside trajectory guidance (lambda).",
                ),
                io.Combo.Input(
                    "gan_loss",
                    options=list(GAN_NAMES),
                    default=GAN_NAMES[0],
                    tooltip="logistic is the non-saturating loss, hinge the bounded one.",
                ),
                io.Float.Input(
                    "head_learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    tooltip="Learning rate of the heads. 0 is the preset's.",
                ),
                _seed(),
                *_memory_widgets(),
            ],
            outputs=_outputs(),
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, run: str) -> bool | str:
        return paths.complaint(paths.run_folder, run)

    @classmethod
    def execute(
        cls,
        model: Teacher,
        dataset: TrajectoryDataset,
        student: StudentHandle,
        run: str,
        preset: str,
        train_steps: int,
        batch_size: int,
        learning_rate: float,
        adversarial_weight: float,
        gan_loss: str,
        head_learning_rate: float,
        seed: int,
        **memory: Any,
    ) -> io.NodeOutput:
        info = student.student.info
        recipe = _changed(
            preset_recipe(preset), train_steps=train_steps, batch_size=batch_size,
            lr=learning_rate, head_lr=head_learning_rate,
        )  # fmt: skip
        recipe = replace(
            recipe, adversarial=True, adv_weight=adversarial_weight, gan_loss=gan_loss,
            student_steps=len(info.key_times) - 1, key_times=info.key_times, lora=info.lora,
            seed=seed, **memory,
        )  # fmt: skip
        return _train(model, dataset, recipe, run, student)


def _train(
    model: Teacher,
    dataset: TrajectoryDataset,
    recipe: Recipe,
    run: str,
    start: StudentHandle | None = None,
) -> io.NodeOutput:
    from ..accvideo_core.distill.trainer import distill

    modules = [start.student.model.module] if start else []
    with on_device(model, *modules) as placed, _in_training():
        result = distill(
            model.model,
            dataset,
            recipe,
            paths.run_folder(run),
            start=start.student if start else None,
            monitor=NodeMonitor(previewer(model)),
        )
        placed.append(result.student.model.module)
    metrics = (*(start.metrics if start else ()), result.metrics_file)
    handle = StudentHandle(result.student, model, metrics)
    return io.NodeOutput(handle, {"loss": list(result.losses)})


@contextmanager
def _in_training() -> Iterator[None]:
    """Tell ComfyUI that gradients are wanted, where it can be told (0.3.50 and later)."""
    management: Any = comfy.model_management
    before = getattr(management, "in_training", None)
    if before is None:
        yield
        return
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before


def _changed(base: Recipe, **wanted: Any) -> Recipe:
    """The preset with every wanted value that is not 0."""
    return replace(base, **{name: value for name, value in wanted.items() if value})


def _lora(base: Recipe, student_type: str, rank: int) -> LoraSpec | None:
    if student_type == "full" or (student_type == "preset" and base.lora is None):
        return None
    lora = base.lora or LoraSpec()
    return replace(lora, rank=rank) if rank else lora


def _run_name(default: str) -> io.Input:
    return io.String.Input(
        "run",
        default=default,
        tooltip="Name of the run, a folder in output/accvideo/runs that holds its checkpoints and "
        "metrics. The same name goes on with the same run.",
    )


def _preset(default: str) -> io.Input:
    return io.Combo.Input(
        "preset",
        options=list(PRESETS),
        default=default,
        tooltip="Where every setting comes from that is left at 0. tiny ones are for the embedded "
        "teacher, paper is what AccVideo published.",
    )


def _training_widgets() -> list[io.Input]:
    return [
        io.Int.Input(
            "train_steps",
            default=0,
            min=0,
            max=1_000_000,
            tooltip="Optimiser updates. 0 is the preset's number.",
        ),
        io.Int.Input(
            "batch_size",
            default=0,
            min=0,
            max=4096,
            tooltip="Trajectories per update. 0 is the preset's number.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-6,
            tooltip="Learning rate of the student. 0 is the preset's.",
        ),
    ]


def _seed() -> io.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**63 - 1,
        control_after_generate=False,
        tooltip="Seed of everything random in the run.",
    )


def _memory_widgets() -> list[io.Input]:
    return [
        io.Int.Input(
            "accumulate",
            default=1,
            min=1,
            max=4096,
            optional=True,
            advanced=True,
            tooltip="Parts that a batch is computed in: more parts need less memory and more time.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Recompute activations in the backward pass: less memory, a third more time.",
        ),
        io.Int.Input(
            "checkpoint_every",
            default=100,
            min=1,
            max=1_000_000,
            optional=True,
            advanced=True,
            tooltip="Updates between checkpoints. Cancelling writes one at once.",
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        AccVideoStudent.Output("student", tooltip="The trained student, with its key times."),
        io.LossMap.Output("loss_map", tooltip="The loss at every update."),
    ]

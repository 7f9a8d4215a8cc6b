"""Nodes that train: a student from recorded trajectories, and its adversarial tuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import comfy.model_management
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..accvideo_core.distill.recipes import GAN_NAMES, Recipe
from ..accvideo_core.distill.recipes import preset as preset_recipe
from ..accvideo_core.distill.student import LoraSpec
from ..accvideo_core.errors import AccVideoError
from . import paths
from .devices import decoder_beside, on_device
from .previews import pair, previewer
from .sockets import AccVideoDataset, AccVideoModel, AccVideoStudent, StudentHandle
from .train_inputs import (
    length_widgets,
    memory_widgets,
    more_widgets,
    parsed,
    preset_choice,
    recipe_choice,
    recipe_of,
    run_name,
    seed_widget,
)
from .train_monitor import TrainMonitor

if TYPE_CHECKING:
    from torch import Tensor

    from ..accvideo_core.distill.student import Student, StudentInfo
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
                run_name("my_student"),
                preset_choice("trajectory"),
                io.Int.Input(
                    "student_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps the student will take; they must divide the dataset's kept "
                    "steps. 0 is the preset's number.",
                ),
                *length_widgets(),
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
                seed_widget(),
                *memory_widgets(),
                *more_widgets(),
            ],
            outputs=_outputs(),
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, run: str, settings: str = "") -> bool | str:
        return _complaint(run, settings)

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
        settings: str = "",
        **more: Any,
    ) -> io.NodeOutput:
        lora = _lora(preset_recipe(preset), student_type, rank)
        own = {"lora": None if lora is None else asdict(lora), "seed": seed}
        recipe = recipe_of(
            preset, {**own, **parsed(settings)}, train_steps=train_steps, batch_size=batch_size,
            lr=learning_rate, student_steps=student_steps, **more,
        )  # fmt: skip
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
                run_name("my_student_tuned"),
                preset_choice("adversarial"),
                *length_widgets(),
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
                seed_widget(),
                *memory_widgets(),
                *more_widgets(
                    recipe_choice(
                        "rollout",
                        "direct makes every fake from fresh noise; queued spreads that over as "
                        "many updates as the student has steps, which is cheaper (Algorithm 1).",
                    ),
                    recipe_choice(
                        "head_kind",
                        "spatial_temporal heads also look along time, should students learn to "
                        "stand still.",
                    ),
                ),
            ],
            outputs=_outputs(),
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, run: str, settings: str = "") -> bool | str:
        return _complaint(run, settings)

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
        settings: str = "",
        **more: Any,
    ) -> io.NodeOutput:
        own = {"adv_weight": adversarial_weight, "gan_loss": gan_loss, "seed": seed}
        fixed = _of_student(student.student.info, preset)
        recipe = recipe_of(
            preset, {**own, **parsed(settings, taken=fixed), **fixed}, train_steps=train_steps,
            batch_size=batch_size, lr=learning_rate, head_lr=head_learning_rate, **more,
        )  # fmt: skip
        return _train(model, dataset, recipe, run, student)


def _of_student(info: StudentInfo, preset: str) -> dict[str, Any]:
    """Fields of the recipe that the student to start from decides, and tuning itself."""
    return {
        # Other methods are adversarial, or not, by themselves.
        "adversarial": preset_recipe(preset).method == "accvideo",
        "student_steps": len(info.key_times) - 1,
        "key_times": info.key_times,
        "lora": None if info.lora is None else asdict(info.lora),
    }


def _train(
    model: Teacher,
    dataset: TrajectoryDataset,
    recipe: Recipe,
    run: str,
    start: StudentHandle | None = None,
) -> io.NodeOutput:
    from ..accvideo_core.distill.trainer import distill
    from ..accvideo_core.models.swapping import spread_blocks

    modules = [start.student.model.module] if start else []
    waiting = spread_blocks(model.model, recipe.swap_blocks)
    with on_device(model, *modules, waiting=waiting) as placed, _in_training():
        result = distill(
            model.model,
            dataset,
            recipe,
            paths.run_folder(run),
            start=start.student if start else None,
            decode=decoder_beside(model),
            monitor=TrainMonitor(run, previewer(model, pair)),
        )
        placed.append(result.student.model.module)
    metrics = (*(start.metrics if start else ()), result.metrics_file)
    handle = StudentHandle(result.student, model, metrics)
    return io.NodeOutput(handle, {"loss": list(result.losses)}, _lora_model(result.student))


def _lora_model(student: Student) -> dict[str, Tensor] | ExecutionBlocker:
    """The student's LoRA; where it has none, only the nodes that ask for it are told so."""
    from ..accvideo_core.export import native_lora

    try:
        return native_lora(student)
    except AccVideoError as error:
        return ExecutionBlocker(str(error))


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


def _lora(base: Recipe, student_type: str, rank: int) -> LoraSpec | None:
    if student_type == "full" or (student_type == "preset" and base.lora is None):
        return None
    lora = base.lora or LoraSpec()
    return replace(lora, rank=rank) if rank else lora


def _complaint(run: str | None, settings: str | None) -> bool | str:
    """What is wrong with a run's name or with settings; linked ones are not known yet."""
    first = paths.complaint(paths.run_folder, run)
    return paths.complaint(parsed, settings) if first is True else first


def _outputs() -> list[io.Output]:
    return [
        AccVideoStudent.Output("student", tooltip="The trained student, with its key times."),
        io.LossMap.Output("loss_map", tooltip="The loss at every update."),
        io.LoraModel.Output(
            "lora_model",
            tooltip="The student's LoRA in ComfyUI's names, for Save LoRA Weights and Load LoRA "
            "Model. A full student has none: what is linked here is then not run.",
        ),
    ]

"""Rehearsal: one update of a run without values, and the bytes that it held.

Student, teacher, objective and heads are built as the run builds them, on torch's meta device, and
one part of an update goes forward and back while a ledger counts.

Shapes: B batch, C channels, T latent frames, H, W latent size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..conditioning import Condition
from ..models.compiling import replaced_forward
from ..models.experts import networks_of
from ..models.footprint import on_meta, tensor_bytes, tensors_of, without_values
from ..models.ledger import Ledger, fused_kernels
from ..models.video_model import VideoModel
from .batch import KeyBatch
from .memory import OFFLOADED_BYTES, savings
from .methods import METHODS
from .objective import Terms
from .recipes import Recipe
from .setting import Setting
from .student import Student, StudentInfo


class Rehearsal:
    """Bytes that were counted. The optimiser, the running average and swapping are not in them."""

    def __init__(
        self,
        teacher: VideoModel,
        info: StudentInfo,
        recipe: Recipe,
        batch: KeyBatch,
        device: torch.device,
    ) -> None:
        self.activations = 0
        """Kept for the backward pass of the term that keeps most."""
        self.offloaded = 0
        """The same in main memory."""
        self.by_block: dict[int, int] = {}
        """What every block of the student adds to what is kept."""
        self.after = 0
        """What is there when an optimiser takes over."""
        self.ledger = Ledger()
        # ComfyUI runs nodes in inference mode, in which nothing can be trained.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            fused_kernels(device),
            self.ledger,
            ExitStack() as stack,
        ):
            module = without_values(teacher.module)
            self.weights = self.ledger.live
            frozen = replace(teacher, module=module, _fingerprint=info.base)
            student = Student.create(frozen, info, recipe.seed)
            own = stack.enter_context(savings(student, _counted(recipe)))
            self.away = _MainMemory()
            if recipe.offload_activations and device.type != "cpu":
                stack.enter_context(self.away.taking_from(student.model, own))
            self._play(student, own, recipe, batch)

    def _play(self, student: Student, teacher: VideoModel, recipe: Recipe, batch: KeyBatch) -> None:
        ledger = self.ledger
        preview = batch_without_values(batch, 1)
        self.trained, self.heads = list(student.trainable().values()), []
        held: list[KeyBatch] = []

        def real(count: int) -> KeyBatch:
            """So many lie there, and the heads see one at a time."""
            held.append(batch_without_values(batch, count))
            return preview

        setting = Setting(_counted(recipe), teacher, student.key_times, real)
        objective = METHODS[recipe.method].build(setting)
        held.clear()
        if objective.heads is not None:
            self.heads = list(objective.heads.parameters())
        self.building = ledger.peak
        """The most at once before the first update."""
        whole = batch_without_values(batch, recipe.batch_size)
        self.batch = _batch_bytes(whole) + _batch_bytes(preview)
        part = next(whole.split(recipe.accumulate))
        self._watch_blocks(student, part)
        ledger.peak = ledger.live
        several = recipe.accumulate > 1 or recipe.iteration == "sweep"
        for phase in objective.phases:
            for p in (*self.trained, *self.heads):  # of the parts before, or used up
                p.grad = torch.empty_like(p) if several else None
            self._backpropagate(phase.terms, student, part)
        self.peak = ledger.peak
        """The most at once in an update."""

    def _backpropagate(self, terms: Terms, student: Student, part: KeyBatch) -> None:
        """Every term forward and back, at the noisiest key time: its features are the deepest."""
        ledger, away = self.ledger, self.away
        before = ledger.live
        for term in terms(student, part, part.intervals - 1):
            self.activations = max(self.activations, ledger.live - before)
            self.offloaded, away.bytes = max(self.offloaded, away.bytes), 0
            inputs = self.heads if term.trains_heads else self.trained
            torch.autograd.backward(term.loss, inputs=inputs)
            before = ledger.live
        self.after = max(self.after, ledger.live)

    def _watch_blocks(self, student: Student, part: KeyBatch) -> None:
        """Note what every block leaves behind in its first pass."""
        before: dict[int, int] = {}

        def enter(index: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                before.setdefault(index, self.ledger.live)

            return hook

        def leave(index: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self.by_block.setdefault(index, self.ledger.live - before[index])

            return hook

        expert = student.model.expert(part.t[-1])
        for index, block in enumerate(student.model.family.blocks(expert)):
            block.register_forward_pre_hook(enter(index))
            block.register_forward_hook(leave(index))


class _MainMemory:
    """Where what autograd keeps of the networks' passes goes; `bytes` counts what came since it was
    last set to 0. The rules are those of `memory.offloaded_activations`.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._weights: set[int] = set()
        self._here: dict[int, weakref.ref[Any]] = {}

    def taking_from(self, *models: VideoModel) -> ExitStack:
        """Inside, the models' passes are offloaded."""
        with ExitStack() as stack:
            for model in models:
                self._weights |= {id(x.untyped_storage()) for x in tensors_of(model.module)}
                for network in networks_of(model.module).values():
                    forward = self._around(network.forward)
                    stack.enter_context(replaced_forward(network, forward))
            return stack.pop_all()

    def _around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def offloading(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(self._leave, self._come_back):
                return forward(*args, **kwargs)

        return offloading

    def _leave(self, x: Tensor) -> Tensor | tuple[torch.Size, torch.dtype]:
        storage, size = x.untyped_storage(), tensor_bytes([x])
        if storage.nbytes() < max(OFFLOADED_BYTES, size) or id(storage) in self._weights:
            return x
        known = self._here.get(id(storage))
        if known is None or known() is not storage:
            self._here[id(storage)] = weakref.ref(storage)
            self.bytes += size
        return x.shape, x.dtype

    @staticmethod
    def _come_back(kept: Tensor | tuple[torch.Size, torch.dtype]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return torch.empty(kept[0], dtype=kept[1], device="meta")


def _counted(recipe: Recipe) -> Recipe:
    """Without what moves or compiles values, or draws a time that no byte depends on."""
    return replace(
        recipe, swap_blocks=0, offload_activations=False, compile=False, clean_time_shift=None
    )


def batch_without_values(batch: KeyBatch, size: int | None = None) -> KeyBatch:
    """`size` samples (None: as many) like those of `batch`, on the meta device.

    Their texts are as long as the longest, and so need no mask.
    """
    count = len(batch.z) if size is None else size

    def like(x: Tensor) -> Tensor:
        return on_meta(x[:1].expand(count, *x.shape[1:]))

    named = {name: like(x) for name, x in batch.cond.trim().tensors().items() if name != "mask"}
    z = like(batch.z)
    latents = on_meta(z.expand(len(batch.t), *z.shape))
    u, records = torch.zeros(count), (0,) * count
    return KeyBatch(latents, batch.t, Condition(**named), z, u, records)


def _batch_bytes(batch: KeyBatch) -> int:
    return tensor_bytes((batch.latents, batch.z, *batch.cond.tensors().values()))

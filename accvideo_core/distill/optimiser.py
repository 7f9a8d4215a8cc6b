"""Role: parameters that are trained together, with their optimiser, clipping and learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import AccVideoError
from .recipes import Recipe
from .sharded_tensors import assign, clip_grad_norm, is_sharded, placed, snapshot, untouched

Betas = tuple[float, float]
Make = Callable[[list[nn.Parameter], Betas, float], Optimizer]
"""(parameters, betas, weight decay) -> optimiser; a role sets the learning rate at every step."""


def _adamw() -> Make:
    """8 bytes of moments a parameter."""
    return lambda parameters, betas, decay: torch.optim.AdamW(
        parameters, betas=betas, weight_decay=decay
    )


def _adamw_8bit() -> Make:
    """AdamW with its moments in 8 bits; those of tensors under 4096 numbers stay float32."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise AccVideoError(
            f"recipe.optimizer adamw_8bit needs bitsandbytes ({error}); pip install bitsandbytes, "
            "or choose adamw or adafactor"
        ) from error
    return lambda parameters, betas, decay: AdamW8bit(parameters, betas=betas, weight_decay=decay)


def _adafactor() -> Make:
    """A row and a column of second moments for a matrix, and no momentum (Shazeer and Stern).

    Steps are relative to the weights' size: it wants a hundred times AdamW's learning rate.
    """
    adafactor: Callable[..., Optimizer] | None = getattr(torch.optim, "Adafactor", None)
    if adafactor is None:
        raise AccVideoError(
            f"recipe.optimizer adafactor needs torch 2.5 or newer, this is {torch.__version__}; "
            "update torch, or choose adamw"
        )
    return lambda parameters, _betas, decay: adafactor(parameters, weight_decay=decay)


OPTIMIZERS: dict[str, Callable[[], Make]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
}


def optimizer_of(recipe: Recipe) -> Make:
    """What makes the recipe's optimiser. Raises AccVideoError where it is not installed."""
    return OPTIMIZERS[recipe.optimizer]()


def lr_factor(recipe: Recipe, step: int) -> float:
    """What the learning rate is multiplied with at update `step` (from 0)."""
    warmup = min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else 1.0
    progress = step / recipe.train_steps
    if recipe.schedule == "cosine":
        return warmup * (1 + math.cos(math.pi * progress)) / 2
    return warmup * (1 - progress) if recipe.schedule == "linear" else warmup


class Role:
    """The student, or the discriminator's heads."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        lr: float,
        betas: Betas,
        recipe: Recipe,
    ) -> None:
        self.parameters = dict(parameters)
        self.others: list[nn.Parameter] = []
        """What other roles train, where this one's parameters are sharded."""
        self.lr = lr
        self.clip_norm = math.inf if recipe.clip is None else recipe.clip
        make = optimizer_of(recipe)
        self.optimizer = make(list(self.parameters.values()), betas, recipe.weight_decay)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to this role's parameters and to no others."""
        if any(is_sharded(p) for p in self.parameters.values()):
            # What FSDP gathers is differentiated in place of the parameters, and has no name here.
            with untouched(self.others):
                loss.backward()
        else:
            loss.backward(inputs=list(self.parameters.values()))

    def clip(self) -> float:
        """Limit the gradient; returns its norm before."""
        return clip_grad_norm(self.parameters.values(), self.clip_norm)

    def step(self, factor: float) -> None:
        """One update at `factor` times the learning rate; parameters without gradient stay."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The optimiser's state in main memory during the block, afterwards where it was."""
        moved = [
            (state, key, x.device)
            for state in self.optimizer.state.values()
            for key, x in state.items()
            if isinstance(x, Tensor) and x.device.type != "cpu"
        ]
        for state, key, _ in moved:
            state[key] = state[key].to("cpu")
        try:
            yield
        finally:
            for state, key, device in moved:
                state[key] = state[key].to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and what the optimiser remembers of them, on the CPU under flat names.

        What is sharded stays so, on its device.
        """
        state: dict[str, Tensor] = {f"value:{name}": p for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            for key, x in self.optimizer.state[p].items():
                # bitsandbytes counts its steps in a plain number.
                state[f"{key}:{name}"] = x if isinstance(x, Tensor) else torch.tensor(x)
        return {name: snapshot(x) for name, x in state.items()}

    @staticmethod
    def values(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters alone in what `state_dict` gave."""
        return {n.removeprefix("value:"): x for n, x in state.items() if n.startswith("value:")}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        for parameter, x in self.values(state).items():
            assign(self.parameters[parameter], x)
        self.optimizer.state.clear()
        for name, x in state.items():
            key, parameter = name.split(":", 1)
            if key != "value":
                p = self.parameters[parameter]
                self.optimizer.state[p][key] = _as_it_was(x, p)


def _as_it_was(x: Tensor, parameter: nn.Parameter) -> Any:
    """What an optimiser remembers of a parameter, from a checkpoint.

    Set as it is: an optimiser's own `load_state_dict` takes for granted that it has the parameter's
    dtype. Steps are counted on the CPU, and whole ones in plain numbers.
    """
    if x.dim() > 0:
        return placed(x, parameter).to(parameter.device, copy=True)
    return x.clone() if x.is_floating_point() else x.item()


class Average:
    """Running average of a role's parameters; young averages forget faster."""

    def __init__(self, role: Role, decay: float) -> None:
        self.role, self.decay = role, decay
        self.values = {name: p.detach().clone() for name, p in role.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After update `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in self.role.parameters.items():
            self.values[name].lerp_(p, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averaged values in the parameters during the block, and then back, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self.role.parameters.items():
            kept = p.detach().clone()
            p.copy_(self.values[name])
            self.values[name].copy_(kept)

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, x in state.items():
            assign(self.values[name], x)

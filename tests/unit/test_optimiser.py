"""Every optimiser of a role: it learns, and goes on from a checkpoint with the same bits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from accvideo_core.distill.checkpoint import load_checkpoint, save_checkpoint
from accvideo_core.distill.optimiser import OPTIMIZERS, Role
from accvideo_core.distill.recipes import CHOICES, Recipe
from accvideo_core.errors import AccVideoError

LR = {"adamw": 1e-2, "adamw_8bit": 1e-2, "adafactor": 1e-1}
SHAPES = {"large": (128, 64), "small": (5, 3), "bias": (7,), "kernel": (4, 3, 2, 2), "idle": (2, 2)}
"""bitsandbytes keeps what has fewer than 4096 numbers in 32 bits; "idle" never has a gradient."""


@pytest.fixture(params=LR)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    if request.param == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="8-bit AdamW needs bitsandbytes")
    if request.param == "adafactor" and not hasattr(torch.optim, "Adafactor"):
        pytest.skip("this torch has no Adafactor")
    return Recipe(optimizer=request.param, lr=LR[request.param], weight_decay=1e-2, warmup=3)


def role_of(recipe: Recipe) -> Role:
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }
    return Role(parameters, recipe.lr, recipe.betas, recipe)


def train(role: Role, first: int, last: int) -> list[float]:
    """Updates `first` to `last` towards a random target; their losses."""
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        terms = [
            (p - 1 - 0.1 * torch.randn(p.shape, generator=generator)).square().mean()
            for name, p in role.parameters.items()
            if name != "idle"
        ]
        loss = torch.stack(terms).sum()
        role.backward(loss)
        role.clip()
        role.step(min(1.0, (step + 1) / 3))
        losses.append(loss.item())
    return losses


def test_every_choice_of_a_recipe_is_there() -> None:
    assert tuple(OPTIMIZERS) == CHOICES["optimizer"]


def test_it_learns(recipe: Recipe) -> None:
    losses = train(role_of(recipe), 0, 60)
    assert losses[-1] < 0.7 * losses[0]


def test_it_goes_on_from_a_file_with_the_same_bits(recipe: Recipe, tmp_path: Path) -> None:
    whole = role_of(recipe)
    losses = train(whole, 0, 9)
    first = role_of(recipe)
    train(first, 0, 5)
    save_checkpoint(tmp_path, 5, {"student": first.state_dict()}, keep=1)
    found = load_checkpoint(tmp_path)
    assert found is not None
    state = found[1]["student"]

    resumed = role_of(recipe)
    train(resumed, 20, 22)  # whatever it was, it is replaced
    resumed.load_state_dict(state)
    again = resumed.state_dict()
    assert again.keys() == state.keys()
    for name, x in state.items():
        assert torch.equal(again[name], x) and again[name].dtype == x.dtype, name
    assert train(resumed, 5, 9) == losses[5:]
    for name, x in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], x), name


def test_what_is_kept_of_a_matrix(recipe: Recipe) -> None:
    role = role_of(recipe)
    train(role, 0, 2)
    state = role.state_dict()
    kept = {n: x for n, x in state.items() if n.endswith(":large") and not n.startswith("value")}
    size = sum(x.numel() * x.element_size() for x in kept.values())
    numbers = 128 * 64
    if recipe.optimizer == "adamw":
        assert 8 * numbers <= size < 8 * numbers + 100
    elif recipe.optimizer == "adamw_8bit":
        assert {x.dtype for x in kept.values()} >= {torch.uint8} and size < 2.6 * numbers
        assert state["state1:small"].dtype == torch.float32
    else:
        assert 4 * (128 + 64) <= size < 4 * (128 + 64) + 100
    assert not any(name.endswith(":idle") and not name.startswith("value") for name in state)


def test_a_missing_library_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(AccVideoError, match="adamw_8bit needs bitsandbytes .* pip install"):
        role_of(Recipe(optimizer="adamw_8bit"))
    monkeypatch.delattr(torch.optim, "Adafactor", raising=False)
    with pytest.raises(AccVideoError, match="adafactor needs torch 2.5 or newer, this is"):
        role_of(Recipe(optimizer="adafactor"))

"""Recipes for people: found by name or in a file, changed field by field, shown with meanings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from ..errors import AccVideoError
from ..fields import field_docs
from ..files import disk_errors
from .recipes import PRESETS, Recipe
from .run import CONFIG_FILE


def find_recipe(text: str) -> Recipe:
    """The recipe that `text` names: a preset, a JSON file, or a run folder, whose recipe it is.

    Raises:
        AccVideoError: there is none, or what there is is no recipe; the message says where.
    """
    path = Path(text)
    if text in PRESETS:
        return PRESETS[text]
    if path.is_dir():
        return read_recipe(path / CONFIG_FILE)
    if path.is_file() or path.suffix == ".json":
        return read_recipe(path)
    raise AccVideoError(
        f"there is no recipe {text!r}; choose one of {', '.join(PRESETS)}, or a .json file"
    )


def read_recipe(path: Path) -> Recipe:
    """The recipe in a JSON file, or in the config.json of a run.

    Raises:
        AccVideoError: no such file, no JSON, an unknown field, or a value that does not fit.
    """
    if not path.is_file():
        raise AccVideoError(
            f"there is no recipe file {path}; make one with accvideo recipe NAME --out FILE"
        )
    with disk_errors("read", path):
        raw = path.read_bytes()
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise AccVideoError(
            f"recipe file {path} is not JSON ({error}); correct it there"
        ) from error
    if path.name == CONFIG_FILE and isinstance(data, Mapping):
        data = data.get("recipe", data)
    if not isinstance(data, Mapping):
        raise AccVideoError(
            f"recipe file {path} holds no object; write it like " + '{"lr": 1e-4, "train_steps": 9}'
        )
    try:
        return Recipe.from_dict(data)
    except AccVideoError as error:
        raise AccVideoError(f"recipe file {path}: {error}") from error


def changed_recipe(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """`recipe` with "lr=1e-4" or "lora.rank=16" or "lora=null" changed.

    Raises:
        AccVideoError: no such field, or a value that does not fit it.
    """
    data: dict[str, Any] = recipe.as_dict()
    for text in changes:
        name, equals, value = text.partition("=")
        if not equals:
            raise AccVideoError(f"{text!r} has no value; write it like lr=1e-4")
        outer, _, inner = name.partition(".")
        if inner and data.get(outer, name) is None:
            data[outer] = {}  # lora.rank=16 gives adapters to a recipe without
        target, key = (data.get(outer), inner) if inner else (data, name)
        if not isinstance(target, dict):
            raise AccVideoError(f"recipe has no field {name!r}; write it like lora.rank=16")
        target[key] = _value(value)
    return Recipe.from_dict(data)


def recipe_json(recipe: Recipe) -> str:
    """The recipe as JSON that `find_recipe` reads back."""
    return json.dumps(recipe.as_dict(), indent=2)


def summary(recipe: Recipe) -> str:
    """A recipe in one line."""
    adapters = "all weights" if recipe.lora is None else f"LoRA of rank {recipe.lora.rank}"
    steps = f"{recipe.student_steps} step" + "s" * (recipe.student_steps > 1)
    work = f"{recipe.train_steps} updates of {recipe.batch_size} samples"
    return f"{steps}, {adapters}, {recipe.title}, {work}, lr {recipe.lr:g}"


def explained(recipe: Recipe) -> str:
    """Every field with its value, its default where that is another, and what it means."""
    note = "Values are JSON, as --set takes them; null is what the texts call None.\n"
    return "\n".join([note, *_explained(recipe, Recipe(), "")])


def _explained(settings: Any, usual: Any, prefix: str) -> Iterator[str]:
    docs = field_docs(type(settings))
    for field in fields(settings):
        name = f"{prefix}{field.name}"
        value, default = getattr(settings, field.name), getattr(usual, field.name)
        nested = is_dataclass(value)
        other = "" if nested or value == default else f"  (default {_json(default)})"
        yield f"{name}:" if nested else f"{name}: {_json(value)}{other}"
        yield fill(docs[field.name], 96, initial_indent="    ", subsequent_indent="    ")
        if nested:
            yield from _explained(value, default or type(value)(), f"{name}.")


def _json(value: Any) -> str:
    return json.dumps(value, default=asdict)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text

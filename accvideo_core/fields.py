"""What a dataclass of settings says of itself: the types of its fields, and what each one means.

The text under a field is its meaning. Python keeps no docstrings of attributes, so they are read
from the class's source, and what a user is shown is what the code says.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from .errors import AccVideoError


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the text that stands under it, as one paragraph; fields without one are left out."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def check_fields(cls: type, data: Mapping[str, Any], called: str) -> None:
    """Refuse names that are no field of `cls` and values that are not of their field's type.

    Args:
        data: as JSON gives it: a list may stand for a tuple, an object for a nested dataclass.
        called: what the sentence calls the settings, such as "recipe".

    Raises:
        AccVideoError: the first of them.
    """
    known = [field.name for field in fields(cls)]
    unknown = sorted(data.keys() - set(known))
    if unknown:
        raise AccVideoError(
            f"{called} has no field {unknown[0]!r}; its fields are {', '.join(known)}"
        )
    hints = get_type_hints(cls)
    for name, value in data.items():
        if not _fits(value, hints[name]):
            raise AccVideoError(
                f"{called}.{name} is {value!r}; it must be {_in_words(hints[name])}"
            )


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if not isinstance(value, (list, tuple)):
            return False
        if inner[-1] is Ellipsis:
            return all(_fits(one, inner[0]) for one in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if hint in (int, float):
        number = int if hint is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, hint) or (is_dataclass(hint) and isinstance(value, Mapping))


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
}


def _in_words(hint: Any) -> str:
    """The type as its JSON: "a list of 2 numbers or null"."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        count = "" if inner[-1] is Ellipsis else f"{len(inner)} "
        word = _in_words(inner[0]).removeprefix("a ")
        return f"a list of {count}{word if word == 'text' else word + 's'}"
    if is_dataclass(hint):
        return f"an object of {', '.join(field.name for field in fields(hint))}"
    return _WORDS[hint]

"""Types and meanings of a dataclass's fields."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest

from accvideo_core.distill.recipes import Recipe
from accvideo_core.distill.student import LoraSpec
from accvideo_core.errors import AccVideoError
from accvideo_core.fields import check_fields, field_docs


@dataclass
class Inner:
    size: int = 1


@dataclass
class Settings:
    """Not a field's text."""

    count: int = 1
    """How many,
    over two lines."""
    rate: float | None = None
    on: bool = False
    "Whether."
    pair: tuple[float, float] = (0.0, 1.0)
    blocks: tuple[int, ...] | None = None
    inner: Inner | None = None

    def method(self) -> None:
        """Not a field's text either."""


def test_the_text_under_a_field_is_its_meaning() -> None:
    assert field_docs(Settings) == {"count": "How many, over two lines.", "on": "Whether."}


@pytest.mark.parametrize("settings", [Recipe, LoraSpec])
def test_every_field_of_a_recipe_has_a_meaning(settings: type) -> None:
    assert list(field_docs(settings)) == [field.name for field in fields(settings)]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"count": 3, "rate": 1, "on": True, "pair": [0.5, 1], "blocks": [1, 2], "inner": None},
        {"rate": 0.5, "pair": (0.0, 1.0), "blocks": (), "inner": {"size": 2}},
        {"rate": None, "blocks": None, "inner": Inner()},
    ],
)
def test_fitting_values_pass(data: dict[str, Any]) -> None:
    check_fields(Settings, data, "settings")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"size": 1}, "settings has no field 'size'; its fields are count, rate, on, pair,"),
        ({"count": 1.5}, "settings.count is 1.5; it must be a whole number"),
        ({"count": True}, "settings.count is True; it must be a whole number"),
        ({"count": None}, "settings.count is None; it must be a whole number"),
        ({"rate": "fast"}, "settings.rate is 'fast'; it must be a number or null"),
        ({"on": "yes"}, "settings.on is 'yes'; it must be true or false"),
        ({"pair": [1]}, r"settings.pair is \[1\]; it must be a list of 2 numbers"),
        ({"pair": "ab"}, "settings.pair is 'ab'"),
        ({"blocks": [1.5]}, "it must be a list of whole numbers or null"),
        ({"inner": 5}, "settings.inner is 5; it must be an object of size or null"),
    ],
)
def test_what_does_not_fit_is_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(AccVideoError, match=message):
        check_fields(Settings, data, "settings")

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from sslkit.api import Component, Scheduled
from sslkit.describe import options


class Sample(Component):
    """A component with an option of every sort."""

    required: int
    """Needed."""
    rate: Scheduled = 0.5
    """A number
    or a schedule."""
    limited: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Limited."""
    perhaps: PositiveFloat | None = None
    """Optional."""
    choice: Literal["a", "b"] | bool = "a"
    """Chosen."""
    pair: tuple[PositiveInt, PositiveInt] = (1, 2)
    """Two."""
    on: bool = True
    """Switch."""


def test_types_defaults_and_help_as_a_reader_of_recipes_would_put_them() -> None:
    shown = {o["name"]: (o["type"], o["default"], o["help"]) for o in options(Sample)}
    assert shown == {
        "required": ("integer", None, "Needed."),
        "rate": ("number | schedule", "0.5", "A number or a schedule."),
        "limited": ("number >= 0 < 1", "0.25", "Limited."),
        "perhaps": ("number > 0", "unset", "Optional."),
        "choice": ("'a' | 'b' | true | false", '"a"', "Chosen."),
        "pair": ("list of (integer, integer)", "[1, 2]", "Two."),
        "on": ("true | false", "true", "Switch."),
    }
    assert [o["name"] for o in options(Sample) if o["required"]] == ["required"]

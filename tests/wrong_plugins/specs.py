"""Faults of specs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from wrong_plugins import Case
from wrong_plugins.right import RightLoss, RightSchedule


class Silent(RightSchedule):
    pass


class Talkative(RightSchedule):
    """A schedule about which there is so much to say that its first line goes on and on, until at last it comes to an end here."""  # noqa: E501


class Breathless(RightSchedule):
    """A line without an end"""


class Unexplained(RightSchedule):
    """Has an option."""

    speed: float = 1.0


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    inner: int = 0


class UnexplainedTable(RightSchedule):
    """Has a table of options."""

    table: Table = Table()
    """What lies in it."""


class Demanding(RightSchedule):
    """Has an option that may be None."""

    speed: float | None
    """Steps, or None."""


class Inconsistent(RightSchedule):
    """Has a default that its type refuses."""

    length: PositiveInt = 0
    """How long."""


class Forgetful(RightSchedule):
    """Has an option whose default is not None though it may be."""

    length: int | None = 3
    """How long, or None for ever."""


def local() -> RightSchedule:
    class Local(RightSchedule):
        """Lies in a function."""

    return Local()


class Lenient(RightSchedule):
    """Takes whatever it is given."""

    model_config = ConfigDict(extra="ignore")


class Swallowing(RightSchedule):
    """Drops what it does not know."""

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, value: Any) -> Any:
        return {name: inner for name, inner in value.items() if name in cls.model_fields}


class Changeable(RightSchedule):
    """Can be changed."""

    model_config = ConfigDict(frozen=False)


class Indescribable(RightSchedule):
    """Has an option that is a function."""

    shape: Callable[[int], float] | None = None
    """Any function."""


class Uninstalled(RightLoss):
    """Has no entry point."""


class Misnamed(RightLoss):
    """Has an entry point of another kind."""


CASES = [
    Case(Silent(), "docstring", "Silent: has no docstring; add one"),
    Case(Talkative(), "docstring", "first line has 1[0-9]+ characters.*keep it to 120"),
    Case(Breathless(), "docstring", "should end with a full stop"),
    Case(Unexplained(), "options_documented", "Unexplained.speed has no help; put a docstring under the field"),
    Case(UnexplainedTable(), "options_documented", "Table.inner has no help"),
    Case(Demanding(speed=1.0), "defaults", "Demanding.speed may be None but has no default.*add `= None`"),
    Case(Inconsistent(length=1), "defaults", "Inconsistent.length: its default is refused .*change the default"),
    Case(Forgetful(length=None), "json_round_trip", "Forgetful.length is not what it was.*be None"),
    Case(local(), "pickle_round_trip", "keep the class at the top level of its module"),
    Case(Lenient(), "unknown_option_refused", "Lenient takes options that it does not have; remove extra="),
    Case(Swallowing(), "unknown_option_refused", "takes the option 'no_such_option'; a validator .* must not drop"),
    Case(Changeable(), "frozen", "remove frozen=False from its model_config"),
    Case(Indescribable(), "schema", "no JSON Schema .* use types for options that TOML has"),
    Case(Uninstalled(), "entry_point", r"\"loss.uninstalled\" = \"wrong_plugins:Uninstalled\"; then pip install -e"),
    Case(Misnamed(), "entry_point", "is a loss, but its entry point is named 'head.misnamed'; name it 'loss.misnamed'"),
]
UNINSTALLED = {"Uninstalled", "Local"}
ELSEWHERE = {"Misnamed": "head"}

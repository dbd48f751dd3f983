from __future__ import annotations

import pytest

from sslkit.errors import RunFailed, UserError
from sslkit.events import Bus, observes


class Listener:
    def __init__(self, name: str, heard: list[str]) -> None:
        self.name, self.heard = name, heard

    @observes
    def run_ended(self, status: str) -> None:
        self.heard.append(f"{self.name} {status}")

    def state_dict(self) -> dict[str, str]:
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, str]) -> None:
        self.name = state["name"]


def test_observers_are_called_in_the_order_of_the_recipe() -> None:
    heard: list[str] = []
    Bus({"a": Listener("a", heard), "b": Listener("b", heard)}).emit("run_ended", run=None, status="done")
    assert heard == ["a done", "b done"]


def test_a_misspelt_event_is_refused() -> None:
    class Wrong:
        @observes
        def step_endet(self) -> None: ...

    with pytest.raises(RunFailed, match="step_endet"):
        Bus({"wrong": Wrong()})


def test_an_argument_that_does_not_exist_is_refused() -> None:
    class Wrong:
        @observes
        def run_ended(self, stauts: str) -> None: ...

    with pytest.raises(RunFailed, match="stauts"):
        Bus({"wrong": Wrong()})


def test_an_error_names_the_observer_and_lines_for_the_user_pass_through() -> None:
    class Broken:
        def __init__(self, error: Exception) -> None:
            self.error = error

        @observes
        def run_ended(self) -> None:
            raise self.error

    healthy = Listener("a", [])
    with pytest.raises(RunFailed, match="observer 'mine' failed in run_ended: KeyError"):
        Bus({"a": healthy, "mine": Broken(KeyError("x"))}).emit("run_ended", run=None, status="done")
    with pytest.raises(UserError, match="say this"):
        Bus({"mine": Broken(UserError("say this"))}).emit("run_ended", run=None, status="done")


def test_state_goes_to_the_observer_of_the_same_name() -> None:
    bus, other = Bus({"a": Listener("x", [])}), Bus({"a": Listener("y", []), "new": Listener("z", [])})
    other.load_state_dict(bus.state_dict())
    assert [o.name for o in other.observers.values()] == ["x", "z"]  # type: ignore[attr-defined]

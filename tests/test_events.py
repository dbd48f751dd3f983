from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import TINY, Install

from sslkit import checkpoint
from sslkit.cli import main
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

    with pytest.raises(UserError, match=r"observer 'wrong': there is no event 'step_endet'; did you mean 'step_ended'"):
        Bus({"wrong": Wrong()})


def test_an_argument_that_does_not_exist_is_refused() -> None:
    class Wrong:
        @observes
        def run_ended(self, stauts: str) -> None: ...

    with pytest.raises(UserError, match=r"run_ended asks for stauts, which .* it gives: run, status"):
        Bus({"wrong": Wrong()})


def test_a_method_that_lacks_the_mark_is_refused() -> None:
    class Wrong:
        def run_ended(self, status: str) -> None: ...

    with pytest.raises(UserError, match=r"'run_ended' is not marked; put @sslkit.events.observes above it"):
        Bus({"wrong": Wrong()})


class Starter:
    """Records something as the run starts, and notes what it hears."""

    def __init__(self, name: str, heard: list[str]) -> None:
        self.name, self.heard = name, heard
        self.bus: Bus | None = None

    @observes
    def run_started(self) -> None:
        self.heard.append(f"{self.name} starts")
        if self.bus:
            self.bus.emit("recorded", run=None, record={"knn_top1": 0.1})

    @observes
    def recorded(self, record: dict[str, float]) -> None:
        self.heard.append(f"{self.name} hears")


def test_what_is_recorded_as_a_run_starts_is_told_when_all_have_started() -> None:
    heard: list[str] = []
    first, second = Starter("a", heard), Starter("b", heard)
    first.bus = bus = Bus({"a": first, "b": second})
    bus.emit("run_started", run=None)
    assert heard == ["a starts", "b starts", "a hears", "b hears"]
    bus.emit("recorded", run=None, record={})
    assert heard[4:] == ["a hears", "b hears"], "and at once from then on"


def test_an_observer_that_fails_to_start_leaves_no_event_held_back() -> None:
    class Broken:
        @observes
        def run_started(self) -> None:
            raise ValueError("no")

    heard: list[str] = []
    bus = Bus({"mine": Broken(), "a": Listener("a", heard)})
    with pytest.raises(RunFailed, match="observer 'mine' failed in run_started"):
        bus.emit("run_started", run=None)
    bus.emit("run_ended", run=None, status="failed")
    assert heard == ["a failed"]


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


# ---------------------------------------------------------------- a plugin that raises in an event

FRAIL = '''
from pathlib import Path
from sslkit.api import Observer
from sslkit.events import Hooks, observes


class Frail(Observer):
    """Fails."""

    def build(self, run):
        return Fails()


def failing(event):
    def hook(self, run):
        told = Path("fails").read_text().split() if Path("fails").exists() else []
        if told[:2] == [event, str(run.step)]:
            if Path("state_too").exists():
                Path("no_state").touch()
            raise {"KeyError": KeyError, "SystemExit": SystemExit}[told[2]]("oh")

    hook.__name__ = event
    return observes(hook)


class Fails:
    for event in ("run_started", "step_ended", "logging", "epoch_ended", "recorded", "checkpoint_saved", "run_ended"):
        locals()[event] = failing(event)

    def state_dict(self):
        if Path("no_state").exists():
            raise OSError("no state")
        return {}

    def load_state_dict(self, state):
        pass
'''
RECIPE = TINY + "".join(
    f'[[observers]]\nuse = "{name}"\nenabled = false\n' for name in ("health", "probe", "tensorboard", "report")
) + '[[observers]]\nuse = "frail"\n'  # fmt: skip


WHOLE: dict[int, float] = {}
"""The losses of a run in which nothing fails."""


@pytest.fixture
def frail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    monkeypatch.chdir(tmp_path)
    install("frail-dist", "observer.frail = frail_module:Frail", {"frail_module": FRAIL})
    Path("tiny.toml").write_text(RECIPE)


def train(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["train", "tiny.toml", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def losses(directory: str) -> dict[int, float]:
    records = map(json.loads, Path(directory, "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.mark.parametrize(
    ("event", "step", "error", "kept"),
    [
        ("run_started", 0, "KeyError", None),
        ("step_ended", 7, "KeyError", 7),
        ("step_ended", 3, "SystemExit", 3),
        ("logging", 5, "KeyError", 5),
        ("recorded", 15, "KeyError", 15),
        ("epoch_ended", 10, "KeyError", 10),
        ("checkpoint_saved", 8, "KeyError", 8),
        ("step_ended", 20, "KeyError", 20),
        ("run_ended", 20, "KeyError", 20),
    ],
)
def test_the_run_ends_with_its_name_and_a_checkpoint_and_goes_on(
    frail: None, event: str, step: int, error: str, kept: int | None
) -> None:
    Path("fails").write_text(f"{event} {step} {error}")
    failed = train()
    assert failed.exit_code == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"observer 'frail' from frail-dist 1.0 failed in {event}: {error}: ")
    found, problems = checkpoint.newest(Path("runs/tiny/checkpoints"))
    assert (found.step if found else None, problems) == (kept, [])
    if kept and event != "run_ended":
        assert "the same command goes on from there" in " ".join(failed.stdout.split())
    Path("fails").unlink()
    mended = train()
    assert mended.exit_code == 0, mended.output
    assert json.loads(Path("runs/tiny/status.json").read_text())["status"] == "done"
    if not WHOLE:
        assert train("--run-dir", "whole").exit_code == 0
        WHOLE.update(losses("whole"))
    whole = WHOLE
    assert losses("runs/tiny").items() <= whole.items()
    assert whole.keys() - losses("runs/tiny").keys() <= {step}, "at most the record that it spoilt"


def test_where_its_state_cannot_be_saved_either_the_earlier_checkpoint_is_told(frail: None) -> None:
    Path("fails").write_text("step_ended 7 KeyError")
    Path("state_too").touch()
    failed = train()
    assert failed.exit_code == 1
    assert "failed in step_ended: KeyError" in failed.stderr
    assert "step-000000004 is kept" in " ".join(failed.stdout.split())
    Path("no_state").unlink()
    Path("fails").unlink()
    assert "going on from step 4" in train("--steps", "6").stdout

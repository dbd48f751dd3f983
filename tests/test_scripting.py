from __future__ import annotations

import inspect
import random
import signal
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from conftest import TINY
from test_python_api import mine

import sslkit
from sslkit.api import Head
from sslkit.cli import main
from sslkit.trainer import Trainer
from sslkit.words import COMMAND, PYTHON
from sslkit_ema import StopGradient


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def losses(result: sslkit.Result) -> list[float]:
    return result.metrics.curve("loss")[1]


def after(calls: int, then: Any = lambda: True) -> Any:
    """A `should_stop` that does something when it is asked for the n-th time, and after that."""
    left = [calls]

    def asked() -> bool:
        left[0] -= 1
        return bool(left[0] < 0 and then())

    return asked


# ---------------------------------------------------------------- recipes


def test_a_recipe_is_found_by_name_and_by_path(tiny: Path) -> None:
    assert sslkit.load_recipe("quickstart").name == "quickstart"
    assert sslkit.load_recipe(tiny, ["seed=3"]).seed == 3
    assert sslkit.load_recipe(str(tiny), "seed=3").seed == 3, "one override need not be in a list"
    with pytest.raises(sslkit.UserError, match="no such recipe file"):
        sslkit.load_recipe(Path("quickstart"))
    tiny.write_text(TINY.replace('use = "cosine"\n\n[target', 'use = "cosine"\nfrm = 1\n\n[target'))
    with pytest.raises(sslkit.UserError, match=r"tiny\.toml:\d+: loss\.frm: unknown option"):
        sslkit.load_recipe(tiny)


# ---------------------------------------------------------------- training


def test_a_run_stops_and_goes_on_to_the_same_end(tiny: Path) -> None:
    recipe = sslkit.load_recipe(tiny)
    whole = sslkit.train(recipe, run_dir="whole", quiet=True)
    first = sslkit.train(recipe, run_dir=Path("parts"), steps=7, quiet=True)
    assert (first.status, first.step, first.total_steps) == ("stopped", 7, 20)
    assert sslkit.train(recipe, run_dir="parts", steps=3, quiet=True).status == "stopped", "it is past that already"
    second = sslkit.train(recipe, run_dir="parts", quiet=True)
    assert (whole.status, second.status, second.step) == ("done", "done", 20)
    assert losses(second)[-1] == losses(whole)[-1]
    again = sslkit.train(recipe, run_dir="whole", quiet=True)
    assert (again.status, again.metrics) == ("done", whole.metrics)
    assert whole.verdict == sslkit.examine("whole").verdict


def test_the_command_line_goes_on_with_a_run_of_python(tiny: Path) -> None:
    from click.testing import CliRunner

    sslkit.train(tiny, steps=5, quiet=True)
    done = CliRunner().invoke(main, ["train", str(tiny)])
    assert "going on from step 5" in done.output
    assert sslkit.train(tiny, quiet=True).status == "done"


def test_an_interrupt_leaves_a_checkpoint_and_the_same_call_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    step = Trainer.train_step

    def counted(trainer: Trainer, draw: Any) -> Any:
        made.append(trainer.step)
        return step(trainer, draw)

    monkeypatch.setattr(Trainer, "train_step", counted)

    def after_five(number: signal.Signals) -> Any:
        made.clear()
        return lambda: bool(len(made) == 5 and signal.raise_signal(number))

    result = sslkit.train(mine(), should_stop=after_five(signal.SIGINT))
    assert (result.status, result.step) == ("interrupted", 5)
    assert "the same call goes on from there" in capsys.readouterr().out
    terminated = sslkit.train(mine(), should_stop=after_five(signal.SIGTERM), quiet=True)
    assert (terminated.status, terminated.step) == ("preempted", 10)
    assert sslkit.train(mine(), quiet=True).status == "done"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_works_in_another_thread_and_can_be_stopped_there() -> None:
    found: list[sslkit.Result] = []
    stop = threading.Event()

    def asked() -> bool:
        stop.set()  # as if somebody else did
        return stop.is_set()

    def work() -> None:
        found.append(sslkit.train(mine(), steps=3, quiet=True))
        found.append(sslkit.train(mine(), should_stop=asked, quiet=True))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [(r.status, r.step) for r in found] == [("stopped", 3), ("interrupted", 3)]


def test_calls_depend_neither_on_one_another_nor_on_what_was_drawn_before() -> None:
    first = sslkit.train(mine(), run_dir="first", quiet=True)
    torch.manual_seed(5)
    with torch.no_grad():
        torch.rand(3)
        second = sslkit.train(mine(), run_dir="second", quiet=True)
    with torch.inference_mode():
        third = sslkit.train(mine(), run_dir="third", quiet=True)
    assert losses(first) == losses(second) == losses(third)


def test_what_the_process_had_set_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    flags = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
    threads = threading.active_count()

    def change() -> bool:
        torch.backends.cudnn.allow_tf32 = False  # as a run in fp32 on a GPU does
        return False

    sslkit.train(mine(), steps=3, should_stop=after(1, change), quiet=True)
    assert torch.backends.cudnn.allow_tf32 is True
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]
    assert flags == (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype())
    assert threading.active_count() == threads
    encoder_seed = torch.random.get_rng_state()
    sslkit.load_encoder("runs/mine")
    assert torch.equal(torch.random.get_rng_state(), encoder_seed)


def test_what_is_printed_is_plain_lines_in_the_words_of_python(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter does
    sslkit.train(mine(), steps=3)
    out = capsys.readouterr().out
    assert "stopped at step 3 of 20; a larger value of steps goes on from there" in out
    assert not {"\r", "\x1b"} & set(out)
    sslkit.train(mine(), steps=4, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_what_was_compiled_does_not_add_up_over_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[int] = []
    monkeypatch.setattr("sslkit.trainer.Trainer._compile", lambda self: None)
    monkeypatch.setattr("torch.compiler.reset", lambda: reset.append(1))
    train = sslkit.Train(epochs=2, batch_size=128, compile=True)
    sslkit.train(mine(train=train), steps=1, quiet=True)
    assert reset == [1]


# ---------------------------------------------------------------- errors


def test_errors_are_exceptions_in_the_words_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    sslkit.train(mine(), steps=3, quiet=True)
    with pytest.raises(sslkit.UserError, match="from the beginning: another run_dir or name") as caught:
        sslkit.train(mine(seed=1), quiet=True)
    assert "--" not in str(caught.value)
    assert "seed" in str(caught.value)
    with pytest.raises(sslkit.UserError, match='resume="never" was given; choose another run_dir'):
        sslkit.train(mine(), run_dir="runs/mine", resume="never", quiet=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(sslkit.UserError, match=r'device="cuda": torch sees no CUDA device here; use device="cpu"'):
        sslkit.train(mine(), device="cuda", quiet=True)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ({"device": "gpu"}, "device: should be 'auto' or 'cpu' or 'cuda', not 'gpu'"),
        ({"resume": True}, "resume: should be 'auto' or 'never', not True"),
        ({"stop_on": "errors"}, "stop_on: .* not 'errors'; did you mean 'error'?"),
        ({"steps": 0}, "steps: should be a whole number of 1 or more"),
        ({"steps": 2.5}, "steps: should be a whole number"),
        ({"should_stop": True}, "should_stop: should be a function that returns True or False, not True"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_made(argument: dict[str, Any], text: str) -> None:
    with pytest.raises(sslkit.UserError, match=text):
        sslkit.train(mine(), **argument)
    assert not Path("runs").exists()


def test_a_requirement_of_a_recipe_in_python_is_looked_at() -> None:
    with pytest.raises(sslkit.UserError, match=r"requires: .*sslkit-nowhere"):
        sslkit.train(mine(requires=("sslkit-nowhere>=2",)), quiet=True)


def test_a_run_that_fails_raises_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslkit_cosine.loss import CosineLoss

    def forward(*_: object) -> None:
        raise ValueError("no such axis")

    monkeypatch.setattr(CosineLoss, "forward", forward)
    with pytest.raises(sslkit.RunFailed, match="no such axis") as caught:
        sslkit.train(mine(), quiet=True)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_finding_before_training_says_how_python_accepts_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    swapped = mine(target_updater=StopGradient())
    sslkit.train(swapped, steps=1)
    assert '(to leave this out: accept=("ema_missing",) in train)' in capsys.readouterr().out
    with pytest.raises(sslkit.UserError, match=r'to train all the same: accept=\("ema_missing",\) in train'):
        sslkit.train(swapped, strict=True, quiet=True)


def test_what_a_user_named_is_printed_as_it_is(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = "runs/abl--strict--run-dir"
    sslkit.train(tiny, steps=1, run_dir=path)
    assert f"run directory: {path}\n" in capsys.readouterr().out
    tiny.write_text(TINY.replace("start = 0.9", "start = 0.8"))
    with pytest.raises(sslkit.UserError) as caught:
        sslkit.train(tiny, run_dir=path, quiet=True)
    assert caught.value.lines[0].startswith(f"{path}: holds a run of another recipe, at step 1 of 20; ")


def test_every_option_of_the_command_is_an_argument_in_python() -> None:
    options = {p.name for p in main.commands["train"].params if isinstance(p, click.Option)}
    elsewhere = {"overrides", "dry_run", "no_plugin", "nproc"}  # torchrun starts scripts in several processes
    assert elsewhere < options
    assert options - elsewhere <= set(inspect.signature(sslkit.train).parameters)


def test_each_is_told_in_its_own_words() -> None:
    python, command = asdict(PYTHON), asdict(COMMAND)
    assert not [text for text in python.values() if "--" in text]
    assert not [name for name in python if python[name] == command[name]]
    assert python["accept"].format(id="x") == 'accept=("x",) in train'


class OfThisFile(Head):
    """A class without an entry point."""

    def build(self, in_dim: int, run: Any) -> Any:
        pytest.fail("it was refused before")


def test_a_class_of_a_notebook_is_refused_before_anything_is_made() -> None:
    with pytest.raises(sslkit.UserError) as caught:
        sslkit.train(mine(projector=OfThisFile(), predictor=OfThisFile()), steps=1, quiet=True)
    assert [line.partition(": ")[0] for line in caught.value.lines] == ["projector", "predictor"]
    assert "OfThisFile has no entry point" in caught.value.lines[0]
    assert "use = './FILE.py:OfThisFile' with allow_local_code=True" in caught.value.lines[0]
    assert not Path("runs").exists()


def test_there_is_no_run_to_examine() -> None:
    with pytest.raises(sslkit.UserError, match="is not there"):
        sslkit.examine("runs/nothing")

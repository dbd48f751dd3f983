"""Runs of several processes: started by torchrun or `--nproc`, killed, stopped, started again, failing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import TINY

from sslkit import checkpoint, launch, launcher
from sslkit.errors import UserError
from sslkit.launcher import without_option
from sslkit.run_directory import read_json, read_metrics

ALIKE = TINY.replace("pool = 1", 'pool = 1\nnorm = "group"').replace(
    "out_dim = 8", 'out_dim = 8\nhidden_norm = "layer"'
)
"""The tiny recipe with networks that treat each image alone: the same however a batch is divided."""
PLUGIN = '''
import os
import signal
from pathlib import Path
import torch
from sslkit.api import Observer
from sslkit.events import observes
from sslkit.errors import RunFailed
from sslkit_cosine import Cosine
from sslkit_datasets import Digits
from sslkit_mlp import MLP

def mine(step):
    """Whether this is the process, the step and the first attempt in which something is to happen."""
    who, when = os.environ["TROUBLE"].split("@")
    return os.environ["RANK"] == who and step == int(when) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

class Trouble(Cosine):
    """BYOL's loss, in which one process meets trouble at one step."""
    def build(self, dim, run):
        loss = super().build(dim, run)
        forward = loss.forward
        def troubled(branches):
            terms = forward(branches)
            if mine(loss.step):
                TROUBLES[os.environ["WHAT"]](terms)
            return terms
        loss.forward = troubled
        loss.before_step = lambda step: setattr(loss, "step", step + 1)
        return loss

def nan(terms):
    terms.total = terms.total * float("nan")

def kill(terms):
    os.kill(os.getpid(), signal.SIGKILL)

def hang(terms):
    import time
    time.sleep(60)

def stop(terms):
    os.kill(os.getpid(), signal.SIGTERM)

def error(terms):
    raise RuntimeError("something of this process alone")

TROUBLES = {"nan": nan, "kill": kill, "hang": hang, "stop": stop, "error": error}

class Dies(Cosine):
    """One process is killed while it builds, at its first attempt."""
    def build(self, dim, run):
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().build(dim, run)

class Failing(Digits):
    """A source whose images cannot be read any more in one process, as when a file was removed."""
    def build(self, info):
        opened = super().build(info)
        opened.train = Rotting(opened.train)
        return opened

class Rotting:
    tensor = None
    def __init__(self, images):
        self.images, self.labels, self.shares = images, images.labels, 0
    def __len__(self):
        return len(self.images)
    def read(self, indices):
        self.shares += len(indices) == 64
        if os.environ.get("RANK") == "1" and self.shares > 7:
            raise RunFailed("image 7 cannot be read any more")
        return self.images.read(indices)

class Quitter(Observer):
    """An observer that fails at a step."""
    def build(self, run):
        return self
    @observes
    def step_ended(self, run):
        if run.step == 5:
            raise ValueError("the observer is broken")

class Spare(MLP):
    """A head with a parameter that takes no part."""
    def build(self, in_dim, run):
        head = super().build(in_dim, run)
        head.spare = torch.nn.Parameter(torch.zeros(3))
        return head
'''


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "alike.toml"
    path.write_text(ALIKE, encoding="utf-8")
    (tmp_path / "trouble.py").write_text(PLUGIN, encoding="utf-8")
    return path


def environment(**more: str) -> dict[str, str]:
    inner = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**inner, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "SSLKIT_PROCESS_TIMEOUT": "60", **more}


def sslkit(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sslkit", *map(str, arguments)], capture_output=True, text=True, timeout=240,
        env=environment(**more), check=False,
    )  # fmt: skip


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if "loss" in record]


def weights(run: Path) -> dict[str, torch.Tensor]:
    found, problems = checkpoint.newest(run / "checkpoints")
    assert found is not None, problems
    return dict(found.parts["model"])


def same(one: Path, other: Path, *, exactly: bool = True) -> None:
    mine, theirs = weights(one), weights(other)
    assert set(mine) == set(theirs)
    for name, value in mine.items():
        if exactly:
            assert torch.equal(value, theirs[name]), name
        else:
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


def troubled(recipe: Path, run: Path, what: str, who: str = "1@7", **more: str) -> subprocess.CompletedProcess[str]:
    return sslkit(
        "train", recipe, "--run-dir", run, "--nproc", 2, "--allow-local-code",
        "--set", f"loss.use={recipe.parent}/trouble.py:Trouble", WHAT=what, TROUBLE=who, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps in two processes that nothing befalls."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "alike.toml").write_text(ALIKE, encoding="utf-8")
    done = sslkit("train", folder / "alike.toml", "--run-dir", folder / "run", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
def test_two_processes_then_one_then_two_see_the_same_samples(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    alone, mixed = tmp_path / "alone", tmp_path / "mixed"
    assert sslkit("train", recipe, "--run-dir", alone).returncode == 0
    for steps, processes in ((7, 2), (13, 1), (20, 2)):
        done = sslkit("train", recipe, "--run-dir", mixed, "--steps", steps, "--nproc", processes)
        assert done.returncode == 0, done.stderr
    assert read_json(mixed / "status.json")["resumed_at"] == [7, 13]
    for run in (alone, mixed):
        assert losses(run) == pytest.approx(losses(undisturbed), abs=1e-5)
        same(run, undisturbed, exactly=False)
    assert read_json(undisturbed / "env.json")["processes"] == 2


@pytest.mark.slow
def test_a_process_that_is_killed_is_started_again_and_the_run_ends_with_the_same_weights(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = troubled(recipe, run, "kill")
    assert done.returncode == 0, done.stderr
    assert "going on from step 4" in done.stdout
    assert "Traceback" not in done.stderr
    assert losses(run) == losses(undisturbed)
    same(run, undisturbed)


@pytest.mark.slow
def test_one_that_is_killed_before_the_first_step_is_started_again_in_the_new_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sslkit("train", recipe, "--steps", 3).returncode == 0
    dies = f"loss.use={tmp_path}/trouble.py:Dies"
    command = ["train", recipe, "--resume", "never", "--nproc", 2, "--steps", 4, "--allow-local-code"]
    done = sslkit(*command, "--set", dies)  # a process that is started again must not meet what the dead one left
    assert done.returncode == 0, done.stderr
    assert "refused" not in done.stderr
    assert read_json(tmp_path / "runs" / "tiny" / "status.json")["step"] == 3
    assert read_json(tmp_path / "runs" / "tiny-2" / "status.json")["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "line", "code"),
    [
        (["data_source.use=TROUBLE:Failing"], "image 7 cannot be read any more", 1),
        (["loss.use=TROUBLE:Trouble", 'observers=[{use="TROUBLE:Quitter"}]'], "the observer is broken", 1),
        (["projector.use=TROUBLE:Spare", "projector.hidden_dim=9", "projector.out_dim=8"], "online.projector.spare", 1),
    ],
    ids=["data", "observer", "parameter"],
)  # fmt: skip
def test_what_fails_in_one_process_keeps_no_other_waiting(
    recipe: Path, tmp_path: Path, options: Sequence[str], line: str, code: int
) -> None:
    arguments = [part for o in options for part in ("--set", o.replace("TROUBLE", f"{tmp_path}/trouble.py"))]
    done = sslkit(
        "train", recipe, "--run-dir", tmp_path / "run", "--nproc", 2, "--allow-local-code", *arguments, WHAT="nan",
        TROUBLE="1@5",
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert done.stderr.count(line) == 1, done.stderr
    assert "does not answer" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all_before_the_update(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = troubled(recipe, run, "nan")
    assert done.returncode == 1
    assert done.stderr.count("not finite at step 7") == 1, done.stderr
    assert "Traceback" not in done.stderr
    told = read_json(run / "status.json")
    assert (told["status"], told["reason"], told["step"]) == ("failed", "not_finite", 7)
    assert [path.name for path in checkpoint.listed(run / "checkpoints")] == ["step-000000004"]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_and_is_told_once(recipe: Path, tmp_path: Path) -> None:
    done = troubled(recipe, tmp_path / "run", "error")
    assert done.returncode == 1
    assert done.stderr.count("something of this process alone") == 1, done.stderr
    assert "torch" not in done.stderr.replace("trouble.py", "")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = troubled(recipe, run, "stop")
    assert done.returncode == 0, done.stderr
    assert read_json(run / "status.json")["status"] == "preempted"
    assert read_json(run / "status.json")["step"] == 7
    done = troubled(recipe, run, "stop", "1@0")
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(undisturbed)
    same(run, undisturbed)


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up(recipe: Path, tmp_path: Path) -> None:
    done = troubled(recipe, tmp_path / "run", "hang", SSLKIT_PROCESS_TIMEOUT="12")
    # The others end when it has not answered for long, and all of them are started again.
    assert "does not answer" in done.stderr
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run" / "status.json")["status"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_command_passes_a_signal_on(recipe: Path, undisturbed: Path, tmp_path: Path, number: int) -> None:
    run = tmp_path / "run"
    command = ["train", str(recipe), "--run-dir", str(run), "--nproc", "2"]
    process = subprocess.Popen([sys.executable, "-m", "sslkit", *command], env=environment(), stderr=subprocess.PIPE)
    try:
        wait_for(lambda: read_json(run / "status.json").get("step", 0) >= 4)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    told = read_json(run / "status.json")
    if told["status"] != "done":  # it may just have been quicker
        assert told["status"] == ("interrupted" if number == signal.SIGINT else "preempted")
        assert told["reason"] == signal.Signals(number).name
        assert process.returncode == (130 if number == signal.SIGINT else 0), said
        assert checkpoint.listed(run / "checkpoints")[-1].name == f"step-{told['step']:09d}"
        assert sslkit(*command).returncode == 0
    assert losses(run) == losses(undisturbed)
    same(run, undisturbed)


@contextmanager
def free_port() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


def wait_for(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_two_agents_stand_for_two_machines(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with free_port() as port:
        endpoint = f"127.0.0.1:{port}"
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
             "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "two", "--local-addr", "127.0.0.1",
             "-m", "sslkit", "train", str(recipe), "--run-dir", str(run)],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        said = [agent.communicate(timeout=200)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert losses(run) == losses(undisturbed)
    same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["train.batch_size=129"], "2 processes cannot share it equally, two or more images each; choose 128"),
        (["train.batch_norm=sync"], "torch's SyncBatchNorm needs GPUs"),
        (["train.batch_norm=split:2"], "use 'split:4'"),
    ],
)
def test_a_mistake_is_told_once(recipe: Path, tmp_path: Path, options: Sequence[str], line: str) -> None:
    arguments = [part for option in options for part in ("--set", option)]
    done = sslkit("train", recipe, "--run-dir", tmp_path / "run", "--nproc", 2, *arguments)
    assert done.returncode == 2
    assert done.stderr.count(line) == 1, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "WORLD_SIZE is 2, and RANK, LOCAL_RANK, MASTER_PORT not set"),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "RANK": "0", "LOCAL_RANK": "0",
             "SSLKIT_PROCESS_TIMEOUT": "30m"},
            "SSLKIT_PROCESS_TIMEOUT=30m: should be a number of seconds",
        ),
    ],
)  # fmt: skip
def test_variables_that_cannot_be_meant_are_told(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], line: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as told:
        launch.train(str(recipe), run_dir=str(tmp_path / "run"))
    assert told.value.lines[0].startswith(line)


def test_an_error_is_left_for_good_and_a_success_by_the_first_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launcher.leave(130) == 130
    assert launcher.left() is None
    launcher.note_directory("runs/x")
    assert launcher.noted_directory() is None
    monkeypatch.setenv(launcher.OUTCOME, str(tmp_path / "exit-code"))
    monkeypatch.setenv("RANK", "1")
    assert launcher.leave(0) == 0
    assert launcher.left() is None
    assert launcher.leave_error(2)
    assert not launcher.leave_error(1)
    assert launcher.left() == 2
    assert launcher.noted_directory() is None
    launcher.note_directory("runs/x-2")
    assert launcher.noted_directory() == "runs/x-2"


def test_the_option_is_taken_out_of_the_command_line() -> None:
    given = ["train", "r.toml", "--nproc", "2", "--steps", "3", "--nproc=4"]
    assert without_option(given, "--nproc") == ["train", "r.toml", "--steps", "3"]

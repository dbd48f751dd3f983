"""The batch script of docs/how-to/run-on-slurm.md, taken from the page and run; the tests stand for SLURM."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from test_signals import assert_same, wait_for_step
from test_stopping import gone

import sslkit
from sslkit.run_directory import read_json

PAGE = (ROOT / "docs" / "how-to" / "run-on-slurm.md").read_text(encoding="utf-8")
LONG = (
    TINY.replace("epochs = 2", "epochs = 30")
    .replace("checkpoint_every = 4", "checkpoint_every = 1000")
    .replace('use = "knn"\n', 'use = "knn"\nevery_epochs = 20\n')
)
FAKES = {
    "srun": 'echo "$$" > "$FAKES/srun.pid"\nwhile [ "${1#-}" != "$1" ]; do shift 2; done\nexec setsid "$@"\n',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$FAKES/scontrol.log"; fi\n',
}
JOB = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1",
    "SLURM_CPUS_PER_TASK": "1",
}  # fmt: skip


def file_of_the_page(name: str, **values: str) -> str:
    """A script of the page, with other values of its variables."""
    found = re.search(rf"<!-- file: {name} -->\n```sh\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    text = found[1]
    for key, value in {"recipe": "./long.toml", "run": "run", **values}.items():
        text, count = re.subn(rf"^{key}=.*$", f"{key}={value}", text, flags=re.MULTILINE)
        assert count == 1
    return text


def script(torchrun: bool) -> str:
    """The batch script; with `torchrun`, or in the page's form for one GPU."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        text = file_of_the_page("train.sbatch", port=str(probe.getsockname()[1]))
    if not torchrun:
        alone = re.search(r"the command is then `(srun [^`]*)`", PAGE)
        assert alone is not None
        text, count = re.subn(r"^srun (?:.*\\\n)*.*$", alone[1], text, flags=re.MULTILINE)
        assert count == 1
    return text


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    (tmp_path / "long.toml").write_text(LONG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("FAKES", str(folder))
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    return folder


def submitted(text: str) -> subprocess.Popen[str]:
    Path("train.sbatch").write_text(text)
    return subprocess.Popen(["bash", "train.sbatch"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def step_of(folder: Path) -> list[int]:
    """Every process of the job's step: what srun became, and all that descends from it."""
    found, parents = [int((folder / "srun.pid").read_text())], {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def requeued(folder: Path) -> list[str]:
    log = folder / "scontrol.log"
    return log.read_text().splitlines() if log.is_file() else []


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="SLURM is")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_a_job_at_its_time_limit_is_queued_again_and_comes_to_the_same_end(torchrun: bool, fakes: Path) -> None:
    text = script(torchrun)
    asked = re.search(r"^#SBATCH --signal=(B:)?(\w+)@(\d+)$", text, re.MULTILINE)
    assert asked is not None
    assert (asked[1], int(asked[3]) >= 60) == (None, True), "to the step, not to the shell, and in time"
    first = submitted(text)
    wait_for_step(20, first)
    for pid in step_of(fakes):
        os.kill(pid, signal.Signals[f"SIG{asked[2]}"])
    out, _ = first.communicate(timeout=100)
    assert first.returncode == 0, out
    told = read_json(Path("run/status.json"))
    assert (told["status"], told["reason"], told["attempt"]) == ("preempted", "SIGUSR1", 1), out
    assert requeued(fakes) == ["requeue 4711"]

    second = submitted(text)
    out, _ = second.communicate(timeout=100)
    assert second.returncode == 0, out
    assert f"going on from step {told['step']}" in out
    assert read_json(Path("run/status.json"))["status"] == "done"
    sslkit.train("./long.toml", run_dir="whole", quiet=True)
    assert_same(Path("run"), Path("whole"))

    third = submitted(text)
    third.communicate(timeout=100)
    assert requeued(fakes) == ["requeue 4711"], "a run that is done stays so"


@linux
@pytest.mark.slow
def test_a_job_that_is_cancelled_or_fails_is_not_queued_again(fakes: Path) -> None:
    job = submitted(script(False))
    wait_for_step(20, job)
    for pid in step_of(fakes):
        os.kill(pid, signal.SIGTERM)
    job.communicate(timeout=100)
    assert (job.returncode, requeued(fakes)) == (0, [])
    assert read_json(Path("run/status.json"))["reason"] == "SIGTERM"

    status = Path("run/status.json")
    status.write_text(status.read_text().replace("SIGTERM", "SIGUSR1"))
    Path("long.toml").write_text(LONG.replace("weight_decay = 1e-4", "weight_decay = 1e-3"))
    broken = submitted(script(False))
    out, _ = broken.communicate(timeout=100)
    assert (broken.returncode, requeued(fakes)) == (2, []), "the status is of an earlier attempt"
    assert "another recipe" in out


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_a_worker_whose_torchrun_dies_saves_and_ends(number: signal.Signals, fakes: Path) -> None:
    """Without `--signals-to-handle`, and whatever is listed there, of SIGKILL."""
    command = ["torchrun", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    agent = subprocess.Popen(
        [*command, "-m", "sslkit", "train", "./long.toml", "--run-dir", "run", "--set", "train.epochs=5000"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    wait_for_step(20, agent)
    worker = read_json(Path("run/status.json"))["pid"]
    agent.send_signal(number)
    assert agent.wait(timeout=60) == -number
    assert gone(worker)
    deadline = time.monotonic() + 30
    while read_json(Path("run/status.json"))["status"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    told = read_json(Path("run/status.json"))
    assert (told["status"], told["reason"], told["pid"]) == ("preempted", "SIGTERM", worker)
    assert Path(f"run/checkpoints/step-{told['step']:09d}").is_dir()


@linux
@pytest.mark.slow
@pytest.mark.parametrize("name", ["container.sh", "until-done.sh"])
def test_a_wrapper_says_whether_the_run_is_done(name: str, fakes: Path) -> None:
    text = file_of_the_page(name)
    first = submitted(text)
    wait_for_step(20, first)
    inner = read_json(Path("run/status.json"))["pid"]
    os.kill(first.pid if name == "container.sh" else inner, signal.SIGTERM)
    out, _ = first.communicate(timeout=100)
    if name == "container.sh":
        assert first.returncode != 0, out
        assert read_json(Path("run/status.json"))["status"] == "preempted"
        second = submitted(text)
        out, _ = second.communicate(timeout=100)
        assert second.returncode == 0, out
    assert read_json(Path("run/status.json"))["status"] == "done"
    assert first.returncode == (0 if name == "until-done.sh" else 1)

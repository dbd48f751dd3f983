"""What stands in for other systems: every module is imported, and a few steps are trained, as if on Windows or a Mac.

It shows that nothing at import needs Linux, and no more: the system below is still the one that the tests run on.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT, TINY

AS_IF = """
import os, signal, sys

import click, numpy, PIL.Image, pyarrow.parquet, pydantic, rich.progress, sklearn.datasets, timm, torch  # theirs
import torch.utils.tensorboard, torchvision.transforms.v2
import asyncio, concurrent.futures, multiprocessing, subprocess, tempfile  # and the standard library's

kind = sys.argv.pop(1)
if kind == "win32":
    gone = {
        signal: ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGALRM", "SIGCONT", "SIGTSTP", "SIGCHLD"),
        os: ("fork", "sched_getaffinity", "pread", "posix_fadvise", "O_DIRECTORY",
             "getuid", "geteuid", "mkfifo", "sysconf", "killpg", "getpgid", "setsid", "uname", "fchmod"),
    }
    for module in ("fcntl", "resource", "pwd", "grp", "termios", "pty", "tty"):
        sys.modules[module] = None
elif kind == "darwin":
    gone = {os: ("sched_getaffinity", "posix_fadvise")}
for module, names in gone.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
sys.platform = kind
"""
IMPORT_ALL = """
import importlib
from pathlib import Path

root = Path(sys.argv[1])
for folder in (root / "sslkit", *sorted((root / "plugins").glob("sslkit_*"))):
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
        if not name.endswith("__main__"):
            importlib.import_module(name)
"""
COMMAND = """
from sslkit.cli import main

main(sys.argv[1:], prog_name="sslkit")
"""


def as_if(kind: str, code: str, *arguments: str, cwd: Path) -> str:
    """What a program prints on a system that lacks what `kind` lacks."""
    script = cwd / "as_if.py"
    script.write_text(AS_IF + textwrap.dedent(code), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), kind, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["win32", pytest.param("darwin", marks=pytest.mark.slow)])
def test_every_module_can_be_imported(kind: str, tmp_path: Path) -> None:
    as_if(kind, IMPORT_ALL, str(ROOT), cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["win32", "darwin"])
def test_a_run_begins_and_goes_on(kind: str, tmp_path: Path) -> None:
    off = "".join(f'\n[[observers]]\nuse = "{name}"\nenabled = false\n' for name in ("tensorboard", "report"))
    (tmp_path / "tiny.toml").write_text(TINY + off, encoding="utf-8")
    as_if(kind, COMMAND, "train", "tiny.toml", "--steps", "2", cwd=tmp_path)
    told = as_if(kind, COMMAND, "train", "tiny.toml", "--steps", "3", cwd=tmp_path)
    assert "step 3" in told


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--help",), ("list-plugins",), ("recipes",), ("check", "quickstart")])
def test_commands_answer(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert as_if("win32", COMMAND, *arguments, cwd=tmp_path)


@pytest.mark.slow
def test_no_file_of_a_run_has_a_name_that_windows_refuses(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    as_if("darwin", COMMAND, "train", "tiny.toml", "--steps", "2", cwd=tmp_path)
    names = [path.name for path in (tmp_path / "runs").rglob("*")]
    assert names
    assert not [name for name in names if set(name) & set('<>:"|?*\\') or name.endswith((" ", "."))]

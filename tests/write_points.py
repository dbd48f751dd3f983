"""Every point at which writing a checkpoint can be cut short.

As a program it dies there, in forked processes, for `test_faults.py`: `python tests/write_points.py FOLDER`.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sslkit import checkpoint

KEEP = 2
STEPS = (1, 2, 3)
"""What is there before. The first has the best kNN; the second goes when the fourth is written."""
NEXT = 4


def parts(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((50,), float(step))}, "loss": {}}


def write(folder: Path, step: int) -> None:
    checkpoint.save(folder, step, parts(step), {"knn_top1": 1 / step})
    checkpoint.prune(folder, KEEP)


def is_sound(folder: Path, steps: tuple[int, ...]) -> int:
    """The step of the newest checkpoint, after what a run does before it goes on.

    Raises:
        AssertionError: one of those that should be there, or the newest, is not what was written.
    """
    checkpoint.clean(folder)
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
    found, problems = checkpoint.newest(folder)
    assert found is not None
    assert problems == []
    for step in {*steps, found.step}:
        loaded = checkpoint.load(folder / f"step-{step:09d}").parts["model"]["w"]
        assert torch.equal(loaded, parts(step)["model"]["w"])
    return found.step


def cut(patch: pytest.MonkeyPatch, act: Callable[[int, str], None], half: Callable[[int, str], bool]) -> None:
    """Call `act` with a number and a name before each operation on files, and after the half of a write if `half`."""
    numbers = itertools.count()

    def at(owner: Any, name: str, halfway: Callable[..., None] | None = None) -> None:
        usual = getattr(owner, name)

        def instead(*arguments: Any, **named: Any) -> Any:
            number = next(numbers)
            act(number, name)
            if halfway is not None and half(number, name):
                halfway(*arguments)
                act(number, f"half of {name}")
            return usual(*arguments, **named)

        patch.setattr(owner, name, instead)

    def half_a_file(tensors: Any, path: Path) -> None:
        path.write_bytes(b"\xff" * 100)

    def half_the_bytes(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])

    def half_the_folder(path: Path, **_: Any) -> None:
        for inner in sorted(path.glob("*"))[:2]:
            inner.unlink()

    at(checkpoint, "save_file", half_a_file)
    at(Path, "write_bytes", half_the_bytes)
    at(Path, "mkdir")
    at(Path, "rename")
    at(os, "fsync")
    at(shutil, "copymode")
    at(shutil, "rmtree", half_the_folder)


def write_and_die(run: Path, number: int, half: bool) -> None:
    """Write the next checkpoint, and end this process at the point of that number, if there is one."""

    def die(at: int, name: str) -> None:
        if at == number and name.startswith("half") == half:
            (run.parent / "name").write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        cut(patch, die, lambda at, _: half and at == number)
        write(run, NEXT)


def main(folder: Path) -> None:
    """Kill a process at each point; print what was found, a JSON line for each."""
    for number, half in itertools.product(range(1000), (False, True)):
        run = folder / f"{number}-{half}" / "checkpoints"
        run.parent.mkdir()
        for step in STEPS:
            checkpoint.save(run, step, parts(step), {"knn_top1": 1 / step})
        child = os.fork()
        if child == 0:
            write_and_die(run, number, half)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            if half:  # no such half
                continue
            return
        left = sorted(p.name for p in run.iterdir() if p.name.startswith("."))
        newest = is_sound(run, (1, 3))
        write(run, NEXT)
        assert is_sound(run, (1, 3, 4)) == NEXT
        assert [p.name[-1] for p in checkpoint.listed(run)] == ["1", "3", "4"]
        told = {"at": number, "name": (run.parent / "name").read_text(), "left": left, "newest": newest}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Python 3.12 warns of forking, whatever the threads do
    main(Path(sys.argv[1]))

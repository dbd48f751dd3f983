"""Checkpoints: plain data, written atomically, verified before use, never overwritten.

A checkpoint is a folder `step-000001000/` of `PART.safetensors` files (tensors), `state.json` (everything else) and
`manifest.json` (size and sha256 of each file, written last). It is complete or it is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslkit.errors import RunFailed, SslkitError, UserError

SCHEMA = 1
_STEP = re.compile(r"^step-(\d{9,})$")
_TENSOR = "__tensor__"
LARGEST_JSON = 256 << 20
"""Bytes of a file of JSON, a thousand times what a network of a thousand layers needs."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified: `parts` as they were saved, `facts` from `state.json`."""

    path: Path
    step: int
    parts: dict[str, Any]
    facts: dict[str, Any]


def save(
    folder: Path,
    step: int,
    parts: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    instead: bool = False,
    allowed: Callable[[], None] = lambda: None,
) -> Path:
    """Write the checkpoint of a step under `folder`; one that is already there stays, unless `instead`.

    Args:
        folder: the run's `checkpoints` folder.
        step: completed optimizer updates.
        parts: state dicts: nested dicts and lists of tensors and JSON values.
        facts: JSON values: recipe hash, provenance, offsets.
        instead: take the place of the one that is there.
        allowed: called before the checkpoint takes its name; if it raises, it does not.

    Raises:
        RunFailed: it could not be written (disk full, read-only); earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:09d}"
    if final.exists() and not instead:
        return final
    staging = folder / f".tmp-{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        trees = {}
        for name, state in parts.items():
            tensors: dict[str, Tensor] = {}
            trees[name] = _split(state, tensors, "")
            save_file(tensors, staging / f"{name}.safetensors")
        _write_json(staging / "state.json", {"schema": SCHEMA, "step": step, "facts": dict(facts), "parts": trees})
        files = {p.name: _digest(p) for p in sorted(staging.iterdir())}
        _write_json(staging / "manifest.json", {"schema": SCHEMA, "files": files})
        for path in staging.iterdir():
            _sync(path)
        _sync(staging)
        allowed()
        if instead:
            final.rename(folder / f".was-{final.name}")
        staging.rename(final)
        _sync(folder)
    except BaseException as error:  # safetensors raises its own kinds, one of them below Exception
        shutil.rmtree(staging, ignore_errors=True)
        _put_back(folder)
        if isinstance(error, KeyboardInterrupt | SystemExit | SslkitError):
            raise
        raise RunFailed(f"{final}: the checkpoint could not be written: {error}; earlier ones are untouched") from error
    shutil.rmtree(folder / f".was-{final.name}", ignore_errors=True)
    return final


def load(path: Path, wanted: Collection[str] | None = None) -> Checkpoint:
    """Read one checkpoint after checking its files against its manifest.

    Args:
        path: its folder.
        wanted: the parts to read and check; all of them without it.

    Raises:
        RunFailed: something is missing or changed.
        UserError: it is sound, but of another format or not ours to read.
    """
    try:
        for name in ("manifest.json", "state.json"):
            _check_plain(path / name)
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if "state.json" not in manifest["files"]:
            raise RunFailed(f"{path}: its manifest does not list state.json; the file was changed or damaged")
        for name, expected in manifest["files"].items():
            part = name.removesuffix(".safetensors")
            if wanted is not None and part != name and part not in wanted:
                continue
            if Path(name).name != name:
                raise RunFailed(f"{path}: its manifest lists {name!r}, which is no name of a file in this folder")
            _check_plain(path / name, expected["bytes"])
            if _digest(path / name) != expected:
                raise RunFailed(f"{path}: {name} is not what the manifest says; the file was changed or damaged")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["schema"] != SCHEMA:
            raise UserError(
                f"{path}: has checkpoint format {state['schema']}, and this version of sslkit reads {SCHEMA}; go on "
                "with the version that wrote it"
            )
        if unlisted := [name for name in state["parts"] if f"{name}.safetensors" not in manifest["files"]]:
            raise RunFailed(f"{path}: its manifest does not list {unlisted[0]!r}; the file was changed or damaged")
        trees = {name: tree for name, tree in state["parts"].items() if wanted is None or name in wanted}
        parts = {name: _join(tree, load_file(path / f"{name}.safetensors")) for name, tree in trees.items()}
        return Checkpoint(path, int(state["step"]), parts, state["facts"])
    except SslkitError:
        raise
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:
        raise RunFailed(f"{path}: not a valid checkpoint: {type(error).__name__}: {error}") from error


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _STEP.match(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and a line for each invalid one, which is set aside and never deleted."""
    problems: list[str] = []
    for path in reversed(listed(folder)):
        try:
            return load(path), problems
        except RunFailed as error:
            aside = path.with_name(f"damaged-{path.name}")
            number = 2
            while aside.exists():
                aside, number = path.with_name(f"damaged-{path.name}-{number}"), number + 1
            path.rename(aside)
            problems.append(f"{error}; set aside as {aside.name}")
    return None, problems


def prune(folder: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints and the one with the best `knn_top1`."""
    kept = best(folder)
    for path in listed(folder)[:-keep]:
        if path != kept:
            doomed = path.with_name(f".old-{path.name}")  # a half-deleted one must not look complete
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def best(folder: Path) -> Path | None:
    """The checkpoint with the highest `knn_top1`, the oldest of equals; None where it was not measured at any."""
    found: tuple[float, Path] | None = None
    for path in listed(folder):
        try:
            _check_plain(path / "state.json")
            facts = json.loads((path / "state.json").read_text(encoding="utf-8"))["facts"]
            knn = facts.get("knn_top1")
        except (SslkitError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue
        if isinstance(knn, int | float) and (found is None or knn > found[0]):
            found = (float(knn), path)
    return found[1] if found else None


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written or half-deleted, and put back what it was about to replace."""
    _put_back(folder)
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith((".tmp-step-", ".old-step-")):
                shutil.rmtree(path, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """What was to be replaced takes its name again, unless the new one has it."""
    for path in folder.glob(".was-step-*"):
        final = path.with_name(path.name.removeprefix(".was-"))
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)


def _split(state: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """The same tree with tensors moved into `tensors` and their names left in their places."""
    if isinstance(state, Tensor):
        tensors[path] = state.detach().cpu().contiguous().clone()  # clone: safetensors refuses shared memory
        return {_TENSOR: path}
    if isinstance(state, Mapping):
        # JSON would turn the integer keys of an optimizer's state into strings, so pairs are kept.
        return {"__map__": [[k, _split(v, tensors, f"{path}.{k}" if path else str(k))] for k, v in state.items()]}
    if isinstance(state, tuple | list):
        return [_split(v, tensors, f"{path}.{i}") for i, v in enumerate(state)]
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise RunFailed(f"{path} in a state dict is a {type(state).__name__}; only tensors and plain values can be saved")


def _join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        return {key: _join(value, tensors) for key, value in tree["__map__"]}
    if isinstance(tree, list):
        return [_join(value, tensors) for value in tree]
    return tree


def like(parameter: Tensor, state: Tensor) -> Tensor:
    """An optimizer's tensor in the memory layout of its parameter, as it was before it was saved."""
    if state.shape != parameter.shape:
        return state.clone()
    return torch.empty_like(parameter, dtype=state.dtype).copy_(state)


def _check_plain(path: Path, size: int | None = None) -> None:
    """Before a file is opened, which a pipe or a link to a device would make last for ever.

    Raises:
        RunFailed: it is not a file of this folder, or not of the size that the manifest says.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise RunFailed(f"{path}: is not a plain file; checkpoints hold no links")
    if size is None and found.st_size > LARGEST_JSON:
        raise RunFailed(f"{path}: has {found.st_size:,} bytes; no checkpoint of sslkit's has as many")
    if size is not None and found.st_size != size:
        raise RunFailed(f"{path.parent}: {path.name} is not what the manifest says; the file was changed or damaged")


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle on a folder to flush
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

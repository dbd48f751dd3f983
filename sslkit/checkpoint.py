"""Checkpoints: plain data, written atomically, verified before use, never overwritten.

A checkpoint is a folder `step-000001000/` of `PART.safetensors` files (tensors), `state.json` (everything else) and
`manifest.json` (size and sha256 of each file and of itself, written last). It is complete or it is not there. What else
lies in the folder is never read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sslkit.errors import RunFailed, SslkitError, UserError

SCHEMA = 2
JSON_LIMIT = 64 * 2**20
"""Bytes of a JSON file that are parsed at most: a stranger's must not fill the memory."""
_STEP = re.compile(r"^step-(\d{9,})$")
_TENSOR = "__tensor__"


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
    """Write the checkpoint of a step under `folder`, and read it back; one that is already there stays, unless
    `instead`.

    Args:
        folder: the run's `checkpoints` folder.
        step: completed optimizer updates.
        parts: state dicts: nested dicts, lists and tuples of tensors and JSON values.
        facts: JSON values: recipe hash, provenance, offsets.
        instead: take the place of the one that is there.
        allowed: called before the checkpoint takes its name; if it raises, it does not.

    Raises:
        RunFailed: it could not be written (disk full, read-only); earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:09d}"
    if final.is_dir() and not instead:
        return final
    staging = folder / f".tmp-{final.name}-{os.getpid()}"
    if not folder.parent.is_dir():  # which must not come back without its recipe and records
        raise RunFailed(f"{folder.parent}: was removed or moved while the run goes on; put it back, and the same "
                        "command goes on from the newest checkpoint")  # fmt: skip
    try:
        first = not folder.is_dir()
        folder.mkdir(exist_ok=True)
        _remove(staging)
        staging.mkdir()
        trees = {}
        for name, state in parts.items():
            tensors: dict[str, Tensor] = {}
            trees[name] = _split(state, tensors, "")
            save_file(tensors, staging / f"{name}.safetensors")
            _read_back(staging / f"{name}.safetensors", tensors)
        _write_json(staging / "state.json", {"schema": SCHEMA, "step": step, "facts": dict(facts), "parts": trees})
        files = {p.name: _digest(p) for p in sorted(staging.iterdir())}
        (staging / "manifest.json").write_bytes(sealed({"schema": SCHEMA, "step": step, "files": files}))
        for path in staging.iterdir():
            shutil.copymode(staging / "manifest.json", path)  # safetensors' files are for their owner alone
            _sync(path)
        _sync(staging)
        allowed()
        if instead:
            final.rename(folder / f".was-{final.name}")
        staging.rename(final)
        _sync(folder)
        if first:
            _sync(folder.parent)
    except BaseException as error:
        _remove(staging)
        _put_back(folder)
        # A panic within safetensors is below Exception, as what ends a process is.
        if isinstance(error, SslkitError) or not (isinstance(error, Exception) or "Panic" in type(error).__name__):
            raise
        why = (isinstance(error, OSError) and error.strerror) or error
        raise RunFailed(
            f"{final}: the checkpoint could not be written: {why}; "
            + (
                "earlier ones are untouched, and once this is mended the same command goes on from the newest"
                if listed(folder)
                else "there is no earlier one: once this is mended, the same command begins anew"
            )
        ) from error
    try:
        _checked(final)
    except RunFailed as error:
        raise RunFailed(
            f"{error}, right after it was written: the disk may be failing; set aside as {_set_aside(final).name}; "
            "earlier ones are untouched"
        ) from error
    _remove(folder / f".was-{final.name}")
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
    with _told(path):
        state = _checked(path, wanted)
        trees = {name: tree for name, tree in state["parts"].items() if wanted is None or name in wanted}
        parts = {name: _join(tree, load_file(path / f"{name}.safetensors")) for name, tree in trees.items()}
        return Checkpoint(path, int(state["step"]), parts, dict(state["facts"]))


def _checked(path: Path, wanted: Collection[str] | None = None) -> dict[str, Any]:
    """`state.json` of a checkpoint, once the parts that are wanted are what the manifest says."""
    with _told(path):
        raw = _read(path / "manifest.json")
        manifest = json.loads(raw)
        unsealed = manifest["schema"] == 1 and "sha256" not in manifest
        if not unsealed and raw != sealed(manifest):
            raise RunFailed(f"{path}: manifest.json is not what was written; the file was changed or damaged")
        if manifest["schema"] != SCHEMA:
            raise UserError(
                f"{path}: has checkpoint format {manifest['schema']}, and this version of sslkit reads {SCHEMA}; go on "
                "with the version that wrote it"
            )
        for name, expected in manifest["files"].items():
            part = name.removesuffix(".safetensors")
            if wanted is not None and part != name and part not in wanted:
                continue
            if Path(name).name != name:
                raise RunFailed(f"{path}: its manifest lists {name!r}, which is no name of a file in this folder")
            if _plain(path / name).stat().st_size != expected["bytes"] or _digest(path / name) != expected:
                raise RunFailed(f"{path}: {name} is not what the manifest says; the file was changed or damaged")
        state: dict[str, Any] = json.loads(_read(path / "state.json"))
        if {"state.json", *(f"{name}.safetensors" for name in state["parts"])} != set(manifest["files"]):
            raise RunFailed(f"{path}: its manifest does not list the parts of state.json")
        named = _STEP.match(path.name)
        if state["step"] != manifest["step"] or (named and int(named[1]) != state["step"]):
            raise RunFailed(f"{path}: is the checkpoint of step {state['step']}, under another name")
        return state


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever reading a checkpoint raises, as a line; what passes by itself must not condemn a sound one."""
    try:
        yield
    except (SslkitError, MemoryError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP):
            name = Path(error.filename).name if error.filename else "a file"
            raise RunFailed(f"{path}: not a valid checkpoint: {name}: {error.strerror}") from error
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:
        raise RunFailed(f"{path}: not a valid checkpoint: {type(error).__name__}: {error}") from error


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _STEP.match(p.name) and p.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and a line for each invalid one, which is set aside and never deleted."""
    problems: list[str] = []
    for path in reversed(listed(folder)):
        try:
            return load(path), problems
        except RunFailed as error:
            problems.append(f"{error}; set aside as {_set_aside(path).name}")
    return None, problems


def _set_aside(path: Path) -> Path:
    aside, number = path.with_name(f"damaged-{path.name}"), 2
    while aside.exists():
        aside, number = path.with_name(f"damaged-{path.name}-{number}"), number + 1
    try:
        path.rename(aside)
    except OSError as error:
        raise UserError(f"{path}: is damaged, and cannot be set aside as {aside.name}: {error.strerror}") from None
    return aside


def prune(folder: Path, keep: int, every: int | None = None, say: Callable[[str], None] = print) -> None:
    """Keep the newest `keep` checkpoints, the one with the best `knn_top1`, and a series for good.

    Args:
        folder: the run's `checkpoints` folder.
        keep: how many of the newest.
        every: optimizer steps: the first checkpoint at or after each multiple of it is of the series.
        say: is given a line for each that should go and cannot be removed.
    """
    paths = listed(folder)
    kept = {best(folder), *paths[-keep:]}
    if every:
        series: dict[int, Path] = {}
        for path in paths:
            series.setdefault(step_of(path) // every, path)
        kept |= {path for multiple, path in series.items() if multiple}
    for path in paths:
        if path not in kept:
            doomed = path.with_name(f".old-{path.name}")  # a half-deleted one must not look complete
            try:
                path.rename(doomed)
            except OSError as error:
                say(f"warning: {path}: is not needed any more, and cannot be removed: {error.strerror}")
    _remove(*folder.glob(".old-step-*"))


def best(folder: Path) -> Path | None:
    """The checkpoint with the highest `knn_top1`, the oldest of equals; None where it was not measured at any."""
    found: tuple[float, Path] | None = None
    for path in listed(folder):
        try:
            knn = _checked(path, wanted=())["facts"].get("knn_top1")
        except SslkitError:
            continue
        if isinstance(knn, int | float) and (found is None or knn > found[0]):
            found = (float(knn), path)
    return found[1] if found else None


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written or half-deleted, and put back what it was about to replace."""
    _put_back(folder)
    _remove(*folder.glob(".tmp-step-*"), *folder.glob(".old-step-*"))


def _put_back(folder: Path) -> None:
    """What was to be replaced takes its name again, unless the new one has it."""
    for path in folder.glob(".was-step-*"):
        final = path.with_name(path.name.removeprefix(".was-"))
        if final.exists():
            _remove(path)
        else:
            path.rename(final)


def _split(state: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """The same tree with tensors moved into `tensors` and their names left in their places."""
    if isinstance(state, Tensor):
        while path in tensors or path in ("", "__metadata__"):  # {"a.b": x, "a": {"b": y}} are two tensors
            path += "~"
        tensors[path] = state.detach().cpu().contiguous().clone()  # clone: safetensors refuses shared memory
        return {_TENSOR: path}
    if isinstance(state, Mapping):
        for key in state:
            if type(key) not in (str, int):
                raise RunFailed(f"{path} in a state dict has the key {key!r}; only texts and integers can be saved")
        # JSON would turn the integer keys of an optimizer's state into strings, so pairs are kept.
        return {"__map__": [[k, _split(v, tensors, f"{path}.{k}" if path else str(k))] for k, v in state.items()]}
    if isinstance(state, tuple | list):
        values = [_split(v, tensors, f"{path}.{i}") for i, v in enumerate(state)]
        return {"__tuple__": values} if isinstance(state, tuple) else values
    if isinstance(state, float) and not math.isfinite(state):
        return {"__float__": str(float(state))}  # JSON has no such numbers
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise RunFailed(f"{path} in a state dict is a {type(state).__name__}; only tensors and plain values can be saved")


def _join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        if "__tuple__" in tree:
            return tuple(_join(value, tensors) for value in tree["__tuple__"])
        if "__float__" in tree:
            return float(tree["__float__"])
        return {key: _join(value, tensors) for key, value in tree["__map__"]}
    if isinstance(tree, list):
        return [_join(value, tensors) for value in tree]
    return tree


def like(parameter: Tensor, state: Tensor) -> Tensor:
    """An optimizer's tensor in the memory layout of its parameter, as it was before it was saved."""
    if state.shape != parameter.shape:
        return state.clone()
    return torch.empty_like(parameter, dtype=state.dtype).copy_(state)


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """The text of a manifest, which ends with the digest of what it says: any byte that changes shows."""
    told = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return (json.dumps({**told, "sha256": digest}, indent=1) + "\n").encode()


def _digest(path: Path) -> dict[str, Any]:
    with _plain(path).open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _plain(path: Path) -> Path:
    """The path of a file that is neither a link, which may lead out of the run, nor a pipe, which may never end."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise RunFailed(f"{path.parent}: not a valid checkpoint: {path.name} is not a plain file")
    return path


def _read(path: Path) -> bytes:
    if _plain(path).stat().st_size > JSON_LIMIT:
        raise RunFailed(f"{path.parent}: not a valid checkpoint: {path.name} is larger than {JSON_LIMIT:,} bytes")
    return path.read_bytes()


def _read_back(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Compare a file with what it was written from, bit by bit."""
    found = load_file(path)
    for name, tensor in tensors.items():
        if not torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)):
            raise OSError(errno.EIO, f"{path.name} does not hold what was written to it")


def _write_json(path: Path, value: object) -> None:
    text = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
    if len(text) > JSON_LIMIT:
        raise ValueError(f"{path.name} would be larger than {JSON_LIMIT:,} bytes: long states have to be tensors")
    path.write_bytes(text)


def _remove(*paths: Path) -> None:
    """Remove folders as far as they can be removed, and links without what they lead to."""
    for path in paths:
        if path.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    folder = path.is_dir()
    if os.name == "nt" and folder:
        return  # Windows has no handle on a folder to flush
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows flushes only what may be written
    try:
        os.fsync(handle)
    except OSError as error:
        if not (folder and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network file systems cannot
            raise
    finally:
        os.close(handle)

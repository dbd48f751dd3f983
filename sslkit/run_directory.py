"""A run's directory: one writer, and files that say what was run and how it goes.

`recipe.lock.toml`, `env.json`, `status.json`, `metrics.jsonl`, `bad_samples.jsonl`, `checkpoints/`, `tensorboard/`,
`local/`.
"""

from __future__ import annotations

import json
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sslkit import local, words
from sslkit.errors import RunFailed, UserError
from sslkit.files import in_one_piece

LOCK_HEADER = "# Every option of the run, spelt out. `sslkit train` on this file gives the same losses.\n"

WRITTEN = ("checkpoints", "tensorboard", local.FOLDER)
"""Folders of a run that its files are written into."""


class RunDirectory:
    """Opens a directory for writing, and holds it until `close`.

    Raises:
        UserError: it cannot be written, something in it leads out of it, or another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            refuse_strays(path, *WRITTEN)
            probe = path / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written: {error.strerror or error}; choose another {words.spoken().run_dir}"
            ) from None
        # The operating system lets go of the lock if the process dies, so a crash leaves nothing to clean up.
        self._lock = FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{path}: another process is training in this directory; choose another {words.spoken().run_dir}"
            ) from None
        self._metrics: Any = None
        self.lasting: dict[str, Any] = {}
        """Facts that every `status` of this process repeats."""

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def lock_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.lock.toml"

    @property
    def has_run(self) -> bool:
        """True if a run was begun here."""
        return self.lock_file.is_file()

    def write(self, name: str, text: str | bytes) -> None:
        """Write a small file so that a reader never sees half of it.

        Raises:
            RunFailed: the disk is full, or the directory is gone.
        """
        path = self.path / name
        try:
            if path.parent != self.path:
                path.parent.mkdir(exist_ok=True)
            with in_one_piece(path) as staging:
                staging.write_bytes(text.encode() if isinstance(text, str) else text)
        except OSError as error:
            raise RunFailed(f"{path}: cannot be written: {error.strerror or error}") from error

    def keep_local(self, classes: Iterable[type]) -> dict[str, str]:
        """Copy the files that components came from, so that the run can be repeated from here.

        Returns:
            The new `use` of each component, as the lock file says it, by its old one.
        """
        sources = {local.use_of(cls): source for cls in classes if (source := local.source_of(cls))}
        names = local.kept_names(list(sources.values()))
        for source in sources.values():
            self.write(f"{local.FOLDER}/{names[source.path]}", source.text)
        return {
            use: f"./{local.FOLDER}/{names[source.path]}:{use.rpartition(':')[2]}" for use, source in sources.items()
        }

    def status(self, state: str, **facts: Any) -> None:
        """`status.json`: running, preempted, interrupted, stopped, lost, failed or done, with the step."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        told = {"status": state, "time": now, "pid": os.getpid(), **self.lasting, **facts}
        self.write("status.json", json.dumps(told, indent=1) + "\n")

    def read_status(self) -> dict[str, Any]:
        """`status.json`, empty where there is none."""
        return read_json(self.path / "status.json")

    # ------------------------------------------------------------ metrics

    def open_metrics(self, offset: int) -> None:
        """Open `metrics.jsonl` for appending, after cutting it to the offset that a checkpoint remembers."""
        path = self.path / "metrics.jsonl"
        try:
            self._metrics = path.open("ab", buffering=0)  # a record is one write
            if self._metrics.tell() > offset:  # what was recorded since will be measured again
                self._metrics.truncate(offset)
                self._metrics.seek(0, os.SEEK_END)
        except OSError as error:
            raise RunFailed(f"{path}: cannot be written: {error.strerror or error}") from error

    def record(self, values: Mapping[str, Any]) -> None:
        """Append one line, in one write."""
        try:
            self._metrics.write((json.dumps(values) + "\n").encode())
        except OSError as error:
            raise RunFailed(f"{self.path / 'metrics.jsonl'}: cannot be written: {error.strerror or error}") from error

    @property
    def metrics_offset(self) -> int:
        """Bytes written to `metrics.jsonl`."""
        return int(self._metrics.tell())

    def sync_metrics(self) -> None:
        """Make the records survive a power cut, before a checkpoint refers to them."""
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Let go of the directory."""
        try:
            if self._metrics is not None:
                self._metrics.close()
        finally:
            self._lock.release()


class OtherProcess(RunDirectory):
    """The directory as every process but the first has it: one to read, in which nothing is written or held."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lasting = {}

    def write(self, name: str, text: str | bytes) -> None:
        """Nothing: the first process writes."""

    def keep_local(self, classes: Iterable[type]) -> dict[str, str]:
        """Nothing is kept."""
        return {}

    def open_metrics(self, offset: int) -> None:
        """Nothing is opened."""

    def record(self, values: Mapping[str, Any]) -> None:
        """Nothing is recorded."""

    def close(self) -> None:
        """Nothing is held."""


def refuse_strays(run: Path, *written: str) -> None:
    """Hold a directory, which may be a stranger's, to what it says of itself: nothing in it leads out, or blocks.

    Args:
        run: the directory of a run.
        written: its folders that are to be written into: they and what lies in them is looked at, too. Without them,
            links to folders elsewhere may be there.

    Raises:
        UserError: a link leads out of the directory, or an entry is a pipe or a device.
    """
    home = os.path.realpath(run)
    for folder in (run, *(run / name for name in written)):
        try:
            entries = sorted(folder.iterdir()) if folder.is_dir() else []
        except OSError:  # whoever reads or writes there will say so
            continue
        for entry in entries:
            if entry.is_symlink():
                inside = Path(os.path.realpath(entry)).is_relative_to(home)
                if not inside and (written or not entry.is_dir()):
                    raise UserError(f"{entry}: is a link that leads out of the run's directory; remove the link")
            elif not stat.S_ISREG(mode := entry.lstat().st_mode) and not stat.S_ISDIR(mode):
                raise UserError(f"{entry}: is neither a file nor a folder; remove it")


def read_json(path: Path) -> dict[str, Any]:
    """The table that a JSON file holds; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run's `metrics.jsonl`; a last line that was cut off by a crash is left out."""
    records = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return records


def environment(
    command: Sequence[str], provenance: list[dict[str, str]], device: str, processes: int, fingerprint: str
) -> dict[str, Any]:
    """What `env.json` holds: versions, machine, plugins, data, the commit of the working directory."""
    packages = ("sslkit", "torch", "torchvision", "timm", "numpy", "pydantic", "safetensors")
    return {
        "command": list(command),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "device": device,
        "processes": processes,
        "packages": {name: found for name in packages if (found := _version(name))},
        "plugins": provenance,
        "data_fingerprint": fingerprint,
        "git": _git(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


# The working directory may be a stranger's, and git runs what the configuration in it names.
_HARMLESS = ("--no-optional-locks", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")


def _git() -> dict[str, Any] | None:
    def ask(*arguments: str) -> str:
        command = ["git", *_HARMLESS, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=5, stdin=subprocess.DEVNULL
        ).stdout.strip()

    try:
        commit, known = ask("rev-parse", "HEAD"), ask("config", "--local", "--includes", "--name-only", "--list")
        if any(key.startswith("filter.") for key in known.splitlines()):  # programs that looking for changes would run
            return {"commit": commit, "changed": None}
        changed = bool(ask("status", "--porcelain", "-uno", "--ignore-submodules=dirty"))
        return {"commit": commit, "changed": changed}
    except (OSError, subprocess.SubprocessError):
        return None

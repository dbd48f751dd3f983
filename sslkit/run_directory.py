"""A run's directory: one writer, and files that say what was run and how it goes.

`recipe.lock.toml`, `env.json`, `status.json`, `metrics.jsonl`, `bad_samples.jsonl`, `checkpoints/`, `tensorboard/`,
`local/`. Beside them lie what is made from them: `report.html`, `evaluation.json` and `evaluation/`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import stat
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sslkit import local, words
from sslkit.errors import RunFailed, UserError
from sslkit.files import in_one_piece

LOCK_HEADER = "# Every option of the run, spelt out. `sslkit train` on this file gives the same losses.\n"

WRITTEN = ("checkpoints", "tensorboard", local.FOLDER)
"""Folders of a run that its files are written into."""


class TakenOver(RunFailed):
    """Another process writes to the directory now, and this one must not touch it any more."""


class RunDirectory:
    """Opens a directory for writing, and holds it until `close`.

    The first write takes a new attempt number, which every later one looks for: a process that outlived its launcher,
    or one on a host that the lock does not reach, then sees that another has taken over, and writes no more.

    Raises:
        UserError: it cannot be written, something in it leads out of it, or another process writes to it.
    """

    whose = ("status", "time", "attempt", "host", "pid")
    """The keys of `status.json` that every `status` sets anew."""

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
        self.unlocked = ""
        """Why this file system cannot tell other processes that this one trains here; empty if it can."""
        try:
            self.unlocked = cannot_lock(path / ".lock")
            if not self.unlocked:
                self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{path}: another process is training in this directory{self._holder()}; choose another "
                f"{words.spoken().run_dir}"
            ) from None
        except OSError as error:
            raise UserError(f"{path / '.lock'}: cannot be locked: {error.strerror or error}") from None
        self._metrics: Any = None
        self._attempt: dict[str, Any] = {}
        """What this process wrote into `.attempt`; empty before its first write."""
        self.told = ""
        """What this process said last in `status.json`."""
        self.lasting: dict[str, Any] = {}
        """Facts that every `status` of this process repeats."""

    def _holder(self) -> str:
        found = read_json(self.path / ".attempt")
        return f" (process {found['pid']} on {found['host']})" if {"pid", "host"} <= found.keys() else ""

    def claim(self) -> None:
        """Take a new attempt number, or make sure that nobody has taken one since.

        Raises:
            TakenOver: another process has.
            RunFailed: the directory is gone.
        """
        path = self.path / ".attempt"
        found = read_json(path)
        if not self._attempt:
            self._attempt = {
                "attempt": int(found.get("attempt") or 0) + 1, "host": socket.gethostname(), "pid": os.getpid(),
                "token": secrets.token_hex(8),
            }  # fmt: skip
            self._put(path, json.dumps(self._attempt) + "\n")
        elif not found:
            raise RunFailed(f"{self.path}: was removed or emptied while this process trained in it; it writes no more")
        elif found != self._attempt:
            raise TakenOver(
                f"{self.path}: attempt {found.get('attempt')} of this run (process {found.get('pid')} on "
                f"{found.get('host')}) has taken over; this is attempt {self._attempt['attempt']}, and writes no more"
            )

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
        self.claim()
        self._put(self.path / name, text)

    def keep_traceback(self, text: str) -> Path:
        """Keep what only whoever mends the code wants to see, and say where.

        Raises:
            RunFailed: as `write`.
        """
        self.write("traceback.txt", text)
        return self.path / "traceback.txt"

    def forget_failure(self) -> None:
        """Remove what an earlier run, of which nothing is left, failed of."""
        for name in ("bad_batch.json", "traceback.txt"):
            (self.path / name).unlink(missing_ok=True)

    def _put(self, path: Path, text: str | bytes) -> None:
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
        """`status.json`: running, preempted, interrupted, stopped, lost, failed or done, with the step.

        docs/reference/run-directory.md promises its keys to those who read it.
        """
        self.claim()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        who = {key: self._attempt[key] for key in ("attempt", "host", "pid")}
        told = {"status": state, "time": now, **who, **self.lasting, **facts}
        self._put(self.path / "status.json", json.dumps(told, indent=1) + "\n")
        self.told = state

    def ended_early(self, state: str, **facts: Any) -> None:
        """Say of a run that ended before it trained how it did; step and length stay what they were."""
        if self.told in ("", "running"):
            before = self.read_status()
            if before.get("status") == "done":
                return
            known = {"step": 0} | {key: before[key] for key in ("resumed_at", "step", "of") if key in before}
            self.status(state, **{**known, **facts})

    def read_status(self) -> dict[str, Any]:
        """`status.json`, empty where there is none."""
        return read_json(self.path / "status.json")

    # ------------------------------------------------------------ metrics

    def open_metrics(self, offset: int) -> int:
        """Open `metrics.jsonl` for appending, after cutting it to the offset that a checkpoint remembers.

        Returns:
            How many bytes it lacks, if it is shorter than that.
        """
        self.claim()
        path = self.path / "metrics.jsonl"
        try:
            self._metrics = path.open("ab", buffering=0)  # a record is one write
            whole = offset
            if self._metrics.tell() < offset:  # half a record must not spoil the next
                whole = path.read_bytes().rfind(b"\n") + 1
            if self._metrics.tell() > whole:  # what was recorded since will be measured again
                self._metrics.truncate(whole)
                self._metrics.seek(0, os.SEEK_END)
            return offset - whole
        except OSError as error:
            raise RunFailed(f"{path}: cannot be written: {error.strerror or error}") from error

    def record(self, values: Mapping[str, Any]) -> None:
        """Append one line, in one write."""
        self.claim()
        line = (json.dumps(values) + "\n").encode()
        try:
            if self._metrics.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the beginning found room
        except OSError as error:
            raise RunFailed(f"{self.path / 'metrics.jsonl'}: cannot be written: {error.strerror or error}") from error

    def forget(self, offset: int) -> None:
        """Cut the records that came after an offset, which will be measured again."""
        self.claim()
        self._metrics.truncate(offset)
        self._metrics.seek(0, os.SEEK_END)

    @property
    def metrics_offset(self) -> int:
        """Bytes written to `metrics.jsonl`."""
        return int(self._metrics.tell())

    def sync_metrics(self) -> None:
        """Make the records survive a power cut, before a checkpoint refers to them."""
        if not os.fstat(self._metrics.fileno()).st_nlink:
            raise RunFailed(
                f"{self.path / 'metrics.jsonl'}: was removed while the run goes on, so its records are lost; the same "
                "command goes on from the newest checkpoint that is left"
            )
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

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank = path, rank
        self.lasting, self.unlocked, self.told = {}, "", ""

    def write(self, name: str, text: str | bytes) -> None:
        """Nothing: the first process writes."""

    def keep_traceback(self, text: str) -> Path:
        """The one thing that is written: what went wrong here may have gone wrong nowhere else."""
        path = self.path / f"traceback-{self.rank}.txt"
        with contextlib.suppress(OSError):
            path.write_text(text, encoding="utf-8")
        return path

    def forget_failure(self) -> None:
        """Nothing is removed."""

    def claim(self) -> None:
        """Nothing is claimed."""

    def status(self, state: str, **facts: Any) -> None:
        """Nothing is said."""

    def ended_early(self, state: str, **facts: Any) -> None:
        """Nothing is said."""

    def forget(self, offset: int) -> None:
        """Nothing was recorded."""

    @property
    def metrics_offset(self) -> int:
        """Nothing was recorded."""
        return 0

    def keep_local(self, classes: Iterable[type]) -> dict[str, str]:
        """Nothing is kept."""
        return {}

    def open_metrics(self, offset: int) -> int:
        """Nothing is opened."""
        return 0

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
                continue
            try:
                mode = entry.lstat().st_mode
            except FileNotFoundError:  # of another process, which has put it into its place by now
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise UserError(f"{entry}: is neither a file nor a folder; remove it")


def cannot_lock(path: Path) -> str:
    """Why the file system of a file has no locks, as some network file systems do not; empty if it has."""
    try:
        import fcntl
    except ImportError:  # Windows, where all have
        return ""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            held = error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)
            return "" if held else error.strerror or str(error)
    return ""


def died(status: Mapping[str, Any]) -> bool:
    """True if the process that `status.json` calls running is of this machine and is gone."""
    pid = status.get("pid")
    if status.get("status") != "running" or status.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    if os.name == "nt":  # where asking would end it
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def read_json(path: Path) -> dict[str, Any]:
    """The table that a JSON file holds; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _integer(text: str) -> int | float:
    """An integer that is a float as well; one of hundreds of digits, which no run writes, is infinite."""
    return int(text) if len(text) < 300 else float(text)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run's `metrics.jsonl`; a last line that was cut off by a crash is left out."""
    records = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line, parse_int=_integer))
        except (ValueError, RecursionError):
            break
    return records

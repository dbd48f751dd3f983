"""Bytes that no one wrote on purpose, given to what reads strangers' files: a coverage-guided fuzzer.

    pip install atheris                                   # needs Linux or macOS
    python benchmarks/fuzz.py recipe --minutes 5 [--keep found/]
    python benchmarks/fuzz.py checkpoint --minutes 5
    python benchmarks/fuzz.py log --minutes 5

Each target may end in one of the errors that are lines for the user, and in nothing else: no other exception, nothing
that takes longer than ten seconds or more than 2.5 GB. What does is written into `--keep` and shown with its traceback;
`python benchmarks/fuzz.py recipe --again found/crash-...` runs it once more. The small and fast form is in
tests/test_fuzz.py, with what was found here.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import atheris  # type: ignore[import-not-found, unused-ignore]

with atheris.instrument_imports(include=["sslkit", "tomllib"]):
    import torch

    from sslkit import checkpoint, sources
    from sslkit.errors import RunFailed, SslkitError, UserError
    from sslkit.foreign import csv_run
    from sslkit.recipe import parse_recipe

WORK = Path(tempfile.mkdtemp(prefix="sslkit-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
LOGS = (
    b"epoch,loss,lr\n0,1.0,0.1\n1,0.5,0.1\n2,nan,0.1\n",
    b"Epoch: 4 Epoch_Loss: 0.0054 tau: 0.99\nEpoch: 5 Epoch_Loss: 0.0044 tau: 0.999\n",
    b'{"step": 1, "loss": 0.3}\n{"step": 2, "loss": 0.2, "cosine": 0.9}\n',
    b"1.0\n0.9\n0.8\n0.7\n",
    b"loss;acc\n1,5;3%\n1,4;4%\n",
    b"[10/100] loss=-0.91 std 0.01\n[20/100] loss=-0.99 std 1e-4\n",
)


def _look_at(error: SslkitError) -> None:
    if not error.lines or not all(line.isprintable() for line in error.lines):
        raise AssertionError(error.lines)


def recipe(data: bytes) -> None:
    """The recipe reader, up to the typed recipe and its written form."""
    try:
        parse_recipe(sources.decoded(data, "fuzz.toml"), "fuzz.toml").to_toml()
    except UserError as error:
        _look_at(error)


def log(data: bytes) -> None:
    """The reader of other programs' logs, up to the verdict."""
    path = WORK / "log.csv"
    path.write_bytes(data)
    try:
        csv_run.examine(str(path)).text()
    except UserError as error:
        _look_at(error)


def _sound_checkpoint() -> Path:
    parts = {
        "model": {"weight": torch.ones(2, 3), "count": torch.tensor(3)},
        "optimizer": {"state": {0: {"momentum": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }
    return checkpoint.save(WORK / "sound", 7, parts, {"metrics_offset": 12, "knn_top1": 0.5, "recipe_hash": "abc"})


SOUND = _sound_checkpoint()
NAMES = sorted(path.name for path in SOUND.iterdir())


ODD = (
    None, True, -1, 0, 2**70, 1e308, math.nan, "", "x", "../x", "model", "__map__", "\0", [], {}, [[]], [1, 2],
    {"__tensor__": "x"}, {"__map__": [["a", 1]]}, {"__map__": [[[], 1]]}, {"__map__": 3},
)  # fmt: skip
"""What may take the place of any value in a JSON file."""


def _edited(content: bytes, edits: bytes) -> bytes:
    """Every four bytes are an edit: a place, a kind and a value."""
    found = bytearray(content)
    for at in range(0, len(edits) - 3, 4):
        place = int.from_bytes(edits[at : at + 2], "big") % (len(found) + 1)
        kind, value = edits[at + 2] % 4, edits[at + 3]
        if kind == 0:
            found[place : place + 1] = bytes([value])
        elif kind == 1:
            found[place : place + value] = b""
        elif kind == 2:
            found[place:place] = found[place : place + value]
        else:
            found[place:place] = bytes([value])
    return bytes(found)


def _other_values(content: bytes, choices: bytes) -> bytes:
    """Every two bytes put an odd value in the place of one in a JSON file."""
    tree = [json.loads(content)]
    for which, value in zip(choices[::2], choices[1::2], strict=False):
        nodes: list[tuple[Any, Any]] = []
        todo: list[Any] = [tree]
        while todo:
            node = todo.pop()
            for key in node if isinstance(node, dict) else range(len(node)):
                nodes.append((node, key))
                if isinstance(node[key], dict | list):
                    todo.append(node[key])
        if nodes:
            node, key = nodes[which % len(nodes)]
            node[key] = copy.deepcopy(ODD[value % len(ODD)])
    return json.dumps(tree[0]).encode()


def loaded(data: bytes) -> None:
    """The checkpoint reader. The first byte says which file is changed and how, and whether the manifest then vouches
    for it, since a check that always fails would hide what lies behind."""
    folder = WORK / "step-000000007"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(SOUND, folder)
    how, rest = (data[0], data[1:]) if data else (0, b"")
    vouched, manner, name = how & 1, how >> 1 & 3, NAMES[(how >> 3) % len(NAMES)]
    content = (SOUND / name).read_bytes()
    if manner == 0:
        content = rest
    elif manner == 1 or not name.endswith(".json"):
        content = _edited(content, rest)
    else:
        content = _other_values(content, rest)
    (folder / name).write_bytes(content)
    if vouched and name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        checkpoint.best(folder.parent)
        checkpoint.load(folder)
    except (RunFailed, UserError) as error:
        _look_at(error)


def seeds(target: str) -> Iterator[bytes]:
    """Inputs to start from."""
    if target == "recipe":
        yield from (path.read_bytes() for path in sources.shipped().values())
    elif target == "log":
        yield from LOGS
    else:
        for number, name in enumerate(NAMES):
            yield bytes([8 * number + 1]) + (SOUND / name).read_bytes()
            yield from (bytes([8 * number + 2 * manner + 1]) + bytes(range(40)) for manner in (1, 2))


def words(target: str) -> set[str]:
    """What the fuzzer may write as a whole."""
    text = b"\n".join(seeds(target)).decode("utf-8", "replace")
    signs = {"[[", "]]", '"""', "'''", "\\u0000", "\r\n", "\ufeff", "nan", "inf", "1979-05-27", "0x7f", "use = "}
    return {word for word in re.findall(r"[A-Za-z_][A-Za-z0-9_]*", text) if len(word) < 40} | signs


TARGETS: dict[str, Callable[[bytes], None]] = {"recipe": recipe, "checkpoint": loaded, "log": log}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--keep", type=Path, default=Path("found"), help="folder for inputs that broke something")
    parser.add_argument("--again", type=Path, help="run this one input, and no other")
    options = parser.parse_args()
    warnings.simplefilter("error")
    if options.again:
        TARGETS[options.target](options.again.read_bytes())
        return
    options.keep.mkdir(parents=True, exist_ok=True)
    corpus = WORK / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds(options.target)):
        (corpus / f"{number:03}").write_bytes(data)
    quoted = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in sorted(words(options.target)))
    (WORK / "words").write_text("".join(f'"{word}"\n' for word in quoted))
    arguments = [
        f"-max_total_time={round(60 * options.minutes)}", "-max_len=20000", "-len_control=0", "-timeout=10",
        "-rss_limit_mb=2500", f"-dict={WORK / 'words'}", f"-artifact_prefix={options.keep}/", "-print_final_stats=1",
        str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *arguments], TARGETS[options.target])
    atheris.Fuzz()


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(WORK, ignore_errors=True)

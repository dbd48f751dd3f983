"""A run's encoder for use without sslkit.

Whatever is written is read back as somebody else would read it, and gives the run's own features, or is not kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, get_args

import sslkit
from sslkit.errors import UserError, did_you_mean, printable
from sslkit.exporting import graphs, hub
from sslkit.exporting.card import CARD, Card, use_of
from sslkit.exporting.folder import TOLD, WRITTEN_BY, digest, refuse_foreign, replacing, tidy
from sslkit.exporting.prepared import Check, Job, Preparation, Prepared, preparation_of, reference
from sslkit.opened_run import Branch, open_run
from sslkit.run_directory import read_json
from sslkit.telling import tell

__all__ = ["Check", "Export", "Format", "Preparation", "command", "export"]

Format = Literal["timm", "torch", "onnx"]


@dataclass(frozen=True)
class Export:
    """What was written, and how it was found to be right."""

    folder: Path
    facts: Mapping[str, Any]
    """What `sslkit.json` says: the weights, the images that they take, versions, and each file's SHA-256."""
    checks: tuple[Check, ...]
    """One for each file that holds the network."""
    note: str = ""
    """What one has to know to use it."""

    def text(self) -> str:
        """What a terminal shows."""
        facts, images = self.facts, self.facts["images"]
        lines = [
            f"{self.folder}: {facts['feature_dim']} features of {images['channels']} x {images['size']} x "
            f"{images['size']} images, step {facts['step']}, {facts['branch']} network"
        ]
        lines += [f"  {check.words}" for check in self.checks]
        return "\n".join(map(printable, [*lines, *(self.note.splitlines())]))

    def as_json(self) -> str:
        """The facts, for a program."""
        return json.dumps({"folder": str(self.folder), **self.facts}, indent=1)


def export(
    run_dir: str | PathLike[str],
    to: str | PathLike[str] | None = None,
    *,
    formats: Sequence[Format] = ("timm",),
    branch: Branch = "evaluated",
    checkpoint: Literal["last", "best"] | int = "last",
    size: int | None = None,
    name: str | None = None,
    licence: str | None = None,
    opset: int | None = None,
    allow_local_code: bool = False,
) -> Export:
    """Write a run's encoder for use without sslkit: what `sslkit export` does.

    Everything that is written is read back and compared with the run's own features first. The folder is written whole
    or not at all, and takes the place of an earlier export alone.

    Args:
        run_dir: The run's directory.
        to: Folder to write; `export` in the run's directory without it.
        formats: `timm`: safetensors that timm loads, with a configuration; `torch`: torch.export; `onnx`. A model card
            is always written.
        branch: `evaluated` is the branch that the run's own figures are of, which its target updater names.
        checkpoint: `last`; `best`, that with the highest kNN accuracy; or the number of a step.
        size: Side of the images that `torch` and `onnx` take; without it, that which the run was measured with.
        name: Name in the model card; without it, the recipe's.
        licence: SPDX identifier in the model card, as `apache-2.0`.
        opset: Version of ONNX's operator set; without it, the exporter's choice.
        allow_local_code: Let a backbone or view generator run that came from a file beside the recipe.

    Raises:
        UserError: there is no such run, an option does not fit, or the folder is somebody else's.
        RunFailed: what was written does not give the run's features.
    """
    chosen = _formats(formats)
    _check_options(chosen, size, opset, licence)
    folder = Path(run_dir) / "export" if to is None else Path(to)
    tidy(folder)
    refuse_foreign(folder)
    opened = open_run(run_dir, branch, checkpoint, allow_local_code=allow_local_code)
    preparation = preparation_of(opened)
    job = Job(
        opened=opened, preparation=preparation, known=opened.spec.portable(opened.info), formats=chosen,
        side=preparation.size if size is None else size, opset=opset, licence=(licence or "").lower(),
        name=printable(str(opened.tables.get("name", "encoder") if name is None else name)),
    )  # fmt: skip
    earlier = read_json(folder / TOLD).get("files")
    with replacing(folder) as staging:
        checks = tuple(_write(staging, job))
        (staging / CARD).write_text(Card(job, checks).text(), encoding="utf-8")
        facts = _facts(job) | {"checks": [asdict(check) for check in checks]}
        facts["files"] = {path.name: digest(path) for path in sorted(staging.iterdir())}
        (staging / TOLD).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    gone = sorted(set(earlier if isinstance(earlier, dict) else ()) - set(facts["files"]))
    replaced = f"took the place of an export that also had {', '.join(gone)}; name all formats in one command to have "
    notes = [_note(job, folder), f"{replaced}them together" if gone else ""]
    return Export(folder, facts, checks, "\n".join(filter(None, notes)))


def command(run: str, *, as_json: bool, **how: Any) -> None:
    """What the command does; its options are in `sslkit.cli_use`."""
    done = export(run, **how)
    tell(done.as_json() if as_json else done.text())


def _formats(given: Sequence[str]) -> tuple[Format, ...]:
    """In the order in which they are written, each once."""
    valid = get_args(Format)
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, Iterable):
        raise UserError(f"formats: should be a list, not {given!r}; choose of {', '.join(valid)}")
    for one in (given := list(given)):
        if not isinstance(one, str):
            raise UserError(f"formats: should be names, not {one!r}; choose of {', '.join(valid)}")
        if one not in valid:
            raise UserError(f"formats: there is no {one!r}{did_you_mean(one, valid)}; choose of {', '.join(valid)}")
    return cast(tuple[Format, ...], tuple(one for one in valid if one in given)) or ("timm",)


def _check_options(formats: Sequence[str], size: int | None, opset: int | None, licence: str | None) -> None:
    for name, given in (("size", size), ("opset", opset)):
        if given is not None and type(given) is not int:  # True is an int, too
            raise UserError(f"{name}: should be a whole number, not {given!r}")
    if not isinstance(licence, str | None):
        raise UserError(f"licence: should be text, not {licence!r}")
    if size is not None and formats == ("timm",):
        raise UserError("size: timm's weights are tied to no size but the run's own; size is for torch and onnx")
    if size is not None and size < 1:
        raise UserError(f"size: should be 1 or more, not {size}")
    if opset is not None and "onnx" not in formats:
        raise UserError("opset: is for onnx, which is not asked for")
    if licence is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", licence):
        raise UserError(f"licence: should be an SPDX identifier such as apache-2.0 or cc-by-4.0, not {licence!r}")
    if "onnx" in formats:
        graphs.refuse_without_onnx()


def _write(folder: Path, job: Job) -> Iterator[Check]:
    if "timm" in job.formats:
        hub.write(folder, job)
        yield hub.check(folder, job, reference(job.opened, job.preparation, job.preparation.size))
    if {"torch", "onnx"} & set(job.formats):
        wanted = reference(job.opened, job.preparation, job.side)
        prepared = Prepared(job.opened.backbone, job.preparation)
        if "torch" in job.formats:
            yield graphs.write_torch(folder, prepared, wanted)
        if "onnx" in job.formats:
            yield graphs.write_onnx(folder, prepared, wanted, job.opset)


def _facts(job: Job) -> dict[str, Any]:
    opened, known = job.opened, job.known
    packages = ["torch", *(["timm"] if known else []), *(["onnx", "onnxruntime"] if "onnx" in job.formats else [])]
    return {
        "schema": 1,
        "written_by": WRITTEN_BY,
        "name": job.name,
        "run": opened.run.resolve().name,
        "recipe_hash": opened.facts.get("recipe_hash"),
        "data_fingerprint": opened.facts.get("data_fingerprint"),
        "checkpoint": opened.checkpoint,
        "step": opened.step,
        "branch": opened.branch,
        "weights": opened.weights,
        "licence": job.licence or None,
        "feature_dim": opened.backbone.feature_dim,
        "images": asdict(job.preparation),
        "graph_size": job.side if {"torch", "onnx"} & set(job.formats) else None,
        "network": asdict(known)
        if known
        else {"sslkit": opened.tables["backbone"] | {"use": use_of(opened.tables, "backbone")}},
        "formats": list(job.formats),
        "versions": {"sslkit": sslkit.__version__, **{name: metadata.version(name) for name in packages}},
    }


def _note(job: Job, folder: Path) -> str:
    if "timm" not in job.formats:
        return ""
    if job.known is None:
        whole = "the graphs do not" if len(job.formats) > 1 else "--format torch and --format onnx write it whole"
        name = use_of(job.opened.tables, "backbone")
        return f"backbone {name!r} is no network of timm's, so that these weights need sslkit; {whole}"
    if hub.is_by_name(job.known):
        name = f"local-dir:{folder}"
        quoted = json.dumps(name, ensure_ascii=not name.isprintable())
        return f"timm.create_model({quoted}, pretrained=True) loads it"
    return f"timm has no name for this network: {folder / CARD} has the lines that build and load it"

"""The encoder as a graph that needs no Python of its own: torch.export, and ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import torch
from torch import Tensor

from sslkit.errors import RunFailed, UserError
from sslkit.exporting.prepared import Check, Prepared, Reference

TORCH = "model.pt2"
ONNX = "model.onnx"

TORCH_ALLOWED = 1e-5
ONNX_ALLOWED = 1e-4
"""How far features may be from the run's own, as a share of the largest. onnxruntime sums in an order of its own."""

_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def refuse_without_onnx() -> None:
    """Refuse to begin where the packages are not there.

    Raises:
        UserError: one of them is not.
    """
    missing = [name for name in _NEEDED if util.find_spec(name) is None]
    if missing:
        raise UserError(f"format: onnx needs {' and '.join(missing)}, not installed here: pip install 'sslkit[onnx]'")


def write_torch(folder: Path, prepared: Prepared, reference: Reference) -> Check:
    """`model.pt2`, written, read back and compared.

    Raises:
        RunFailed: the network cannot be traced, or the file gives other features.
    """
    path = folder / TORCH
    with _quietly("torch.export cannot trace this network"):
        # Two images: a batch of one would be taken for a constant.
        program = torch.export.export(
            prepared, (reference.pixels[:2],), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            strict=False,
        )  # fmt: skip
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
    return reference.check(TORCH, f"torch.export.load, torch {metadata.version('torch')}", TORCH_ALLOWED, loaded)


def write_onnx(folder: Path, prepared: Prepared, reference: Reference, opset: int | None) -> Check:
    """`model.onnx`, written, checked by onnx, read back by onnxruntime and compared.

    Raises:
        UserError: the operator set is not one that the exporter can write.
        RunFailed: the network cannot be converted, or the file gives other features.
    """
    import onnx
    import onnxruntime

    path = folder / ONNX
    with _quietly("the network cannot be converted to ONNX"):
        program = torch.onnx.export(
            prepared, (reference.pixels[:2],), dynamo=True, input_names=["images"], output_names=["features"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}}, opset_version=opset, verbose=False,
            external_data=False,
        )  # fmt: skip
        assert program is not None
        program.save(str(path), external_data=False)
        written = onnx.load(str(path))
        onnx.checker.check_model(written, full_check=True)
    got = next(entry.version for entry in written.opset_import if entry.domain in ("", "ai.onnx"))
    if opset is not None and got != opset:
        raise UserError(f"opset: this network cannot be written with operator set {opset}; the exporter made {got}")
    if not written.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise RunFailed("the ONNX graph takes one number of images alone; nothing was kept")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def compute(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"images": pixels.numpy()})[0])

    by = f"onnxruntime {metadata.version('onnxruntime')}, operator set {got}"
    return reference.check(ONNX, by, ONNX_ALLOWED, compute)


@contextlib.contextmanager
def _without_logging() -> Iterator[None]:
    """onnxscript logs the traceback of every conversion that it gives up."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _quietly(problem: str) -> Iterator[None]:
    """Without the exporters' warnings and progress, and with whatever they raise as one line."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _without_logging():
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise RunFailed(f"{problem}: {type(error).__name__}: {line}; nothing was kept") from error

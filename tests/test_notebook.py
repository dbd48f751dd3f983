"""The notebook of the tutorial, run as Jupyter runs it: it says what its stored outputs say."""

from __future__ import annotations

import re
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "tutorial" / "python.ipynb"
MEASURED = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"


def said(cell: Any) -> list[str]:
    """What a cell printed, without figures, which differ between machines, and without lines that come by the clock."""
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    lines = [line for line in text.splitlines() if not re.match(r"epoch |(warning|error) at step ", line)]
    return [re.sub(MEASURED, "#", line.partition(" on cpu")[0]) for line in lines]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Jupyter's own
def test_the_notebook_runs_and_says_what_it_shows(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    stored = nbformat.read(NOTEBOOK, as_version=4)
    ran = nbformat.read(NOTEBOOK, as_version=4)
    checks = """
assert (result.status, other.status) == ("done", "done")
assert accuracy == max(result.metrics.curve("knn_top1")[1]), "the encoder is that of the run"
assert result.metrics.last("knn_top1") > 2 * result.metrics[0]["knn_top1"]
"""
    ran.cells.append(nbformat.v4.new_code_cell(checks))
    nbclient.NotebookClient(ran, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for old, new in zip(stored.cells, ran.cells, strict=False):
        if old.cell_type == "code":
            assert said(new) == said(old), f"run it again and store it: {old.source}"
            assert all(output.output_type == "stream" and output.name == "stdout" for output in old.outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_stop_button_ends_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    manager = pytest.importorskip("jupyter_client").manager
    pytest.importorskip("ipykernel")
    kernels, client = manager.start_new_kernel(cwd=str(tmp_path))
    try:
        code = """
        import sslkit
        long = ["train.epochs=2000", "data_source.prints=1", "train.checkpoint_every=5", "train.log_every=5"]
        result = sslkit.train(sslkit.load_recipe("quickstart", long), device="cpu", quiet=True)
        print(result.status, result.step >= 5, sslkit.load_encoder(result.directory).step == result.step)
        """
        asked = client.execute(textwrap.dedent(code))
        deadline = time.monotonic() + 120
        while not any(tmp_path.glob("runs/quickstart/checkpoints/step-*")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        kernels.interrupt_kernel()
        printed = ""
        idle = False
        while not idle:
            message = client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") == asked:
                content = message["content"]
                printed += content.get("text", "") + "".join(content.get("traceback", []))
                idle = content.get("execution_state") == "idle"
        assert printed == "interrupted True True\n"
    finally:
        client.stop_channels()
        kernels.shutdown_kernel(now=True)


def test_the_notebook_holds_nothing_of_the_machine_that_ran_it() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(?:home|root|work|tmp|Users)/\w", text)
    assert "\\u001b" not in text, "no drawing over lines"

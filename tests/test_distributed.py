"""Several processes compute what one process computes with the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_testing import OURS, component

from sslkit.distributed import World
from sslkit.testing import run_info
from sslkit.testing.processes import run_together, state_of, train_together, trained

LOSSES = [provider for provider in OURS if provider.kind == "loss"]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What two and four processes, which share each batch of 16 images, have after two steps with each loss."""
    found = {}
    for processes in (2, 4):
        found[processes] = folder = tmp_path_factory.mktemp(f"of{processes}")
        losses = [component(provider, folder) for provider in LOSSES]
        for said, code in train_together(losses, run_info(), processes, folder, alike=True):
            assert code == 0, said
    return found


@pytest.mark.parametrize("number", range(len(LOSSES)), ids=[provider.key for provider in LOSSES])
@pytest.mark.parametrize("processes", [2, 4])
def test_every_loss_is_that_of_one_process_with_the_whole_batch(
    together: dict[int, Path], processes: int, number: int, tmp_path: Path
) -> None:
    # Loss, gradients, weights, queues and centres after two steps, in float64 and without BatchNorm.
    alone = trained(component(LOSSES[number], tmp_path), run_info(), World(), alike=True)
    assert any(name.startswith("gradient.") for name in alone)
    for rank in range(processes):
        found = state_of(together[processes], number, rank)
        assert set(found) == set(alone)
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


LIGHTLY = """
import sys
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from lightly.loss import NTXentLoss, TiCoLoss, VICRegLoss
from sslkit.batch import Branches, ViewSpec
from sslkit.distributed import joined
from sslkit.testing import run_info
from sslkit_contrastive import NTXent
from sslkit_covariance import TiCo, VICReg

SPECS = (ViewSpec(32), ViewSpec(32))
with joined(torch.device("cpu")) as (world, _):
    images = [torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(v)) for v in (0, 1)]
    for ours, theirs, target in (
        (NTXent(), NTXentLoss(gather_distributed=True), False),
        (VICReg(), VICRegLoss(gather_distributed=True), False),
        (TiCo(), TiCoLoss(gather_distributed=True), True),
    ):
        found = []
        for which in ("ours", "theirs"):
            weight = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
            a, b = (world.share(x) @ weight for x in images)
            b = b.detach() if target else b
            if which == "theirs":
                total = theirs(a, b)
            else:
                branches = Branches(SPECS, [None] * 2, [a, None] if target else [a, b], [None] * 2,
                                    [None, b] if target else [None] * 2)
                total = ours.build(8, run_info()).double()(world.whole(branches)).total
            total.backward()
            world.average([total, weight.grad])
            found += [total.detach(), weight.grad]
        torch.testing.assert_close(found[0], found[2], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[1], found[3], rtol=1e-10, atol=1e-10, msg=lambda m: f"{ours}: {m}")
        print(type(ours).__name__, float(found[0]))
"""


def test_two_processes_against_lightlys_in_two_processes(tmp_path: Path) -> None:
    # Not Barlow Twins: lightly standardises each process's share by itself, so that its loss depends on their number.
    pytest.importorskip("lightly")
    script = tmp_path / "lightly_losses.py"
    script.write_text(LIGHTLY, encoding="utf-8")
    ended = run_together([sys.executable, "-W", "ignore", str(script)], 2)
    assert [code for _, code in ended] == [0, 0], ended

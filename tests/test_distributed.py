"""Several processes compute what one process computes with the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_testing import OURS, component

from sslkit.distributed import World, joined
from sslkit.errors import UserError
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


@pytest.mark.slow
def test_two_processes_against_lightlys_in_two_processes(tmp_path: Path) -> None:
    # Not Barlow Twins: lightly standardises each process's share by itself, so that its loss depends on their number.
    pytest.importorskip("lightly")
    script = tmp_path / "lightly_losses.py"
    script.write_text(LIGHTLY, encoding="utf-8")
    ended = run_together([sys.executable, "-W", "ignore", str(script)], 2)
    assert [code for _, code in ended] == [0, 0], ended


SPLIT = """
import torch
from torch import nn
from sslkit.batch_norm import running_statistics, split_batch_norm
from sslkit.distributed import joined

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5),
                         nn.BatchNorm1d(5)).double().train()

images = torch.randn(3, 12, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
alone, shared = network(), network()
split_batch_norm(alone, 2, "it")
with joined(torch.device("cpu")) as (world, _):
    for batch in images:
        expected, found = alone(batch), shared(world.share(batch))
        torch.testing.assert_close(found, world.share(expected))
        world.average(running_statistics(shared))
assert len(running_statistics(shared)) == 4
for one, other in zip(running_statistics(alone), running_statistics(shared)):
    assert not torch.equal(one, torch.zeros_like(one)) and not torch.equal(one, torch.ones_like(one))
    torch.testing.assert_close(one, other)
"""


def test_batch_norm_in_two_processes_is_that_of_two_groups_in_one(tmp_path: Path) -> None:
    script = tmp_path / "split.py"
    script.write_text(SPLIT, encoding="utf-8")
    ended = run_together([sys.executable, str(script)], 2)
    assert [code for _, code in ended] == [0, 0], ended


FROZEN = """
import torch
from torch import nn
from sslkit.batch_norm import running_statistics
from sslkit.distributed import joined
from sslkit.freezing import freeze

torch.manual_seed(0)
network = nn.Sequential(nn.BatchNorm1d(1000), nn.BatchNorm1d(4))
network[0].running_mean.normal_()
before = network[0].running_mean.clone()
freeze(network, None, ["0"])
with joined(torch.device("cpu")) as (world, _):
    averaged = before.clone()
    world.average([averaged])
    assert not torch.equal(averaged, before), "a third of three times a number may be another number"
    world.average(running_statistics(network))
assert len(running_statistics(network)) == 2
assert torch.equal(network[0].running_mean, before)
"""


@pytest.mark.slow
def test_frozen_batch_norm_stays_to_the_last_bit_in_three_processes(tmp_path: Path) -> None:
    script = tmp_path / "frozen.py"
    script.write_text(FROZEN, encoding="utf-8")
    ended = run_together([sys.executable, str(script)], 3)
    assert [code for _, code in ended] == [0] * 3, ended


def test_processes_without_torchrun_are_one() -> None:
    with joined(torch.device("cpu")) as (world, device):
        rows = torch.arange(6).view(3, 2)
        assert (world.size, world.is_first, device.type) == (1, True, "cpu")
        assert world.share(rows) is rows
        assert world.first(lambda: 7) == 7
        assert world.together(lambda: 8) == 8
        assert world.together(lambda: 9, all_of_them=True) == [9]
        assert world.words(3) == 3
        with pytest.raises(UserError, match="mine"):
            world.first(lambda: (_ for _ in ()).throw(UserError("mine")))


TOGETHER = """
import os, sys
import torch
from sslkit.distributed import EndedElsewhere, PeerLost, joined, tells
from sslkit.errors import RunFailed, UserError

def fail(line):
    raise UserError(line)

with joined(torch.device("cpu")) as (world, _):
    assert world.first(lambda: f"of {world.rank}") == "of 0"
    assert world.together(lambda: world.rank) == world.rank
    assert world.together(lambda: 10 + world.rank, all_of_them=True) == [10, 11]
    for who in (0, 1):
        try:
            world.together(lambda: fail("no") if world.rank == who else 1)
            raise SystemExit("nobody failed")
        except UserError as error:
            assert world.rank == who and error.lines == ("no",)
        except EndedElsewhere as error:
            assert world.rank != who and error.lines == () and not tells(error, world)
    try:
        world.together(lambda: fail(f"both, {world.rank}"))
    except UserError as error:
        assert world.rank == 0
    except EndedElsewhere:
        assert world.rank == 1
    assert world.words(world.rank * 15) == 15
    assert world.words(0, 1.5) == 0
    try:
        world.words(0, 1.5 + world.rank)
        raise SystemExit("the same digest")
    except RunFailed as error:
        assert "(1.5, 0; 2.5, 0)" in error.lines[0]
    told = world.together(lambda: tells(RunFailed("x"), world), all_of_them=True)
    assert sorted(told) == [False, True]
    if world.rank == 1:
        os._exit(0)
    try:
        world.words(0)
        raise SystemExit("nobody was lost")
    except PeerLost as error:
        assert error.lines[0].startswith("process 0 of 2: another process has ended")
        os._exit(0)
"""


def test_what_two_processes_say_to_each_other(tmp_path: Path) -> None:
    script = tmp_path / "together.py"
    script.write_text(TOGETHER, encoding="utf-8")
    ended = run_together([sys.executable, str(script)], 2)
    assert [code for _, code in ended] == [0, 0], ended

"""Several processes compute what one process computes with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_testing import OURS, component

from sslkit.distributed import World
from sslkit.testing import run_info
from sslkit.testing.processes import state_of, train_together, trained

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

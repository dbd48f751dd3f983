"""What the state of a run takes on a disk; taking and putting back is in tests/test_trainer.py and test_resume.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sslkit import state
from sslkit.errors import UserError


def test_room_is_known_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.zeros(2**20))  # 4 MiB
    model = nn.Module()
    model.weight = weight
    parts: Any = SimpleNamespace(
        model=model, loss=nn.Module(), groups=[SimpleNamespace(parameters=[weight])],
        recipe=SimpleNamespace(train=SimpleNamespace(keep_checkpoints=3)),
    )  # fmt: skip
    for free, total, says in (
        (7.9, 100, UserError),
        (8.1, 100, "a checkpoint takes about 8.0 MiB, of which up to 5 are there at a time"),
        (39.9, 100, "39.9 MiB are free on this disk"),
        (40.0, 100, None),
        (0.0, 0, None),
    ):
        usage = SimpleNamespace(free=int(free * 2**20), total=total)
        monkeypatch.setattr(state.shutil, "disk_usage", lambda _, usage=usage: usage)  # type: ignore[attr-defined]
        if says is UserError:
            with pytest.raises(
                UserError, match=r"7\.9 MiB are free on this disk, and a checkpoint takes about 8\.0 MiB"
            ):
                state.shortage(parts, tmp_path)
        else:
            found = state.shortage(parts, tmp_path)
            assert (found is None) if says is None else (str(says) in str(found))

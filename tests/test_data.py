from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslkit.api import RunInfo, ViewSpec
from sslkit.batch import Batch
from sslkit.data import Draw, Feed, channel_statistics
from sslkit.errors import UserError

RUN = RunInfo(
    seed=3, device="cpu", image_size=4, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3, train_images=50, total_steps=24,
    steps_per_epoch=6, batch_size=8, views=(ViewSpec(4),),
)  # fmt: skip
CPU = torch.device("cpu")


class Views:
    specs = RUN.views

    def draw(self, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"angle": torch.rand(n, generator=generator)}


class Stored:
    """Images whose pixels are their number; in memory or not."""

    def __init__(self, n: int = 50, in_memory: bool = True, fails_at: int | None = None) -> None:
        self.all = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 4, 4).contiguous()
        self.tensor = self.all if in_memory else None
        self.labels = torch.arange(n) % 10
        self.fails_at, self.reads = fails_at, 0

    def __len__(self) -> int:
        return len(self.all)

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        self.reads += 1
        if self.fails_at is not None and self.reads > self.fails_at:
            raise UserError("image 7 went away")
        return self.all[indices]


def feed(images: Stored, run: RunInfo = RUN) -> Feed:
    return Feed(images, Views(), run, CPU)  # type: ignore[arg-type]


def test_in_memory_and_read_ahead_give_the_same_draws() -> None:
    for a, b in zip(feed(Stored()).steps(2, 9), feed(Stored(in_memory=False)).steps(2, 9), strict=True):
        assert torch.equal(a.batch.images, b.batch.images)
        assert torch.equal(a.batch.indices, b.batch.indices)
        assert torch.equal(a.parameters["angle"], b.parameters["angle"])
        assert torch.equal(a.batch.images[:, 0, 0, 0].long(), a.batch.indices)
        assert a.batch.labels is not None
        assert torch.equal(a.batch.labels, a.batch.indices % 10)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.integers(0, 5), st.integers(0, 2**31))
def test_an_epoch_shows_no_image_twice_and_every_epoch_another_order(batch: int, epoch: int, seed: int) -> None:
    per_epoch = 50 // batch
    f = feed(Stored(), replace(RUN, seed=seed, batch_size=batch, steps_per_epoch=per_epoch))
    seen = torch.cat([f.indices(epoch * per_epoch + s) for s in range(per_epoch)])
    assert len(seen.unique()) == len(seen) == batch * per_epoch
    assert not torch.equal(seen, torch.cat([f.indices((epoch + 1) * per_epoch + s) for s in range(per_epoch)]))


def test_an_error_while_reading_ahead_reaches_the_loop_and_the_thread_ends() -> None:
    draws = feed(Stored(in_memory=False, fails_at=2)).steps(0, 10)
    assert len([next(draws), next(draws)]) == 2
    with pytest.raises(UserError, match="image 7 went away"):
        next(draws)
    assert "sslkit-read-ahead" not in {t.name for t in threading.enumerate()}


def test_leaving_early_ends_the_thread() -> None:
    draws = feed(Stored(in_memory=False)).steps(0, 20)
    next(draws)
    draws.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while "sslkit-read-ahead" in {t.name for t in threading.enumerate()}:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_micro_batches_are_the_batch_in_order() -> None:
    draw = Draw(Batch(torch.arange(12).view(12, 1, 1, 1), torch.arange(12), None), {"x": torch.arange(12)})
    parts = list(draw.micro(3))
    assert torch.equal(torch.cat([p.batch.images for p in parts]), draw.batch.images)
    assert torch.equal(torch.cat([p.parameters["x"] for p in parts]), draw.parameters["x"])
    assert next(draw.micro(1)) is draw


def test_channel_statistics_are_the_training_images_own() -> None:
    images = Stored()
    generator = torch.Generator().manual_seed(0)
    images.all = torch.randint(0, 256, images.all.shape, generator=generator, dtype=torch.uint8)
    images.all[:, 1] //= 2
    mean, std = channel_statistics(images)
    values = images.all.double() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), abs=1e-4)

"""The order of an epoch over blocks, the blocks that are held, and which files a pattern means."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslkit.errors import UserError
from sslkit_datasets.blocks import Block, Blocks, check_room
from sslkit_datasets.order import sampled, windowed
from sslkit_datasets.shards import find_files

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=30)


def blocks_of(counts: list[int]) -> torch.Tensor:
    """Numbers with gaps, as blocks have them of which nothing is left."""
    return torch.repeat_interleave(torch.arange(len(counts)) * 3, torch.tensor(counts))


def keyed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(COUNTS, st.integers(1, 300), st.integers(0, 99))
def test_an_order_is_a_permutation_that_follows_from_its_key(counts: list[int], window: int, seed: int) -> None:
    blocks = blocks_of(counts)
    order = windowed(blocks, window, keyed(seed))
    assert order.sort().values.tolist() == list(range(len(blocks)))
    assert torch.equal(order, windowed(blocks, window, keyed(seed)))


@given(COUNTS, st.integers(1, 50), st.integers(0, 99))
def test_few_blocks_are_open_at_any_time(counts: list[int], window: int, seed: int) -> None:
    """From the first image of a block to its last, no more than window + its length others go by, in either row."""
    order = windowed(blocks_of(counts), window, keyed(seed))
    block = blocks_of(counts)[order]
    for number in block.unique():
        places = (block == number).nonzero().flatten()
        assert int(places[-1] - places[0]) < 2 * window + int((block == number).sum())


def test_a_window_of_one_reads_block_by_block_and_a_wide_one_shuffles_all() -> None:
    blocks = blocks_of([10] * 100)
    order = windowed(blocks, 1, keyed(0)).reshape(100, 10)
    assert torch.equal(order, order[:, :1] + torch.arange(10))
    assert order[:, 0].tolist() != sorted(order[:, 0].tolist())
    seen = torch.stack([windowed(blocks, 100_000, keyed(seed)) for seed in range(200)]).double()
    # Each image stands anywhere: mean 499.5, of 200 draws within five standard deviations of the mean.
    places = seen.argsort(dim=1).double().mean(0)
    assert (places - 499.5).abs().max() < 5 * (1000**2 / 12 / 200) ** 0.5
    batch = windowed(blocks, 300, keyed(0))[300:364]
    assert len(blocks[batch].unique()) > 15, "a batch is drawn from many blocks"


def test_every_epoch_has_its_own_order_of_blocks() -> None:
    blocks = blocks_of([5] * 20)
    assert not torch.equal(windowed(blocks, 4, keyed(0)), windowed(blocks, 4, keyed(1)))
    assert windowed(torch.empty(0, dtype=torch.int64), 4, keyed(0)).tolist() == []


@given(COUNTS, st.integers(1, 200))
def test_a_sample_is_spread_and_touches_few_blocks(counts: list[int], n: int) -> None:
    blocks = blocks_of(counts)
    chosen = sampled(blocks, n)
    assert 1 <= len(chosen) <= n
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen.dtype == torch.int64
    if n >= len(blocks):
        assert len(chosen) == len(blocks)


def test_a_sample_of_a_large_set() -> None:
    blocks = blocks_of([1000] * 500)
    chosen = blocks[sampled(blocks, 1000)]
    assert len(chosen) == 1000
    assert len(chosen.unique()) == 8
    assert (int(chosen.min()), int(chosen.max())) == (0, 499 * 3)


# ---------------------------------------------------------------- blocks


def test_blocks_are_read_once_while_they_are_held() -> None:
    read: list[int] = []
    blocks = Blocks(lambda n: read.append(n) or [bytes(10)] * 3, 90)  # type: ignore[func-returns-value]
    for n in (0, 1, 2, 0, 1, 2, 3, 1, 2, 3, 0):
        assert len(blocks[n]) == 3
    assert read == [0, 1, 2, 3, 0]


def test_threads_wait_for_one_that_reads() -> None:
    read, start = [], threading.Barrier(8)

    def slowly(n: int) -> Block:
        read.append(n)
        time.sleep(0.05)
        return [str(n).encode()]

    blocks = Blocks(slowly, 1)

    def want(n: int) -> bytes | None:
        start.wait()
        return blocks[n][0]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(want, [1, 2] * 4)) == [b"1", b"2"] * 4
    assert sorted(read) == [1, 2]


def test_a_block_that_cannot_be_read_is_tried_again() -> None:
    tries: list[int] = []

    def read(n: int) -> Block:
        tries.append(n)
        if len(tries) == 1:
            raise OSError("no")
        return [b"x"]

    blocks = Blocks(read, 100)
    with pytest.raises(OSError, match="no"):
        blocks[0]
    assert blocks[0] == [b"x"]


def test_windows_that_do_not_fit_are_refused() -> None:
    check_room([10**8] * 100, 10_000, 1000, 1.2, "")
    check_room([10**8] * 5, 10_000, 10**9, 0.5, "")  # all of it fits
    with pytest.raises(UserError, match=r"data_source.window: 1001 images .* set window to 1000 at most"):
        check_room([10**8] * 100, 10_000, 1001, 1.2, "")
    with pytest.raises(UserError, match=r"data_source.cache_gb: .* one takes 0\.1 GB, .* or rewrite them$"):
        check_room([10**8, 1], 10_000, 1, 0.19, "rewrite them")


# ---------------------------------------------------------------- which files


def test_ranges(tmp_path: Path) -> None:
    for i in range(8, 13):
        (tmp_path / f"s-{i:03}.tar").write_bytes(b"")
    found, test = find_files(str(tmp_path / "s-{008..012}.tar"), None, ".tar")
    assert ([f.name for f in found], test) == ([f"s-{i:03}.tar" for i in range(8, 13)], [])
    with pytest.raises(UserError, match=r"data_source.path: 2 of 6 files are missing: .*s-013.tar and others"):
        find_files(str(tmp_path / "s-{009..014}.tar"), None, ".tar")
    for wrong in ("{5..1}", "{0..9999999}", "{0..9999}{0..9999}"):
        with pytest.raises(UserError, match="should be a range of at most 1,000,000 numbers"):
            find_files(str(tmp_path / f"s-{wrong}.tar"), None, ".tar")

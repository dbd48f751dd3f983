"""Where the time of `sslkit embed` goes, on CIFAR-10's test images as 10,000 PNG files.

    python benchmarks/embed.py RUN [--images 10000] [--workers N] [--rows 1000000]

Reads `test*.parquet` in $SSLKIT_DATA/cifar10. Measured, in one process: the reading of the files alone, in one thread
and in N; the forward passes alone, on images in memory; both together, as the command does it; and the search for the
24 nearest of ten queries among rows of random numbers, of a file that the system has cached.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from sslkit.data import cache_folder
from sslkit.embedding import embed
from sslkit.encoder import encoder_of
from sslkit.environment import cores_here
from sslkit.feature_files import Rows, _writer
from sslkit.image_files import find, portions, reader_of
from sslkit.opened_run import open_run
from sslkit.searching import _nearest

BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=cores_here())
    parser.add_argument("--rows", type=int, default=1_000_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(asked, Path(scratch))


def measure(asked: argparse.Namespace, scratch: Path) -> None:
    folder = scratch / "images"
    folder.mkdir()
    rows = pq.read_table(sorted((cache_folder() / "cifar10").glob("test*.parquet"))).to_pylist()[: asked.images]
    for number, row in enumerate(rows):
        (folder / f"{number:05d}.png").write_bytes((row.get("img") or row["image"])["bytes"])

    opened = open_run(asked.run)
    reader, encoder = reader_of(opened), encoder_of(opened)
    found = find(folder, reader.suffixes)
    batches = [range(at, min(at + BATCH, len(found.names))) for at in range(0, len(found.names), BATCH)]
    pixels: list[torch.Tensor] = []
    for workers in sorted({1, asked.workers}):
        pixels.clear()
        timed(
            f"read, {workers} threads", len(rows), lambda n=workers: take(portions(reader, found, batches, n), pixels)
        )
    timed("forward", len(rows), lambda: [encoder.features(part, BATCH) for part in pixels])
    timed("both", len(rows), lambda: embed(asked.run, folder, scratch / "out.parquet", say=print))

    width = encoder.feature_dim
    made = Rows()
    with _writer(scratch / "rows.parquet", made.table(width).schema) as writer:
        for at in range(0, asked.rows, 2048):
            count = min(2048, asked.rows - at)
            made = Rows()
            made.add([f"{at + i:08d}.png" for i in range(count)], torch.randn(count, width), ["0" * 64] * count)
            writer.write_table(made.table(width))
    queries = ([str(i) for i in range(10)], [""] * 10)
    timed("search", asked.rows, lambda: _nearest(scratch / "rows.parquet", torch.randn(10, width), *queries, 24))


def take(parts: Any, pixels: list[torch.Tensor]) -> None:
    pixels += [part.pixels for part in parts]


def timed(what: str, images: int, work: Callable[[], Any]) -> None:
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    print(f"{what:20} {seconds:8.2f} s {images / seconds:12,.0f} a second", flush=True)


if __name__ == "__main__":
    main()

"""From JPEG files of many sizes to BYOL views: sslkit's cutting in threads against lightly's transform in a DataLoader.

    python benchmarks/loader.py [--rounds 5] [--images 192] [--size 224] [--decoders] [--json PATH]
    python benchmarks/loader.py --train 20 [--size 96]

The files are about 500 x 400 pixels, cut from scikit-learn's two sample photographs and saved at quality 90. Contenders
take turns in one process (interleaved rounds, each over all files), so that whatever else the machine does meets all of
them; the figure is the median over rounds, in images a second, two views of each. Views are normalised float batches.
"crops" ends where a GPU would take over: at uint8 crops, after which sslkit works on the device. lightly's views are
those of its BYOLTransform, with bilinear crops where ours are bicubic. `--decoders` adds other decoders of JPEG.

`--train` trains a ResNet-18 by BYOL on the files for so many steps and prints what was recorded of speed and waiting.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor

from sslkit import local
from sslkit.api import DataSource, Incidental, RunInfo
from sslkit.build import build
from sslkit.data import Feed
from sslkit.recipe import parse_recipe
from sslkit.run_directory import RunDirectory
from sslkit.trainer import Trainer
from sslkit_crops import TwoCrops

CPU = torch.device("cpu")
BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Contender = Callable[[], int]
"""Works through all files; returns how many there were."""


# ---------------------------------------------------------------- files, and how they are decoded


def make_files(folder: Path, number: int) -> list[Path]:
    """Photographs of about 500 x 400 pixels: parts of two, of random place and size, resized."""
    from sklearn.datasets import load_sample_images

    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    drawn = np.random.default_rng(0)
    files = []
    for n in range(number):
        photograph = originals[n % 2]
        width = int(drawn.integers(400, photograph.width))
        height = int(drawn.integers(300, photograph.height))
        left, top = (
            int(drawn.integers(0, room + 1)) for room in (photograph.width - width, photograph.height - height)
        )
        size = int(drawn.integers(450, 551)), int(drawn.integers(350, 451))
        part = photograph.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.LANCZOS)
        files.append(folder / f"{n:05}.jpg")
        part.save(files[-1], quality=90)
    return files


def with_pillow(data: bytes) -> Tensor:
    import io

    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def with_torchcodec(data: bytes) -> Tensor:
    from torchcodec.decoders import decode_jpeg

    decoded: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return decoded.contiguous()


def with_simplejpeg(data: bytes) -> Tensor:
    import simplejpeg

    return torch.from_numpy(np.ascontiguousarray(simplejpeg.decode_jpeg(data, "RGB").transpose(2, 0, 1)))


DECODERS = {"pillow": with_pillow, "torchcodec": with_torchcodec, "simplejpeg": with_simplejpeg}


class Files:
    """Files as a data source would give them."""

    def __init__(self, files: list[Path], decoder: str, workers: int, size: int) -> None:
        self.files, self.decode, self.workers, self.size = files, DECODERS[decoder], workers, size
        self.labels, self.tensor = None, None
        sides = [Image.open(file).size for file in files]
        self.sizes = torch.tensor([(height, width) for width, height in sides], dtype=torch.int32)

    def __len__(self) -> int:
        return len(self.files)

    def original(self, index: int) -> Tensor:
        return self.decode(self.files[index].read_bytes())

    def read(self, indices: Tensor) -> Tensor:
        squares = [self.original(i)[None, :, :350, :350] for i in indices.tolist()]
        return torch.cat([torch.nn.functional.interpolate(s, (self.size, self.size)) for s in squares])


class Photographs(DataSource):
    """The files, for a recipe."""

    folder: str
    """Where they lie."""
    decoder: Literal["pillow", "torchcodec", "simplejpeg"] = "pillow"
    """What decodes them."""
    size: PositiveInt = 96
    """Side of the squares."""
    workers: Annotated[PositiveInt, Incidental] = 2
    """Threads."""

    def build(self, info: Any) -> Any:
        opened = argparse.Namespace(test=None, class_names=None, fingerprint="photographs", bad=())
        opened.train = Files(sorted(Path(self.folder).glob("*.jpg")), self.decoder, self.workers, self.size)
        return opened


# ---------------------------------------------------------------- contenders


def ours(files: list[Path], size: int, threads: int, decoder: str, *, crops: bool = False) -> Contender:
    run = RunInfo(
        seed=0, device="cpu", image_size=size, channels=3, mean=MEAN, std=STD, train_images=len(files),
        total_steps=10**6, steps_per_epoch=len(files) // BATCH, batch_size=BATCH, originals=True,
    )  # fmt: skip
    feed = Feed(Files(files, decoder, threads, size), TwoCrops(size=size).build(run), run, CPU)  # type: ignore[arg-type]
    epochs = iter(range(10**6))

    def work() -> int:
        start = next(epochs) * run.steps_per_epoch
        for draw in feed.steps(start, start + run.steps_per_epoch):
            if not crops:
                feed.viewing.make(draw.batch.images, draw.parameters)
        return run.steps_per_epoch * BATCH

    return work


def lightlys(files: list[Path], size: int, workers: int) -> Contender:
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    transform = BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))

    class Views(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> list[Tensor]:
            with Image.open(files[index]) as image:
                return transform(image.convert("RGB"))  # type: ignore[no-any-return]

    loader = torch.utils.data.DataLoader(
        Views(), BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )

    def work() -> int:
        return sum(len(views[0]) for views in loader)

    return work


def decoding(files: list[Path], decoder: str) -> Contender:
    stored = [file.read_bytes() for file in files]

    def work() -> int:
        for data in stored:
            DECODERS[decoder](data)
        return len(stored)

    return work


def measure(contenders: dict[str, Contender], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Of every contender in every round, after one that does not count: images a second, and milliseconds that this
    process computed for an image, which depend less on what else the machine does."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    costs: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            start, computed = time.perf_counter(), time.process_time()
            done = work()
            if number:
                rates[name].append(done / (time.perf_counter() - start))
                costs[name].append(1e3 * (time.process_time() - computed) / done)
    return rates, costs


# ---------------------------------------------------------------- a training

RECIPE = """
name = "loader"
data_source = {{ use = "./loader.py:Photographs", folder = "{folder}", size = {size} }}
view_generator = {{ use = "two_crops", size = {size} }}
backbone = {{ use = "timm", model = "resnet18" }}
projector = {{ use = "mlp", hidden_dim = 1024, out_dim = 256 }}
predictor = {{ use = "mlp", hidden_dim = 1024, out_dim = 256 }}
loss = {{ use = "cosine" }}
target_updater = {{ use = "ema" }}
optimizer = {{ use = "sgd", lr = 0.05 }}
[train]
epochs = 1000
batch_size = {batch}
compile = false
log_every = 1
"""


def train(folder: Path, size: int, steps: int, *overrides: str) -> None:
    text = RECIPE.format(folder=folder, size=size, batch=BATCH)
    with local.allowed(), tempfile.TemporaryDirectory() as run:
        parts = build(parse_recipe(text, str(Path(__file__).parent / "loader.toml"), overrides), CPU, print)
        directory = RunDirectory(Path(run))
        directory.open_metrics(0)
        trainer = Trainer(parts, directory)
        trainer.fit(steps)
        directory.close()
        records = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    for key in ("images_per_second", "data_wait"):
        values = [r[key] for r in records if key in r]
        low, high = min(values), max(values)
        print(f"{key}: median {statistics.median(values):.3g} of {len(values)} steps ({low:.3g} - {high:.3g})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=192, help="files")
    parser.add_argument("--size", type=int, default=224, help="side of the views, in pixels")
    parser.add_argument("--decoders", action="store_true", help="compare decoders of JPEG, too")
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="train for so many steps instead")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1 if not args.train else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        files = make_files(folder, args.images)
        kilobytes = sum(file.stat().st_size for file in files) / len(files) / 1e3
        print(f"{len(files)} JPEG files of {kilobytes:.0f} kB, views of {args.size} px; torch {torch.__version__}")
        if args.train:
            train(folder, args.size, args.train)
            return
        rates, costs = measure(contenders(files, args.size, args.decoders), args.rounds)
    report(rates, costs, args.rounds)
    if args.json:
        facts = {
            "files": len(files), "kilobytes": round(kilobytes), "size": args.size, "batch": BATCH,
            "rounds": args.rounds, "torch": torch.__version__, "python": platform.python_version(),
            "pillow": Image.__version__, "cores": torch.multiprocessing.cpu_count(),
        }  # fmt: skip
        args.json.write_text(
            json.dumps({"facts": facts, "images_per_second": rates, "milliseconds": costs}, indent=2) + "\n"
        )


def contenders(files: list[Path], size: int, decoders: bool) -> dict[str, Contender]:
    found: dict[str, Contender] = {}
    for number in (0, 2):
        found[f"lightly, {number} worker processes"] = lightlys(files, size, number)
    for threads in (1, 2):
        found[f"sslkit, {threads} threads"] = ours(files, size, threads, "pillow")
        found[f"sslkit, {threads} threads, crops"] = ours(files, size, threads, "pillow", crops=True)
    if decoders:
        for name in DECODERS:
            found[f"decoding alone, {name}"] = decoding(files, name)
            if name != "pillow":
                found[f"sslkit, 2 threads, {name}"] = ours(files, size, 2, name)
                found[f"sslkit, 2 threads, crops, {name}"] = ours(files, size, 2, name, crops=True)
    return found


def report(rates: dict[str, list[float]], costs: dict[str, list[float]], rounds: int) -> None:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    theirs = medians["lightly, 2 worker processes"]
    print(f"images a second, median of {rounds} rounds (lowest - highest); beside lightly's 2 processes; CPU an image")
    for name, values in rates.items():
        spread = f"({min(values):,.0f} - {max(values):,.0f})"
        # What worker processes compute is not this process's.
        cost = "" if "2 worker" in name else f"{statistics.median(costs[name]):8.2f} ms of CPU"
        print(f"{name:42}{medians[name]:>8,.0f}  {spread:17}{medians[name] / theirs:>6.2f}x{cost}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of other libraries
    main()

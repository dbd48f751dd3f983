"""How many pairs of BYOL views a second: torchvision and lightly image by image, sslkit by the batch, on one thread.

    python benchmarks/views.py [--rounds 5] [--batch 256] [--device cpu|cuda] [--json PATH]

Two views of 32 px of every image, with the same operations and probabilities everywhere, from decoded images in memory
to normalised float batches. All contenders take turns in one process (interleaved rounds), so that whatever else the
machine does meets all of them; the figure is the median over rounds. Images are CIFAR-10's where
`$SSLKIT_DATA/cifar10/train.parquet` exists, else noise. With `--device cuda` sslkit's part runs on the GPU.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
import torchvision.transforms as v1
import torchvision.transforms.v2 as v2
from PIL import Image
from torch import Tensor

from sslkit.api import RunInfo
from sslkit_crops import TwoCrops

SIZE = 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SETTINGS = {"CIFAR setting, no blur": (0.0, 0.0), "the paper's blur": (1.0, 0.1)}
SOLARIZE = (0.0, 0.2)
PER_IMAGE = 256
"""Images a round for the contenders that work image by image: about a quarter of a second."""
PER_ROUND = 4096
"""Images a round for sslkit: as long."""

Contender = Callable[[int], int]
"""Makes pairs for a round, given its number; returns how many."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=256, help="images a batch of sslkit's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where sslkit makes its views")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settle_memory()
    images, source = load_images(max(4 * args.batch, PER_IMAGE))
    print(f"{source}; {cpu_name()}, one thread; Python {platform.python_version()}, torch {torch.__version__}, "
          f"torchvision {torchvision.__version__}; batch {args.batch} on {device_name(args.device)}")  # fmt: skip
    results = {
        title: measure(contenders(images, blur, args.batch, torch.device(args.device)), args.rounds)
        for title, blur in SETTINGS.items()
    }
    for title, rates in results.items():
        report(title, rates, args.rounds)
    if args.json:
        facts = {
            "images": source, "cpu": cpu_name(), "device": device_name(args.device), "threads": 1,
            "batch": args.batch, "rounds": args.rounds, "torch": torch.__version__,
            "torchvision": torchvision.__version__, "python": platform.python_version(),
        }  # fmt: skip
        args.json.write_text(json.dumps({"facts": facts, "pairs_per_second": results}, indent=2) + "\n")


def settle_memory() -> None:
    """Do once what any training does: free a large tensor.

    glibc raises its thresholds when it first frees one, and from then on keeps memory between batches. In a process
    that never did, every batch of views is written to pages fresh from the kernel, which takes longer than the work.
    """
    large = torch.ones(31 * 2**18)
    del large


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Pairs per second of every contender in every round, after two rounds that do not count."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-2, rounds):
        for name, make in contenders.items():
            start = time.perf_counter()
            pairs = make(number + 2)
            rate = pairs / (time.perf_counter() - start)
            if number >= 0:
                rates[name].append(rate)
    return rates


def report(title: str, rates: dict[str, list[float]], rounds: int) -> None:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = [name for name in rates if name.startswith("sslkit")]
    print(f"\n{title}: pairs of views per second, median of {rounds} rounds (lowest - highest)")
    print(f"{'':34}{'pairs/s':>9}  {'':21}" + "".join(f"{name + ' /':>18}" for name in ours))
    for name, values in rates.items():
        spread = f"({min(values):,.0f} - {max(values):,.0f})"
        ratios = "".join(f"{medians[own] / medians[name]:>17.1f}x" for own in ours)
        print(f"{name:34}{medians[name]:>9,.0f}  {spread:21}{ratios}")


# ---------------------------------------------------------------- contenders


def contenders(images: Tensor, blur: tuple[float, float], batch: int, device: torch.device) -> dict[str, Contender]:
    few = images[:PER_IMAGE]
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in few]
    eager, compiled = sslkit_views(images, blur, batch, device)
    found = {
        "torchvision v2, uint8 tensors": one_by_one(torchvision_views(v2, blur), list(few)),
        "torchvision v1, Pillow images": one_by_one(torchvision_views(v1, blur), pictures),
    }
    lightly = lightly_views(blur)
    if lightly is not None:
        found["lightly, Pillow images"] = one_by_one(lightly, pictures)
    return {**found, "sslkit eager": eager, "sslkit compiled": compiled}


def one_by_one(views: list[Callable[[Any], Tensor]], images: list[Any]) -> Contender:
    """Every image on its own, then stacked to a batch as a DataLoader does."""

    def make(number: int) -> int:
        for view in views:
            torch.stack([view(image) for image in images])
        return len(images)

    return make


def torchvision_views(module: Any, blur: tuple[float, float]) -> list[Callable[[Any], Tensor]]:
    """The two views with `torchvision.transforms` (`module` v1, on Pillow images) or its v2, on tensors."""
    if module is v2:
        to_float = v2.ToDtype(torch.float32, scale=True)
        crop = v2.RandomResizedCrop(SIZE, scale=(0.08, 1), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    else:
        to_float = v1.ToTensor()
        crop = v1.RandomResizedCrop(SIZE, scale=(0.08, 1), interpolation=v1.InterpolationMode.BICUBIC)
    views = []
    for v in range(2):
        steps = [
            crop,
            module.RandomHorizontalFlip(0.5),
            module.RandomApply([module.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            module.RandomGrayscale(0.2),
        ]
        if blur[v] > 0:
            steps.append(module.RandomApply([module.GaussianBlur(3, sigma=(0.1, 2.0))], p=blur[v]))
        if SOLARIZE[v] > 0:
            steps.append(module.RandomSolarize(128, p=SOLARIZE[v]))
        views.append(module.Compose([*steps, to_float, module.Normalize(MEAN, STD)]))
    return views


def lightly_views(blur: tuple[float, float]) -> list[Callable[[Any], Tensor]] | None:
    """lightly's two BYOL transforms, or None where lightly is not installed. Its crop is bilinear, which is cheaper."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
    except ImportError:
        return None
    normalize = {"mean": list(MEAN), "std": list(STD)}
    return [
        view(input_size=SIZE, gaussian_blur=blur[v], solarization_prob=SOLARIZE[v], normalize=normalize)
        for v, view in enumerate((BYOLView1Transform, BYOLView2Transform))
    ]


def sslkit_views(
    images: Tensor, blur: tuple[float, float], batch: int, device: torch.device
) -> tuple[Contender, Contender]:
    """sslkit's views, eager and compiled, drawing included."""
    run = RunInfo(
        seed=0, device=device.type, image_size=SIZE, channels=3, mean=MEAN, std=STD, train_images=len(images),
        total_steps=1, steps_per_epoch=1, batch_size=batch,
    )  # fmt: skip
    maker = TwoCrops(blur=blur, solarize=SOLARIZE).build(run)
    stored = images.to(device)
    generator = torch.Generator().manual_seed(0)

    def views(chosen: Tensor, parameters: dict[str, Tensor]) -> list[Tensor]:
        return maker.appear(maker.crop(chosen, parameters), parameters)

    def contender(make_views: Callable[[Tensor, dict[str, Tensor]], list[Tensor]]) -> Contender:
        def make(number: int) -> int:
            for start in range(0, PER_ROUND, batch):
                parameters = {
                    name: values.to(device, non_blocking=True) for name, values in maker.draw(batch, generator).items()
                }
                make_views(stored[start % len(stored) :][:batch], parameters)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return -(-PER_ROUND // batch) * batch

        return make

    return contender(views), contender(torch.compile(views, fullgraph=True, dynamic=False))


# ---------------------------------------------------------------- images and machine


def load_images(n: int) -> tuple[Tensor, str]:
    """uint8 `[n, 3, 32, 32]`, and what they are."""
    path = Path(os.environ.get("SSLKIT_DATA", "~/.cache/sslkit")).expanduser() / "cifar10" / "train.parquet"
    if not path.exists():
        noise = torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return noise, f"{n} images of noise"
    import pyarrow.parquet

    rows = next(pyarrow.parquet.ParquetFile(path).iter_batches(n, columns=["img"])).to_pylist()
    decode = v2.Compose([v2.PILToTensor()])
    return torch.stack([decode(Image.open(io.BytesIO(row["img"]["bytes"]))) for row in rows]), f"{n} of CIFAR-10"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "the CPU"


if __name__ == "__main__":
    sys.exit(main())

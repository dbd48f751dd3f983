"""Images per second of a whole BYOL training step: sslkit against lightly's parts in a plain PyTorch loop.

Both train timm's ResNet-18 (its own stem, 32 px) with heads 512-1024-256 and 256-1024-256, SGD, batch 256, on real
CIFAR-10 images, with the same augmentation list, in one process and turn by turn: a round is a few steps of each.

    SSLKIT_DATA=... python benchmarks/train_step.py [--rounds 5] [--device auto] [--json out.json]

lightly's loop is its documented BYOL example with its PIL transform in a DataLoader; the second form of it adds what
sslkit's recipe uses (bf16 autocast, channels_last), so that the rest of the difference is views and engine.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from sslkit.build import build, choose_device
from sslkit.data import Draw
from sslkit.recipe import read_recipe
from sslkit.run_directory import RunDirectory
from sslkit.trainer import Trainer

BATCH = 256


def ours(device: torch.device, folder: Path, *overrides: str) -> Callable[[int], None]:
    files = RunDirectory(folder)
    files.open_metrics(0)
    off = ("observers.knn.enabled=false", "observers.tensorboard.enabled=false")
    trainer = Trainer(build(read_recipe("byol_cifar10_cpu", [*off, *overrides]), device, lambda text: None), files)

    def draws() -> Iterator[Draw]:
        yield from trainer.feed.steps(0, trainer.info.total_steps)

    feed = draws()

    def run(steps: int) -> None:
        for _ in range(steps):
            trainer.train_step(next(feed))
        trainer.check_finite()  # waits for the device

    return run


def lightly_loop(device: torch.device, images: torch.Tensor, workers: int, *, tuned: bool) -> Callable[[int], None]:
    import timm
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    transform = BYOLTransform(
        BYOLView1Transform(input_size=32, gaussian_blur=0.0), BYOLView2Transform(input_size=32, gaussian_blur=0.0)
    )

    class Views(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> list[torch.Tensor]:
            return transform(Image.fromarray(images[index].permute(1, 2, 0).numpy()))

    backbone = timm.create_model("resnet18", num_classes=0)
    projector, predictor = BYOLProjectionHead(512, 1024, 256), BYOLPredictionHead(256, 1024, 256)
    target, target_projector = copy.deepcopy(backbone), copy.deepcopy(projector)
    for module in (target, target_projector):
        deactivate_requires_grad(module)
    networks = torch.nn.ModuleList([backbone, projector, predictor, target, target_projector]).to(device)
    if tuned:
        networks.to(memory_format=torch.channels_last)
    trained = [*backbone.parameters(), *projector.parameters(), *predictor.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.12, momentum=0.9, weight_decay=5e-4)
    criterion = NegativeCosineSimilarity()

    def batches() -> Iterator[list[torch.Tensor]]:
        while True:
            loader = torch.utils.data.DataLoader(
                Views(), BATCH, shuffle=True, drop_last=True, num_workers=workers, pin_memory=device.type == "cuda"
            )
            yield from loader

    feed = batches()

    def run(steps: int) -> None:
        for _ in range(steps):
            update_momentum(backbone, target, m=0.99)
            update_momentum(projector, target_projector, m=0.99)
            one, two = (view.to(device, non_blocking=True) for view in next(feed))
            if tuned:
                one, two = (view.contiguous(memory_format=torch.channels_last) for view in (one, two))
            with torch.autocast(device.type, torch.bfloat16, enabled=tuned):
                p = [predictor(projector(backbone(view))) for view in (one, two)]
                with torch.no_grad():
                    z = [target_projector(target(view)) for view in (one, two)]
            loss = 0.5 * (criterion(p[0].float(), z[1].float()) + criterion(p[1].float(), z[0].float()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="steps of each a round")
    parser.add_argument("--workers", type=int, default=2, help="of lightly's DataLoader")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = choose_device(options.device)
    warnings.filterwarnings("ignore")

    with tempfile.TemporaryDirectory() as folder:
        from sslkit.build import open_data

        images = open_data(read_recipe("byol_cifar10_cpu"), print).train.tensor
        assert images is not None
        contenders = {
            "sslkit": ours(device, Path(folder, "a"), "train.compile=false"),
            "sslkit, compiled": ours(device, Path(folder, "b"), "train.compile=true"),
            "lightly's example": lightly_loop(device, images, options.workers, tuned=False),
            "lightly, bf16 and channels_last": lightly_loop(device, images, options.workers, tuned=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for run in contenders.values():
            run(3)
        for _ in range(options.rounds):
            for name, run in contenders.items():
                before = time.perf_counter()
                run(options.steps)
                rates[name].append(options.steps * BATCH / (time.perf_counter() - before))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}, Python {platform.python_version()}, {options.rounds} rounds")
    for name, values in rates.items():
        print(
            f"{name:34} {medians[name]:8.0f} images/s (min {min(values):.0f}, max {max(values):.0f})   "
            f"sslkit is {medians['sslkit'] / medians[name]:.2f} times as fast"
        )
    if options.json:
        found = {"where": where, "torch": torch.__version__, "images_per_second": rates}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

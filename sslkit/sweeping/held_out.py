"""`python -m sslkit.sweeping.held_out RUN BY DEVICE`: what a search maximises, measured on training images alone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sslkit import features, health, local, randomness
from sslkit.api import ImageSet
from sslkit.build import choose_device, open_data
from sslkit.errors import RunFailed, SslkitError, UserError
from sslkit.files import in_one_piece
from sslkit.opened_run import OpenedRun, knn_of, open_run
from sslkit.sweeping.search import FIGURE

MOST = 50_000
"""Training images that are looked at."""
SHARE = 0.1
"""Of these, how many are queries; the others are the bank."""
LIDAR_IMAGES, LIDAR_VIEWS = 1000, 10


def measure(run: Path, by: str, device: str, *, allow_local_code: bool) -> dict[str, Any]:
    """A run's figure by its newest weights: `{"by": ..., "value": ..., "step": ...}`.

    Args:
        run: its directory.
        by: `knn_held_out`, `lidar`, or `auto`: the first of them that its data allow.
        device: `auto`, `cpu` or `cuda`.
        allow_local_code: as `open_run` takes it.

    Raises:
        UserError: the run or its data cannot be opened, or they have no labels and need them.
        RunFailed: what the network makes of the images is not finite.
    """
    where = choose_device(device)
    opened = open_run(run, allow_local_code=allow_local_code)
    with local.allowed(allow_local_code):
        data = open_data(opened.recipe(), print)
    labelled = data.train.labels is not None and bool((data.train.labels >= 0).sum() >= 2)
    chosen = by if by != "auto" else "knn_held_out" if labelled else "lidar"
    if chosen == "knn_held_out" and not labelled:
        raise UserError(f"{run}: its training images have no labels; search --by lidar")
    found = _knn(opened, data, where) if chosen == "knn_held_out" else _lidar(opened, data, where)
    if not math.isfinite(found["value"]):
        raise RunFailed(f"{run}: at step {opened.step} the network's outputs are not finite, so it has no {chosen}")
    return {"by": chosen, "step": opened.step, **found}


def held_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the bank and of the queries: the same for every run on the same images."""
    labelled = (labels >= 0).nonzero().flatten()
    order = labelled[torch.randperm(len(labelled), generator=randomness.generator(0, "held_out"))][:MOST]
    queries = max(1, round(SHARE * len(order)))
    return order[queries:].sort().values, order[:queries].sort().values


def _knn(opened: OpenedRun, data: ImageSet, device: torch.device) -> dict[str, Any]:
    """kNN with the run's own k and temperature, or those of Wu et al. 2018."""
    labels = cast(Tensor, data.train.labels)
    recipe = opened.recipe()
    k, temperature = knn_of(recipe)
    backbone = _placed(opened, opened.backbone, device)
    rows = [
        features.features(
            backbone, data.train, positions, opened.views.clean, device, bf16=recipe.train.precision == "bf16",
            channels_last=opened.channels_last,
        )
        for positions in held_out(labels)
    ]  # fmt: skip
    # Neighbours are found by cosines: among features without a length any accuracy would be one by chance.
    if not all(bool(torch.linalg.vector_norm(part.float(), dim=1).isfinite().all()) for part in rows):
        return {"value": math.nan}
    bank, queries = (labels[positions].to(device) for positions in held_out(labels))
    record = features.knn_record(rows[0], bank, rows[1], queries, k=k, temperature=temperature)
    return {"value": record["knn_top1"], **{key: record[key] for key in record if key != "knn_top1"}}


def _lidar(opened: OpenedRun, data: ImageSet, device: torch.device) -> dict[str, Any]:
    """LiDAR as the health observer measures it at the end of a run; one that was stopped early has none."""
    backbone = _placed(opened, opened.backbone, device).eval()
    projector = _placed(opened, opened.projector(), device).eval()

    def online(pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = backbone(pixels)
        return found, projector(found)

    images = features.chosen(data.train, LIDAR_IMAGES)
    projections = features.view_projections(
        online, data.train, images, opened.views, LIDAR_VIEWS, randomness.generator(0, "lidar"), device,
        channels_last=opened.channels_last,
    )  # fmt: skip
    return {"value": health.lidar(projections), "lidar_images": len(images), "lidar_views": LIDAR_VIEWS}


def _placed(opened: OpenedRun, module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    module.to(device)
    if opened.channels_last:
        module.to(memory_format=torch.channels_last)
    return module


def main(run: str, by: str, device: str, *more: str) -> int:
    """Leave the figure in the run's directory."""
    try:
        found = measure(Path(run), by, device, allow_local_code="--allow-local-code" in more)
        with in_one_piece(Path(run) / FIGURE) as staging:
            staging.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except SslkitError as error:
        print(*error.lines, sep="\n  ")  # the log's reader takes the last line at the margin for what happened
        return error.exit_code
    print(f"{found['by']}: {found['value']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""The features of a run at one moment, small enough to look at: spectrum, map, nearest neighbours."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sslkit.api import Images
from sslkit.events import Run
from sslkit.features import chosen
from sslkit.files import in_one_piece
from sslkit.health import eigenvalues, rank_of

BANK, POINTS, QUERIES, NEIGHBOURS = 3_000, 500, 8, 6
"""Training images to search in and to take the spectrum of; images on the map; images whose neighbours are shown, and
how many of them."""
SIDE = 64
"""Pixels that the side of a picture has at most."""
WORTH_A_MAP = 100
"""Steps below which t-SNE, which takes seconds, is not drawn."""


def take(run: Run) -> dict[str, Any]:
    """What `snapshot.json` holds; see docs/reference/run-directory.md.

    Features are backbone features of the evaluated branch, in eval mode, of images without augmentation. Without test
    images, training images take their place. What cannot be had is left out, and `missing` says why.
    """
    train, test = run.data.train, run.data.test
    bank = chosen(train, BANK)
    split, images = ("train", train) if test is None else ("test", test)
    shown = chosen(images, POINTS)
    rows, points = run.features("train", bank), run.features(split, shown)
    found: dict[str, Any] = {"step": run.step, "missing": []}
    if not bool(torch.isfinite(rows).all() and torch.isfinite(points).all()):
        return {**found, "missing": ["The features are not finite, so nothing can be shown of them."]}
    sigma = eigenvalues(rows).sqrt()
    found["spectrum"] = {
        "images": len(rows), "dimensions": rows.shape[1], "effective_rank": rank_of(sigma), "values": _rounded(sigma),
    }  # fmt: skip
    found["projection"] = {"split": split, "labels": _labels(run, images, shown), **_plane(points, run.step)}
    found["neighbours"] = {"split": split, "bank": len(bank), "queries": _neighbours(run, split, bank, rows, shown,
                                                                                     points)}  # fmt: skip
    return found


def write(directory: Path, found: dict[str, Any]) -> Path:
    """Put a snapshot into a run directory, in one piece."""
    path = directory / "snapshot.json"
    with in_one_piece(path) as staging:
        staging.write_text(json.dumps(found), encoding="utf-8")
    return path


# ---------------------------------------------------------------- the plane


def _plane(points: Tensor, step: int) -> dict[str, Any]:
    """Two layouts of the same points. They are looked at, never measured."""
    z = points.double().cpu()
    z = z - z.mean(dim=0)
    _, sigma, directions = torch.linalg.svd(z, full_matrices=False)
    variance = float(sigma.square().sum())
    if len(z) < 3 or z.shape[1] < 2 or variance <= 1e-12 * max(1.0, float(points.double().square().sum())):
        return {}  # all in one place, or too few to speak of places
    found: dict[str, Any] = {
        "pca": _pairs(z @ directions[:2].T), "explained": _rounded(sigma[:2].square() / variance),
    }  # fmt: skip
    if step >= WORTH_A_MAP and len(z) >= 30:
        from sklearn.manifold import TSNE

        # Of the 30 directions of most variance, as in van der Maaten & Hinton 2008, section 4.2.
        reduced = (z @ directions[:30].T).float().numpy()
        perplexity = min(30.0, (len(z) - 1) / 3)
        layout = TSNE(init="pca", perplexity=perplexity, random_state=0, n_jobs=1).fit_transform(reduced)
        found["tsne"] = _pairs(torch.from_numpy(layout))
    return found


def _pairs(points: Tensor) -> list[list[float]]:
    """Coordinates of which a screen shows all that there is."""
    scale = points.abs().max().clamp_min(1e-12)
    return [[round(value, 4) for value in pair] for pair in (points / scale).tolist()]


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


# ---------------------------------------------------------------- neighbours


def _neighbours(
    run: Run, split: str, bank: Tensor, rows: Tensor, shown: Tensor, points: Tensor
) -> list[dict[str, Any]]:
    """Images spread evenly over those that are shown, each with the most similar ones of the bank."""
    images = run.data.train if split == "train" or run.data.test is None else run.data.test
    places = torch.linspace(0, len(shown) - 1, min(QUERIES, len(shown))).round().long().unique()
    queries = shown[places]
    similarity = F.normalize(points[places.to(points.device)], dim=1) @ F.normalize(rows, dim=1).T
    if split == "train":  # no image is its own neighbour
        same = queries[:, None] == bank[None, :]
        similarity = similarity.masked_fill(same.to(similarity.device), -math.inf)
    values, nearest = similarity.topk(min(NEIGHBOURS, len(bank) - (split == "train")), dim=1)
    names = _labels(run, images, queries)
    pictures = _pictures(images, queries)
    found = []
    for number, (cosines, near) in enumerate(zip(values.tolist(), bank[nearest.cpu()], strict=True)):
        beside = _labels(run, run.data.train, near)
        own = names[number] if names else None
        found.append({
            "image": pictures[number],
            "label": own,
            "neighbours": [
                {
                    "image": picture, "label": beside[i] if beside else None, "cosine": round(cosines[i], 4),
                    "agrees": None if own is None or not beside else beside[i] == own,
                }
                for i, picture in enumerate(_pictures(run.data.train, near))
            ],
        })  # fmt: skip
    return found


def _labels(run: Run, images: Images, indices: Tensor) -> list[str]:
    """Names of the images' classes, or their numbers where they have no names; empty without labels."""
    if images.labels is None:
        return []
    names: Sequence[str] = run.data.class_names or ()
    return [names[label] if 0 <= label < len(names) else str(label) for label in images.labels[indices].tolist()]


def _pictures(images: Images, indices: Tensor) -> list[str]:
    return [_picture(pixels) for pixels in images.read(indices)]


def _picture(pixels: Tensor) -> str:
    """uint8 `[C, H, W]` as the address of a small PNG; the first channel, or the first three."""
    channels = 3 if pixels.shape[0] >= 3 else 1
    values = pixels[:channels].permute(1, 2, 0).contiguous().cpu().numpy()
    picture = Image.fromarray(values if channels == 3 else values[:, :, 0])
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

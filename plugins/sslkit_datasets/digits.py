"""scikit-learn's handwritten digits, printed in random inks under slanting light."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor

from sslkit_datasets.images import Fingerprint, InMemory, Opened

if TYPE_CHECKING:
    from sslkit_datasets import Digits

SIDE, DIGIT, SHIFT = 16, 14, 1
TRAIN_SCANS = 1347


def open_digits(spec: Digits) -> Opened:
    """Split the scans, then print both parts; everything random comes from `spec.seed`."""
    scans, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(spec.seed)
    order = random.permutation(len(scans))
    train = _printed(scans[order[:TRAIN_SCANS]], labels[order[:TRAIN_SCANS]], spec.prints, random)
    test = _printed(scans[order[TRAIN_SCANS:]], labels[order[TRAIN_SCANS:]], spec.test_prints, random)
    fingerprint = Fingerprint(source="digits")
    for images in (train, test):
        for tensor in (images.tensor, images.labels):
            assert tensor is not None
            fingerprint.add(hashlib.sha256(tensor.numpy().tobytes()).digest())
    return Opened(train, test, tuple("0123456789"), fingerprint.hexdigest())


def _printed(
    scans: NDArray[np.float64], labels: NDArray[np.int64], prints: int, random: np.random.Generator
) -> InMemory:
    images = print_scans(np.repeat(scans.reshape(-1, 8, 8) / 16, prints, axis=0), random)
    return InMemory(images, torch.from_numpy(np.repeat(labels, prints)).long())


def print_scans(strokes: NDArray[np.float64], random: np.random.Generator) -> Tensor:
    """Print scans in colour.

    Args:
        strokes: `[N, 8, 8]`, 0 is paper and 1 is full ink.
        random: source of the colours, shifts, light and noise; each scan gets its own.

    Returns:
        uint8 `[N, 3, 16, 16]`.
    """
    n = len(strokes)
    enlarged = F.interpolate(torch.from_numpy(strokes)[:, None], size=(DIGIT, DIGIT), mode="bilinear").numpy()[:, 0]
    shifts = random.integers(-SHIFT, SHIFT + 1, (n, 2))
    cover = np.zeros((n, 1, SIDE, SIDE))
    corner = (SIDE - DIGIT) // 2
    for image, digit, (down, right) in zip(cover, enlarged, shifts, strict=True):
        top, left = corner + down, corner + right
        image[0, top : top + DIGIT, left : left + DIGIT] = digit

    paper = random.uniform(0.2, 1.0, (n, 3, 1, 1))
    ink = paper * (1 - 0.5 * random.uniform(0.5, 1.0, (n, 3, 1, 1)))
    angle = random.uniform(0, 2 * np.pi, (n, 1, 1, 1))
    strength = random.uniform(-0.5, 0.5, (n, 1, 1, 1))
    across = np.linspace(-1, 1, SIDE)
    light = 1 + strength * (np.cos(angle) * across + np.sin(angle) * across[:, None])
    noise = 0.02 * random.standard_normal((n, 3, SIDE, SIDE))
    pixels = (paper * (1 - cover) + ink * cover) * light + noise
    return torch.from_numpy(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))

"""Randomness that is keyed, not consumed: every draw is a function of (seed, purpose, step).

So the position in a run is one integer, and resuming, the number of workers and what observers do change nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, device


def key(seed: int, purpose: str, step: int = 0) -> int:
    """63 well-mixed bits for (seed, purpose, step), the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, purpose: str, step: int = 0) -> Generator:
    """A CPU generator keyed by (seed, purpose, step)."""
    import torch

    return torch.Generator().manual_seed(key(seed, purpose, step))


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Torch's default generator keyed inside the block and left as it was after it."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, purpose))
        yield


@contextmanager
def undisturbed(where: device) -> Iterator[None]:
    """Torch's default generators and the flags that a run sets as they were, after the block; gradients on inside it.

    So a run neither shows in what its process draws afterwards, nor depends on what it set before.
    """
    import torch

    # Seeding seeds every CUDA device. On a CPU run none may be asked: that would start CUDA.
    devices = list(range(torch.cuda.device_count())) if where.type == "cuda" else []
    allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = allow_tf32

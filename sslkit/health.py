"""Numbers that tell a healthy representation from a collapsed one, without labels.

All take Z, float `[N, d]`, one row per image, and return Python floats computed in float32 or better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def std_sqrt_d(z: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of z/||z||, times sqrt(d); a 0-dim tensor.

    1 is spread evenly over the sphere, 0 is complete collapse; it misses dimensional collapse
    (Chen & He 2021, section 4.1, who plot it without the factor).
    """
    unit = F.normalize(z.float(), dim=1)
    return unit.std(dim=0, correction=0).mean() * math.sqrt(z.shape[1])


def effective_rank(z: Tensor, *, centred: bool = True) -> float:
    """exp of the entropy of the singular values (Roy & Vetterli 2007); uncentred it is RankMe (Garrido et al. 2023).

    Between 1 and min(N, d). Use N >= 4d. Compare runs of one method only.
    """
    z = z.double()
    if centred:
        z = z - z.mean(dim=0)
    # The covariance in float64 is far smaller than Z and its square roots are Z's singular values.
    spectrum = torch.linalg.eigvalsh(z.T @ z if z.shape[0] >= z.shape[1] else z @ z.T)
    sigma = spectrum.clamp_min(0).sqrt()
    p = sigma / sigma.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def cosine_between(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine of corresponding rows; a 0-dim tensor."""
    return F.cosine_similarity(a.float(), b.float(), dim=1).mean()


def target_drift(online: nn.Module, target: nn.Module) -> tuple[Tensor, Tensor]:
    """`(||online - target|| / ||online||, ||target|| / ||online||)` over all parameters; 0-dim tensors."""
    o = [p.detach() for p in online.parameters()]
    t = [p.detach() for p in target.parameters()]
    size = _norm(o)
    return _norm(torch._foreach_sub(o, t)) / size, _norm(t) / size


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    norms = torch._foreach_norm(list(tensors))
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(norms)))

"""One of two processes that train the small recipe together: `python -m sslkit.testing.two_processes FOLDER RANK`."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslkit.batch import Branches, LossTerms
from sslkit.build import Parts

STEPS = 2
PROCESSES = 2


class _Method(nn.Module):
    """Branches and loss as one module, so that one wrapper sees every parameter that is trained."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.model, self.loss = parts.model, parts.loss

    def forward(self, views: Sequence[Tensor], indices: Tensor, labels: Tensor | None) -> tuple[LossTerms, Branches]:
        branches = self.model(views)
        branches.indices, branches.labels = indices, labels
        terms: LossTerms = self.loss(branches)
        return terms, branches


def main(folder: Path, rank: int) -> None:
    """Take two steps, and write a checksum of every parameter."""
    path, component, run = pickle.loads((folder / "component").read_bytes())
    sys.path[:] = path
    from sslkit.testing.bench import Bench
    from sslkit.testing.engine import small_parts

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    parts = small_parts(Bench(component, run))
    method = DistributedDataParallel(_Method(parts), broadcast_buffers=False)
    modules = [*parts.model.modules(), *parts.loss.modules(), *parts.updater.modules()]
    _train(parts, method, modules, rank)
    sums = {
        name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for name, p in _Method(parts).named_parameters()
    }
    (folder / f"sums-{rank}.json").write_text(json.dumps(sums))
    dist.destroy_process_group()


def _train(parts: Parts, method: nn.Module, modules: list[nn.Module], rank: int) -> None:
    from sslkit.data import Feed

    def call(hook: str, step: int) -> None:
        for module in modules:
            if hasattr(module, hook):
                getattr(module, hook)(step)

    feed = Feed(parts.data.train, parts.views, parts.run, parts.device)
    for step in range(STEPS):
        torch.manual_seed(step)
        for group, values in zip(parts.optimizer.param_groups, parts.values, strict=True):
            group["lr"], group["weight_decay"] = values.lr(step), values.weight_decay(step)
        parts.optimizer.zero_grad(set_to_none=True)
        call("before_step", step)
        share = list(feed.draw(step).micro(PROCESSES))[rank]
        views = parts.views.appear(parts.views.crop(share.batch.images, share.parameters), share.parameters)
        terms, branches = method(views, share.batch.indices, share.batch.labels)
        terms.total.backward()
        call("after_backward", step)
        parts.optimizer.step()
        tau = parts.target.tau(step)
        if parts.model.target is not None and tau is not None:
            parts.target.update(parts.model.online, parts.model.target, tau)
        if hasattr(parts.loss, "commit"):
            with torch.no_grad():
                parts.loss_module.commit(branches.detached())
        call("after_step", step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

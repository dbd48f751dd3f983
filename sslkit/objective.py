"""What is minimised: views go through the branches, and the branches into the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from sslkit import randomness, registry
from sslkit.api import LossModule
from sslkit.batch import Batch, Branches, LossTerms
from sslkit.distributed import World
from sslkit.errors import RunFailed
from sslkit.recipe import Recipe
from sslkit.siamese import Siamese


class Objective(nn.Module):
    """Branches and loss as one module, so that one wrapper sees every parameter that is trained."""

    def __init__(self, model: Siamese, loss: nn.Module, recipe: Recipe, world: World) -> None:
        super().__init__()
        self.model, self.loss, self.recipe, self.world = model, loss, recipe, world
        self.shares_suffice = cast(LossModule, loss).additive
        """Whether the mean of the losses of shares is the loss of the batch."""

    def forward(
        self, views: Sequence[Tensor], batch: Batch, step: int, number: int
    ) -> tuple[Branches, Branches, LossTerms]:
        """The branches of micro-batch `number` of this process's share, those that the loss saw, and the loss."""
        if number:  # the loss before has begun the generator anew
            torch.manual_seed(randomness.key(self.recipe.seed, f"micro/{self.world.rank}/{number}", step))
        bf16 = self.recipe.train.precision == "bf16"
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=bf16):
            branches: Branches = self.model(views)  # backbone, projector, predictor; target without gradient
        branches.indices, branches.labels = batch.indices, batch.labels
        seen = branches if self.shares_suffice else self.world.whole(branches)
        # What a loss draws is the same in every process, whatever the networks drew there.
        torch.manual_seed(randomness.key(self.recipe.seed, "loss", step))
        return branches, seen, self._checked(self.loss(seen))

    def _checked(self, terms: object) -> LossTerms:
        if isinstance(terms, LossTerms):
            return terms
        loss = type(self.recipe.loss)
        raise RunFailed(
            f"loss {registry.short_name(loss)!r} from {registry.provider_of(loss).origin} should return "
            f"sslkit.api.LossTerms, not {type(terms).__name__}: LossTerms(total, {{name: value}})"
        )


def check_gradients(model: nn.Module, loss: nn.Module) -> Literal[False]:
    """Tell, after the first backward pass, what DistributedDataParallel would wait for in vain at the second.

    Returns:
        False: it need not be asked again.

    Raises:
        RunFailed: a trained parameter has no gradient.
    """
    names = [*model.named_parameters(), *((f"loss.{name}", p) for name, p in loss.named_parameters())]
    lacking = [name for name, p in names if p.requires_grad and p.grad is None]
    if lacking:
        raise RunFailed(
            f"with several processes every trained parameter needs a gradient in each step, and {len(lacking)} "
            f"have none: {', '.join(lacking[:5])}; give it requires_grad = False, or leave it out of the network"
        )
    return False

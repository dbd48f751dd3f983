"""The processes that train one run together, seen from one of them. torchrun starts them, torch.distributed connects
them; with one process nothing here does anything.

The rows of a batch lie in the order of the processes: process r of W has rows r*B/W .. (r+1)*B/W - 1 of the global
batch. A loss that compares images with one another is given the whole batch in every process, so that it is the loss of
one process with that batch, whoever wrote it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslkit import launcher
from sslkit.batch import Branches
from sslkit.errors import RunFailed, SslkitError, UserError

T = TypeVar("T")

_DDP_OPTIONS = signature(DistributedDataParallel.__init__).parameters

TIMEOUT = "SSLKIT_PROCESS_TIMEOUT"
"""Environment variable: seconds after which a process that does not answer is given up; 1800 without it. The first
process measures alone while the others wait, which for a large bank takes minutes."""
FAILED = 1000
"""The word of a process that ends with an error of its own."""


class EndedElsewhere(RunFailed):
    """Another process has said already why the run ends."""


class PeerLost(RunFailed):
    """Another process has died or does not answer."""


@dataclass(frozen=True)
class World:
    """`size` processes, of which this is number `rank`, number `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: Any = None
    """The group that words are exchanged in. On the host, so that nothing waits for a GPU, and apart from the group of
    the gradients, so that a process that fails amid a step cannot mix the two up."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that observes, prints and writes."""
        return self.rank == 0

    # ------------------------------------------------------------ outside of the steps

    def first(self, work: Callable[[], T]) -> T:
        """What the first process's `work` returns, in every process.

        Raises:
            SslkitError: as it raises there; `EndedElsewhere` in the others.
        """
        return cast(T, self.together(work if self.is_first else lambda: None, all_of_them=True)[0])

    def together(self, work: Callable[[], T], *, all_of_them: bool = False) -> Any:
        """`work` in every process; its result once all of them have succeeded, or the results of all, by rank.

        Raises:
            SslkitError: as it raises in the first of the processes where it does; `EndedElsewhere` in the others.
        """
        error: BaseException | None = None
        found: T | None = None
        try:
            found = work()
        except Exception as raised:  # told to the others before it goes on its way
            if self.size == 1:
                raise
            error = raised
        if self.size == 1:
            return [found] if all_of_them else found
        told: list[Any] = [None] * self.size
        with listening(self):
            dist.all_gather_object(
                told, (error is not None, found if all_of_them and error is None else None), group=self.control
            )
        failed = [rank for rank, (has, _) in enumerate(told) if has]
        if error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise EndedElsewhere
        return [value for _, value in told] if all_of_them else found

    def words(self, word: int, weights: float = 0.0, moved: float = 0.0) -> int:
        """The largest of the numbers that the processes say: 0 to go on.

        Args:
            word: This process's.
            weights: A digest of what is the same in every process to the last bit.
            moved: A digest of what every process computes by itself from the same, and may round otherwise.

        Raises:
            RunFailed: the digests differ.
        """
        if self.size == 1:
            return word
        said = [torch.zeros(3, dtype=torch.float64) for _ in range(self.size)]
        with listening(self):
            dist.all_gather(said, torch.tensor([word, weights, moved], dtype=torch.float64), group=self.control)
        loudest = int(max(float(s[0]) for s in said))
        alike = all(bool(s[1] == said[0][1]) and math.isclose(s[2], said[0][2], rel_tol=1e-4) for s in said)
        if loudest < FAILED and not alike:
            figures = "; ".join(f"{s[1]:.17g}, {s[2]:.6g}" for s in said)
            raise RunFailed(
                f"the processes' weights have come to differ ({figures}): some part does not treat the processes "
                "alike, such as a loss that keeps something of its own share; the last checkpoint is that of the first"
            )
        return loudest

    # ------------------------------------------------------------ in a step

    def share(self, rows: Tensor) -> Tensor:
        """This process's rows of a global batch."""
        return rows if self.size == 1 else rows.chunk(self.size)[self.rank]

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, with its gradients averaged over the processes."""
        if self.size == 1:
            return module
        # The engine keeps buffers equal itself; torch 2.15 has another name for the option.
        name = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"
        options: dict[str, Any] = {name: False}
        return DistributedDataParallel(module, **options)

    def kept_apart(self, module: nn.Module, apart: bool) -> AbstractContextManager[object]:
        """Inside it gradients add up in this process alone, for all micro-batches of a step but the last."""
        return module.no_sync() if apart and isinstance(module, DistributedDataParallel) else nullcontext()

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over the processes in the place of each tensor; one message for all."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1).to(torch.promote_types(t.dtype, torch.float32)) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def whole(self, branches: Branches) -> Branches:
        """The branches of the global batch from those of the shares.

        Their gradient is right for a loss that every process computes of them alike, and whose gradients are then
        averaged over the processes.
        """
        if self.size == 1:
            return branches
        names = ("embeddings", "projections", "predictions", "targets")
        columns = [t for name in names for t in getattr(branches, name) if t is not None]
        rows = _Gathered.apply(torch.cat(columns, dim=1), self.rank, self.size)
        parts = iter(rows.split([t.shape[1] for t in columns], dim=1))
        found: dict[str, Any] = {
            name: [None if t is None else next(parts) for t in getattr(branches, name)] for name in names
        }
        numbers = [t for t in (branches.indices, branches.labels) if t is not None]
        places = iter(_gathered(torch.stack(numbers, dim=1), self.size).unbind(1)) if numbers else iter(())
        return replace(
            branches,
            **found,
            indices=None if branches.indices is None else next(places),
            labels=None if branches.labels is None else next(places),
            views=[],
        )


class _Gathered(torch.autograd.Function):
    """`[b, d]` -> `[W*b, d]`. Backwards every process has the whole gradient already, and takes its own rows of it:
    nothing is sent. Times W, since the gradients of the weights are averaged later."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        return _gathered(rows, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.chunk(ctx.size)[ctx.rank] * ctx.size, None, None


def _gathered(rows: Tensor, size: int) -> Tensor:
    found = rows.new_empty(size * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(found, rows.detach().contiguous())
    return found


# ---------------------------------------------------------------- joining


def restarted() -> bool:
    """Whether torchrun has started this process in the place of one that died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def started_by_torchrun() -> bool:
    """Whether torchrun started this process as one of several.

    Raises:
        UserError: part of what torchrun says is missing.
    """
    lacking = [name for name in _TORCHRUN if name not in os.environ]
    if os.environ.get("WORLD_SIZE", "1") == "1" or len(lacking) >= len(_TORCHRUN) - 1:
        return False
    if lacking:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {', '.join(lacking)} not set: start several processes with "
            "torchrun or --nproc, or unset WORLD_SIZE to train in one"
        )
    return True


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that torchrun started, for as long as the block runs, and the device that is this one's.

    Raises:
        UserError: there are more processes than GPUs.
        PeerLost: the others do not come.
    """
    if not started_by_torchrun():
        yield World(), device
        return
    world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if device.type == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise _refusal(
                f"{os.environ.get('LOCAL_WORLD_SIZE', world.size)} processes were started here, and there are "
                f"{torch.cuda.device_count()} GPUs; start one process for each"
            )
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    try:
        timeout = timedelta(seconds=float(os.environ.get(TIMEOUT, "1800")))
    except (ValueError, OverflowError):
        raise _refusal(f"{TIMEOUT}={os.environ[TIMEOUT]}: should be a number of seconds, such as 1800") from None
    theirs = dist.is_initialized()  # a script that set up more than this run
    try:
        with listening(world):
            if not theirs:
                dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=timeout)
            world = replace(world, control=dist.new_group(backend="gloo", timeout=timeout))
        yield world, device
    finally:
        if dist.is_initialized() and not theirs:
            dist.destroy_process_group()


def _refusal(line: str) -> SslkitError:
    """A mistake that every process meets before they can speak: said by one, and not by those that come after."""
    return UserError(line) if launcher.leave_error(UserError.exit_code) else EndedElsewhere()


@contextmanager
def listening(world: World) -> Iterator[None]:
    """Tell a process that is gone from everything else that goes wrong.

    Raises:
        PeerLost: in place of what torch raises.
    """
    try:
        yield
    except SslkitError:
        raise
    except RuntimeError as error:
        if world.size == 1 or not _is_of_peer(error):
            raise
        raise PeerLost(
            f"process {world.rank} of {world.size}: another process has ended or does not answer "
            f"({str(error).strip().partition(chr(10))[0][:200]})"
        ) from error


_OF_TORCH = re.compile(r"gloo/transport/|Gloo connect|ProcessGroup|NCCL error|Connection closed by peer")


def _is_of_peer(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or _OF_TORCH.search(str(error)) is not None


def tells(error: SslkitError, world: World) -> bool:
    """Whether this is the process that prints an error which several may have met: the first to ask."""
    if world.size == 1:
        return True
    if isinstance(error, EndedElsewhere):
        return False
    try:
        store = dist.distributed_c10d._get_default_store()
        return int(store.add(f"sslkit/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1)) == 1
    except (RuntimeError, ValueError):  # the store is gone, too
        return True

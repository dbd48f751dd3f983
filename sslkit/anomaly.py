"""What every module of a step is given and gives, and where its numbers first stop being finite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslkit.batch import LossTerms

# ---------------------------------------------------------------- what is recorded


@dataclass(frozen=True)
class Measure:
    """What is in the floating-point tensors that a module is given, or gives."""

    dtype: str | None = None
    """Of the first of them; None where there is none."""
    largest: float = 0.0
    """The largest magnitude of the finite values."""
    nan: int = 0
    """How many values are NaN."""
    inf: int = 0
    """How many are infinite."""
    of: int = 0
    """How many there are."""

    @property
    def finite(self) -> bool:
        """Whether every value is."""
        return not self.nan and not self.inf

    def __str__(self) -> str:
        wrong = [f"{count} {name}" for count, name in ((self.nan, "NaN"), (self.inf, "inf")) if count]
        return f"{' and '.join(wrong)} of {self.of} values" if wrong else f"finite, up to {self.largest:.3g}"


@dataclass
class Call:
    """One call of a module."""

    module: str
    """Its dotted name, as in the checkpoint."""
    kind: str
    """Its class."""
    given: Measure
    """What it was called with."""
    gave: Measure | None = None
    """What came out; None if it raised."""

    @property
    def dtype(self) -> str | None:
        """What it computed in, as its output says."""
        return self.gave.dtype if self.gave else self.given.dtype


@dataclass(frozen=True)
class Operation:
    """An operation of the backward pass that was given finite gradients and gave others."""

    name: str
    """As torch calls it: `SqrtBackward0`."""
    module: str
    """The module in whose forward pass the operation was."""
    kind: str
    """That module's class."""
    dtype: str | None
    """What it computed in."""
    gradient: str
    """What came out, in words."""


@dataclass
class Record:
    """What hooks saw of a step."""

    weights: list[str] = field(default_factory=list)
    """Parameters, and buffers if asked for, that were not finite before it."""
    calls: list[Call] = field(default_factory=list)
    """Every call, in the order in which calls began."""
    culprit: Call | None = None
    """The call in whose own code a value was first not finite."""
    before: Call | None = None
    """The call that such a value was then passed to, if it was seen as an input and not as an output."""
    rows: dict[int, list[int]] = field(default_factory=dict)
    """By view, the rows of the batch in which it was not finite."""
    operation: Operation | None = None
    gradients: dict[str, Measure] = field(default_factory=dict)
    """Each parameter's gradient, as the backward pass left it."""


# ---------------------------------------------------------------- watching a step


@contextlib.contextmanager
def watching(model: nn.Module, loss: nn.Module, *, buffers: bool = False) -> Iterator[Record]:
    """Record what the modules compute inside the block; it changes no number, and waits for the device.

    Args:
        model: The networks.
        loss: The loss.
        buffers: Look at the buffers, too, before it begins.
    """
    names = {module: f"loss.{name}".rstrip(".") for name, module in loss.named_modules()}
    names |= {module: name or "model" for name, module in model.named_modules()}
    parameters = {p: f"loss.{name}" for name, p in loss.named_parameters()}
    parameters |= {p: name for name, p in model.named_parameters()}
    state: list[tuple[str, Tensor]] = [(name, p) for p, name in parameters.items()]
    if buffers:
        state += [*model.named_buffers(), *((f"loss.{name}", b) for name, b in loss.named_buffers())]
    record = Record([name for name, value in state if not measured([value]).finite])
    watcher = _Watcher(record, model, names)
    handles = [
        handle
        for module in names
        for handle in (
            module.register_forward_pre_hook(watcher.began, with_kwargs=True),
            module.register_forward_hook(watcher.ended, with_kwargs=True),
        )
    ]
    handles += [
        p.register_post_accumulate_grad_hook(lambda p, name=name: record.gradients.update({name: measured([p.grad])}))
        for p, name in parameters.items()
        if p.requires_grad
    ]
    try:
        yield record
    finally:
        for handle in [*handles, *watcher.handles]:
            handle.remove()


class _Watcher:
    def __init__(self, record: Record, model: nn.Module, names: Mapping[nn.Module, str]) -> None:
        self.record, self.model, self.names = record, model, names
        self.handles: list[Any] = []
        self.open: list[Call] = []
        """The calls that have not ended, each inside the one before it."""
        self.outside: list[set[Any]] = []
        """For each of them, the nodes of the graph that its inputs come from."""
        self.owned: dict[Any, Call] = {}
        """The call that made a node of the graph; holding the nodes keeps them the same objects."""
        self.seen = 0
        """Images that the networks were given so far."""

    def began(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = list(_tensors((args, kwargs)))
        call = Call(self.names[module], type(module).__name__, measured(given))
        if not call.given.finite and self.record.culprit is None:
            self.record.culprit = self.open[-1] if self.open else call
            self.record.before = call
        if module is self.model:
            self._views(args[0])
        self.record.calls.append(call)
        self.open.append(call)
        self.outside.append({t.grad_fn for t in given if t.grad_fn is not None})

    def _views(self, views: list[Tensor]) -> None:
        for number, view in enumerate(views):
            wrong = (~view.detach().flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
            if wrong:
                self.record.rows.setdefault(number, []).extend(self.seen + row for row in wrong)
        self.seen += len(views[0])

    def ended(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call, outside = self.open.pop(), self.outside.pop()
        gave = list(_tensors(output))
        call.gave = measured(gave)
        if not call.gave.finite and self.record.culprit is None:
            self.record.culprit = call
        self._own(call, gave, outside)

    def _own(self, call: Call, outputs: Iterable[Tensor], outside: set[Any]) -> None:
        """Hook the operations between a call's outputs and its inputs that no call inside it has made."""
        waiting, met = [t.grad_fn for t in outputs if t.grad_fn is not None], set(outside)
        while waiting:
            node = waiting.pop()
            if node in met:
                continue
            met.add(node)
            waiting += [following for following, _ in node.next_functions if following is not None]
            if node not in self.owned:
                self.owned[node] = call
                self.handles.append(node.register_hook(self._backward(node, call)))

    def _backward(self, node: Any, call: Call) -> Callable[[Any, Any], None]:
        def ran(gave: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> None:
            if self.record.operation is None and measured(given).finite:
                found = measured(gave)
                if not found.finite:
                    self.record.operation = Operation(node.name(), call.module, call.kind, found.dtype, str(found))

        return ran


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module is given or gives; of a loss's result only what is minimised."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.layout == torch.strided and value.numel():
            yield value
    elif isinstance(value, LossTerms):
        yield from _tensors(value.total)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@torch.no_grad()
def measured(values: Iterable[Tensor | None]) -> Measure:
    """What is in some tensors; what is no floating-point number is left out."""
    found = [t.detach() for value in values for t in _tensors(value)]
    if not found:
        return Measure()
    read = torch.stack(
        [torch.stack([n.double() for n in (t.isnan().sum(), t.isinf().sum(), t.nan_to_num(0, 0, 0).abs().max())])
         for t in found]
    ).cpu()  # fmt: skip
    return Measure(
        str(found[0].dtype).removeprefix("torch."), float(read[:, 2].max()), int(read[:, 0].sum()),
        int(read[:, 1].sum()), sum(t.numel() for t in found),
    )  # fmt: skip

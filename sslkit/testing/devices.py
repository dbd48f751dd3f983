"""Checks of what a compiler, a GPU or a second process would meet."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sslkit import local
from sslkit.batch import Branches
from sslkit.testing.bench import Bench, default_random_state, pictures, terms_of
from sslkit.testing.core import check
from sslkit.testing.engine import folder
from sslkit.testing.networks import batch
from sslkit.testing.outcome import Nonconforming, NotApplicable, described, require
from sslkit.testing.processes import WAIT, state_of, train_together
from sslkit.testing.targets import online_network
from sslkit.testing.views import drawn, made

IN_A_STEP = ("backbone", "head", "loss", "view_generator", "target_updater", "optimizer")
GPU = "cuda:0"


def _trial(bench: Bench) -> tuple[Any, tuple[Any, ...]]:
    """What the engine calls in every step, and with what."""
    if bench.kind == "view_generator":
        maker = bench.built()
        return lambda images, parameters: made(maker, images, parameters), (pictures(8, bench.run), drawn(maker))
    module = bench.module().train()
    if bench.kind == "loss":
        return module, (bench.branches(bench.needs(module)),)
    return module, (batch(bench),)


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, list | tuple):
        return list(out)
    terms = terms_of(out)
    return [terms.total, *terms.terms.values()]


# ---------------------------------------------------------------- a GPU that is not there


def _on_gpu(bench: Bench) -> tuple[str, str]:
    """How a step would go on a GPU, found out on tensors that have a device and a shape and no values.

    Returns:
        `("", "")`, or whether it `waits` or mixes `devices`, and where.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    calls = _calls(bench)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, default_random_state(0):
            for function, arguments in calls:
                if isinstance(function, nn.Module):
                    _moved(function, mode)
                out = function(*_moved(arguments, mode))
                for tensor in [] if out is None else _tensors(out):
                    if tensor.device != torch.device(GPU):
                        return "devices", f"what it returns is on {tensor.device}, and what it was given on {GPU}"
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        return "waits", described(error)
    except Exception as error:  # torch has no class of its own for these
        text = described(error)
        if "NVIDIA driver" in str(error) or "not compiled with CUDA" in str(error):
            raise NotApplicable(f"torch cannot tell without a GPU, which it asks for: {text}") from None
        if "numpy" in str(error):
            return "waits", text
        if "device" in str(error):
            return "devices", text
        raise
    return "", ""


@check("nothing in a step asks the device for a value", *IN_A_STEP)
def never_waits(bench: Bench) -> None:
    """A GPU stands still while the host reads from it, and such a step cannot be compiled in one piece."""
    found, where = _on_gpu(bench)
    require(
        found != "waits",
        f"on a GPU the host would have to wait for the device: {where}. Leave out .item(), float(), bool() and int() "
        "of tensors, `if` on their values, and shapes that depend on them (x[mask], nonzero, numpy); use torch.where "
        "and masks",
    )


@check("it works on whatever device its tensors are on", *IN_A_STEP)
def any_device(bench: Bench) -> None:
    """Tried on a GPU that need not be there."""
    found, where = _on_gpu(bench)
    require(
        found != "devices",
        f"on a GPU tensors of two devices would meet: {where}. Hold tensors as buffers (register_buffer) or "
        "parameters, which move with the module, and give device=x.device wherever a tensor is made",
    )


def _calls(bench: Bench) -> list[tuple[Any, tuple[Any, ...]]]:
    if bench.kind == "target_updater":
        updater: Any = bench.module()
        online = online_network()
        target = updater.make(online)
        if target is None:
            raise NotApplicable("the updater makes no second network")
        return [(updater.update, (online, target, torch.tensor(0.5, dtype=torch.float64)))]
    if bench.kind == "optimizer":
        return [(_optimizer_steps(bench), (torch.ones(4, 3), torch.ones(3)))]
    function, arguments = _trial(bench)
    calls = [(function, arguments)]
    if bench.kind == "loss" and hasattr(function, "commit"):
        calls.append((torch.no_grad()(function.commit), (arguments[0].detached(),)))
    return calls


def _optimizer_steps(bench: Bench) -> Callable[..., list[Tensor]]:
    """Two steps, as the engine takes them, on parameters that hold the tensors given."""

    def steps(*tensors: Tensor) -> list[Tensor]:
        parameters = [nn.Parameter(tensor) for tensor in tensors]
        optimizer: Any = bench.optimizer(parameters)
        for _ in range(2):
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = 0.05, 0.01
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer.grad_scale, optimizer.found_inf = None, torch.zeros((), device=parameters[0].device)
            optimizer.step()
        return list(parameters)

    return steps


def _moved(value: Any, mode: Any) -> Any:
    """The same on the GPU that is not there; modules in place."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value.detach()).to(GPU).requires_grad_(value.requires_grad)
    if isinstance(value, nn.Module):
        for module in value.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    fake = mode.from_tensor(parameter.detach()).to(GPU)
                    module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            for name, buffer in list(module._buffers.items()):
                module._buffers[name] = None if buffer is None else mode.from_tensor(buffer).to(GPU)
        return value
    if isinstance(value, Branches):
        return Branches(value.specs, *(_moved(getattr(value, n), mode) for n in list(value.__dataclass_fields__)[1:]))
    if isinstance(value, dict):
        return {key: _moved(inner, mode) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(inner, mode) for inner in value)
    return value


# ---------------------------------------------------------------- a compiler, and a second process


@check("torch.compile gives the same numbers as without", "backbone", "head", "loss", "view_generator", slow=True)
def compiles(bench: Bench) -> None:
    """By the backend `aot_eager`, which traces and differentiates as the default one does but needs no C compiler."""
    function, arguments = _trial(bench)
    again, _ = _trial(bench)
    torch._dynamo.reset()
    try:
        with default_random_state(0):
            expected = _tensors(function(*arguments))
        with default_random_state(0):
            found = _tensors(torch.compile(again, backend="aot_eager", dynamic=False)(*arguments))
    except Nonconforming:
        raise
    except Exception as error:  # the compiler raises many kinds
        raise Nonconforming(
            f"torch.compile fails: {described(error)}; `train.compile` would end the run. Keep to torch operations in "
            "what a step calls, with static shapes"
        ) from error
    finally:
        torch._dynamo.reset()
    for ours, theirs in zip(expected, found, strict=True):
        require(
            torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4),
            "compiled, it gives other numbers; do not let "
            "what is computed depend on Python state that changes between calls",
        )


@check(
    "two processes that train together keep the same weights and do not wait for each other for ever",
    "backbone",
    "head",
    "loss",
    "target_updater",
    slow=True,
)
def two_processes(bench: Bench) -> None:
    """DistributedDataParallel over gloo, on two steps of the small recipe with half of each batch in each process."""
    if local.source_of(bench.cls):
        raise NotApplicable("a class of a local file cannot be found by another process")
    with folder() as path:
        try:
            ended = train_together([bench.component], bench.run, 2, path)
        except subprocess.TimeoutExpired:
            raise Nonconforming(
                f"two processes did not finish two steps in {WAIT} s: one waits for the other. Every process has to "
                "make the same collective calls, and every trained parameter needs a gradient in every process"
            ) from None
        for rank, (said, code) in enumerate(ended):
            lines = [line for line in said.splitlines() if line.strip()]
            require(code != 3, "the small recipe: " + (lines[-1] if lines else ""))
            require(
                code == 0,
                f"process {rank} of two failed: {lines[-1] if lines else f'exit code {code}'}. Every trained parameter "
                "needs a gradient in every step, and modules must not change their parameters while they train",
            )
        states = [state_of(path, 0, rank) for rank in range(2)]
    differs = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    require(
        not differs,
        f"after two steps the processes have different weights or state ({differs[:1]}); nothing that moves them may "
        "depend on the process: its id, its rank, the time, unseeded randomness",
    )

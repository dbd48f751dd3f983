"""Weights from a safetensors file, or from timm, to begin a run with."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sslkit import local, randomness
from sslkit.api import Backbone, RunInfo
from sslkit.errors import UserError
from sslkit.opened_run import digest_of
from sslkit.recipe import Recipe
from sslkit.starting_point import PICKLES, SEEN_FROM, SUFFIX, InitFrom, Part

CHUNK = 2**20

CONVERT = (
    "import sys, torch, safetensors.torch as s; "
    "d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); d = d.get('state_dict', d.get('model', d)); "
    "s.save_file({k: v.clone().contiguous() for k, v in d.items()}, sys.argv[2])"
)
"""For `python -c`, between double quotes: what torch.save wrote, alone or in a training's checkpoint, as safetensors,
which takes no two names for one memory."""


@dataclass
class Import:
    """A backbone's weights that no run of sslkit gave."""

    given: InitFrom
    """As the recipe says it, with an absolute path and the weights' digest, once they are there."""
    weights: dict[str, Tensor] | None
    """Those of a file; timm's are asked for when the backbone is there."""
    left: tuple[str, ...] = ()
    """Tensors of the file that were left out."""
    taken: list[Part] = field(default_factory=list)

    def take(
        self, modules: Mapping[Part, nn.Module | None], spec: Backbone | None = None, run: RunInfo | None = None
    ) -> None:
        """Give the backbone its weights; other parts begin as drawn, and a target as a copy of the online network.

        Raises:
            UserError: they cannot be had, are not what they were, or do not fit.
        """
        backbone = modules.get("backbone")
        if backbone is None:
            return
        if self.weights is None:
            assert spec is not None
            assert run is not None
            assert self.given.timm is not None
            with randomness.seeded(run.seed, "backbone"):  # what timm has no weights for is drawn
                found = spec.pretrained_weights(self.given.timm, run)
            self.weights = dict(found.weights)
            digest = digest_of(found.original)
            if self.given.weights not in (None, digest):
                raise UserError(
                    f"init_from.weights: names other weights than timm's {self.given.timm} are now; leave "
                    "init_from.weights out of the recipe to begin with these"
                )
            self.given = self.given.model_copy(update={"weights": digest})
        problem = misfit(backbone, self.weights)
        if not problem:
            try:
                backbone.load_state_dict(self.weights)
            except Exception as error:  # whatever a stranger's load_state_dict raises
                problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if problem:
            way = "build the backbone that they are of"
            if self.given.file is not None:
                way += ", or name what is to be taken off and left out (init_from.prefix, init_from.ignore)"
            raise UserError(f"init_from: {self.given.words} does not fit the backbone: {problem}; {way}")
        if wrong := not_finite(self.weights):
            raise UserError(
                f"init_from: {self.given.words}: {wrong} has values that are not finite, as the weights of a run that "
                "diverged have; begin with others"
            )
        self.taken.append("backbone")
        self.weights = {}

    def told(self) -> list[str]:
        """What was taken and what was not, as lines for the user."""
        lines = [f"initialised from {self.given.words}: backbone; heads and loss begin as drawn"]
        if self.left:
            more = f" and {len(self.left) - 3} more" if len(self.left) > 3 else ""
            lines.append(f"not taken from {self.given.words}: {', '.join(self.left[:3])}{more}")
        return lines

    def settled(self, recipe: Recipe) -> Recipe:
        """The recipe with the weights that were taken."""
        return recipe.model_copy(update={"init_from": self.given})

    def facts(self) -> dict[str, Any]:
        """What `env.json` and every checkpoint record."""
        place = {"timm": self.given.timm_name} if self.given.file is None else {"file": self.given.words}
        return {
            **place, "weights": self.given.weights, "taken": list(self.taken), "tensors_left": len(self.left),
            "fork": False,
        }  # fmt: skip


def misfit(module: nn.Module, weights: Mapping[str, Any]) -> str:
    """The first thing in which weights do not fit a module, and how many more; empty where they do."""
    here = module.state_dict()
    problems = [f"{name} is missing there" for name in here if name not in weights]
    problems += [f"{name} is unknown here" for name in weights if name not in here]
    problems += [
        f"{name} is {list(weights[name].shape)} there and {list(value.shape)} here"
        for name, value in here.items()
        if isinstance(value, Tensor) and isinstance(weights.get(name), Tensor) and value.shape != weights[name].shape
    ]
    problems += [
        f"{name} is {_type(weights[name])} there and {_type(value)} here"
        for name, value in here.items()
        if isinstance(value, Tensor) and isinstance(weights.get(name), Tensor)
        if value.is_floating_point() and not weights[name].is_floating_point()
    ]
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "") if problems else ""


def not_finite(weights: Mapping[str, Tensor]) -> str:
    """The name of the first tensor with NaN or an infinity in it; empty where there is none."""
    floating = (name for name, value in weights.items() if value.is_floating_point())
    return next((name for name in floating if not weights[name].float().isfinite().all()), "")


def _type(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def imported(given: InitFrom) -> Import:
    """The weights of a file, read; or timm's name, to be asked for them.

    Raises:
        UserError: there is no such file, it is none of safetensors, or it is not what it was.
    """
    if given.file is None:
        return Import(given, None)
    path = Path(given.file)
    digest = file_digest(path)
    if given.weights not in (None, digest):
        raise UserError(
            f"init_from.weights: names other weights than {local.near(path)} has now; leave init_from.weights out of "
            "the recipe to begin with these"
        )
    weights, left = _read(path, given.prefix or "", given.ignore or ())
    return Import(given.model_copy(update={"weights": digest}), weights, left)


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    where = f"init_from.file: {local.near(path)}"
    if path.suffix in PICKLES:
        files = (shlex.quote(local.near(file)) for file in (path, path.with_suffix(SUFFIX)))
        raise UserError(
            f"{where}: is a file of torch.save, which may run code when it is opened; where you trust it, convert it: "
            f'python -c "{CONVERT}" {" ".join(files)}'
        )
    if not path.is_file():
        if path.exists():
            raise UserError(f"{where}: is a folder or a device; give a {SUFFIX} file")
        raise UserError(f"{where}: is not there; give a {SUFFIX} file; {SEEN_FROM}")
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(CHUNK):
                found.update(part)
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    return found.hexdigest()


def _read(path: Path, prefix: str, ignore: tuple[str, ...]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors whose names begin with the prefix and match nothing that is ignored, and the names of the others."""
    weights: dict[str, Tensor] = {}
    left: list[str] = []
    unused = set(ignore)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for name in names:
                inner = name.removeprefix(prefix)
                matching = [pattern for pattern in ignore if fnmatchcase(inner, pattern)]
                unused -= set(matching)
                if not name.startswith(prefix) or matching:
                    left.append(name)
                else:
                    weights[inner] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"init_from.file: {local.near(path)}: is no sound {SUFFIX} file: {first}") from None
    if prefix and len(left) == len(names) and not weights:
        raise UserError(f"init_from.prefix: no tensor of {local.near(path)} begins with {prefix!r}; they are called "
                        f"{', '.join(names[:3])}, ...")  # fmt: skip
    if unused:
        raise UserError(f"init_from.ignore: {sorted(unused)[0]!r} matches no tensor of {local.near(path)}; they are "
                        f"called {', '.join(names[:3])}, ...")  # fmt: skip
    return weights, tuple(left)

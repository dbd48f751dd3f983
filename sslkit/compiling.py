"""Whether a run's views and networks are compiled, where its recipe leaves that open."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from sslkit.recipe import Recipe

COMPILE_PIXELS = 1e9
"""`compile = "auto"` compiles runs on a GPU that see at least this many view pixels (ten epochs of CIFAR-10): below
that, a minute of compiling is not won back."""


def resolve_compile(recipe: Recipe, run_pixels: float, device: str) -> Recipe:
    """The recipe with `compile = "auto"` replaced by what it means here.

    On a CPU it means no: convolutions are library calls there, and a compiled ResNet-18 step takes as long as an eager
    one (docs/explanation/measurements.md).
    """
    if recipe.train.compile != "auto":
        return recipe
    pays = device == "cuda" and run_pixels >= COMPILE_PIXELS and _can_compile()
    chosen = {"compile": pays, "compile_chosen": pays}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=chosen)})


def _can_compile() -> bool:
    """What torch.compile needs on a GPU: Triton, and a C compiler for its launchers."""
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    return find_spec("triton") is not None and any(shutil.which(name) for name in compilers if name)

"""sslkit: self-supervised learning of image representations, where a method is a recipe of plugins."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sslkit.doctor import Examination
    from sslkit.embedding import embed
    from sslkit.encoder import ImageEncoder, load_encoder
    from sslkit.errors import RunFailed, SslkitError, UserError
    from sslkit.evaluation import evaluate
    from sslkit.evaluation.told import Evaluation
    from sslkit.exporting import Export, export
    from sslkit.feature_files import Embedded
    from sslkit.foreign.watching import watch
    from sslkit.recipe import Recipe, Train
    from sslkit.replaying import Replay
    from sslkit.result import Metrics, Result
    from sslkit.scripting import examine, load_recipe, replay, train
    from sslkit.searching import Nearest, search

__all__ = [
    "Embedded", "Evaluation", "Examination", "Export", "ImageEncoder", "Metrics", "Nearest", "Recipe", "Replay",
    "Result", "RunFailed", "SslkitError", "Train", "UserError", "__version__", "embed", "evaluate", "examine", "export",
    "load_encoder", "load_recipe", "replay", "search", "train", "watch",
]  # fmt: skip

try:
    __version__ = version("sslkit")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.0.0"

_HOMES = {
    "doctor": ("Examination",),
    "embedding": ("embed",),
    "encoder": ("ImageEncoder", "load_encoder"),
    "errors": ("RunFailed", "SslkitError", "UserError"),
    "evaluation": ("evaluate",),
    "evaluation.told": ("Evaluation",),
    "exporting": ("Export", "export"),
    "feature_files": ("Embedded",),
    "foreign.watching": ("watch",),
    "recipe": ("Recipe", "Train"),
    "replaying": ("Replay",),
    "result": ("Metrics", "Result"),
    "scripting": ("examine", "load_recipe", "replay", "train"),
    "searching": ("Nearest", "search"),
}
"""Where what other programs use is; it is imported when it is asked for, since some of it brings torch."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"sslkit.{module}"), name)
    raise AttributeError(f"module 'sslkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

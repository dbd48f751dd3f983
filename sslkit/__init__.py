"""sslkit: self-supervised learning of image representations, where a method is a recipe of plugins."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("sslkit")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.0.0"

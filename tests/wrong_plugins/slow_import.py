import torch

from wrong_plugins import Case
from wrong_plugins.right import RightSchedule


class Slow(RightSchedule):
    """Imports torch at once."""

    def build(self, run):
        return lambda step: float(torch.ones(()))


CASES = [Case(Slow(), "import_without_torch", r"imports torch \(.*slow_import.py:1\).*move that import into build")]

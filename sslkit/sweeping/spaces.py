"""Where a search looks, and Optuna, which says where next."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from sslkit import randomness
from sslkit.errors import UserError

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SPACE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:log)?")
_INTEGER = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class Space:
    """The values that an option may take: all between two ends."""

    low: float
    high: float
    log: bool
    """Whether equal ratios count alike, and not equal differences."""
    whole: bool
    """Whether only integers are among them: if both ends are written so."""

    def spelt(self, value: float) -> str:
        """A value as `--set` takes it."""
        return str(round(value)) if self.whole else repr(float(value))

    def holds(self, text: str) -> bool:
        """Whether a text is one of its values, as `--set` takes them."""
        if not (_INTEGER if self.whole else re.compile(_NUMBER)).fullmatch(text):
            return False
        return self.low <= float(text) <= self.high

    @property
    def low_text(self) -> str:
        """Its lower end as `--set` takes it."""
        return self.spelt(self.low)

    @property
    def high_text(self) -> str:
        """Its upper end as `--set` takes it."""
        return self.spelt(self.high)

    @property
    def text(self) -> str:
        """In its one spelling."""
        return f"{self.low_text}..{self.high_text}{':log' * self.log}"


def read(options: Sequence[str]) -> dict[str, Space]:
    """`KEY=LOW..HIGH[:log]` each.

    Raises:
        UserError: one line for each that cannot be read, or is given twice.
    """
    found: dict[str, Space] = {}
    problems = []
    for option in options:
        key, _, text = option.partition("=")
        key, match = key.strip(), _SPACE.fullmatch(text.strip())
        if not key or match is None:
            problems.append(f"--search {option}: should read KEY=LOW..HIGH or KEY=LOW..HIGH:log, such as "
                            "optimizer.lr=0.01..1:log")  # fmt: skip
            continue
        whole = bool(_INTEGER.fullmatch(match[1]) and _INTEGER.fullmatch(match[2]))
        space = Space(float(match[1]), float(match[2]), bool(match[3]), whole)
        if not space.low < space.high:
            problems.append(f"--search {option}: {match[1]} should be less than {match[2]}")
        elif space.log and space.low <= 0:
            problems.append(f"--search {option}: with :log both ends have to be above 0")
        elif key in found:
            problems.append(f"--search {option}: {key} has a --search already")
        found[key] = space
    if problems:
        raise UserError(*problems)
    return found


def check_installed() -> None:
    """Refuse to search without Optuna.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("optuna") is None:
        raise UserError("--search: needs Optuna, which is not installed: pip install 'sslkit[optuna]'")


class Study:
    """Optuna's sampler, tree-structured Parzen estimators (Bergstra et al. 2011), without a storage of its own.

    What it proposes for a trial follows from the trial's number and from what it was told of others: the same again
    after the search was killed, as long as one trial goes on at a time.
    """

    def __init__(self, spaces: Mapping[str, Space], *, together: bool) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.spaces, self.together = spaces, together
        self._study = optuna.create_study(direction="maximize")
        self._asked: dict[tuple[str, ...], Any] = {}
        distributions = optuna.distributions
        self._distributions: dict[str, Any] = {
            key: distributions.IntDistribution(int(space.low), int(space.high), log=space.log)
            if space.whole
            else distributions.FloatDistribution(space.low, space.high, log=space.log)
            for key, space in spaces.items()
        }

    def ask(self, number: int) -> dict[str, str]:
        """The values of the trial with this number, as `--set` takes them."""
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = optuna.samplers.TPESampler(
                seed=randomness.key(0, "sweep", number) % 2**32, constant_liar=self.together
            )
        trial = self._study.ask(self._distributions)
        values = {key: space.spelt(trial.params[key]) for key, space in self.spaces.items()}
        self._asked[tuple(values.values())] = trial
        return values

    def add(self, values: Mapping[str, str], value: float | None) -> None:
        """What came of a trial; None if it failed."""
        import optuna

        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        asked = self._asked.pop(tuple(values[key] for key in self.spaces), None)
        if asked is not None:
            self._study.tell(asked, value, state=state)
            return
        params: dict[str, Any] = {
            key: int(values[key]) if space.whole else float(values[key]) for key, space in self.spaces.items()
        }
        self._study.add_trial(
            optuna.trial.create_trial(state=state, value=value, params=params, distributions=self._distributions)
        )

"""Records in MLflow."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sslkit.errors import UserError
from sslkit.events import Run, observes

from . import elsewhere

if TYPE_CHECKING:
    from . import MLflow

LONGEST_VALUE, MOST_PARAMS, MOST_METRICS = 6000, 100, 1000
"""MLflow's limits: letters of a parameter, and entries of one request."""
PATIENCE = 300.0
"""Seconds after a failure before the next attempt: a server that is away must not slow the training down."""
STATUS = {"done": "FINISHED", "failed": "FAILED"}
"""The others (stopped, preempted, interrupted) may go on: `KILLED`, with the run's own word in a tag."""


class MLflowObserver:
    """One run of MLflow for one run directory, however many processes train it.

    Raises:
        UserError: MLflow is not installed, or there is nothing where it should write.
    """

    def __init__(self, options: MLflow) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # figures about its use, sent to its makers
        self.mlflow = elsewhere.needed("mlflow")
        self.options = options
        self.id: str | None = None
        self.client: Any = None
        self.pending: list[Any] = []
        self.written: dict[str, int] = {}
        """The last step of each metric that MLflow held when the run went on."""
        self._not_before = 0.0

    @observes(tryfirst=True)  # another observer may record something as the run starts
    def run_started(self, run: Run) -> None:
        try:
            self.client = self.mlflow.MlflowClient(tracking_uri=self.options.tracking_uri)
            run.say(f"mlflow: figures, recipe and views.png go to {self._where()}")
            if not self._goes_on(run):
                self._begin(run)
        except Exception as error:  # of MLflow, of its data base, of the network
            raise UserError(f"observer mlflow cannot write to {self._where()}: {elsewhere.first_line(error)}") from None

    def _where(self) -> str:
        """Where the records go, without the password that the environment may have put there."""
        return re.sub(r"//[^/@]*@", "//", self.options.tracking_uri or self.mlflow.get_tracking_uri())

    def _goes_on(self, run: Run) -> bool:
        if self.id is None:
            return False
        try:
            found = self.client.get_run(self.id)
        except self.mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run.say(f"mlflow: run {self.id} is not there any more; a new one begins at step {run.step}")
            return False
        for name in found.data.metrics:
            self.written[name] = max(metric.step for metric in self.client.get_metric_history(self.id, name))
        self.client.update_run(self.id, status="RUNNING")
        return True

    def _begin(self, run: Run) -> None:
        name = self.options.experiment
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        begun = self.client.create_run(experiment, run_name=self.options.name or run.directory.resolve().name)
        self.id = begun.info.run_id
        options = [
            self.mlflow.entities.Param(key, _short(value))
            for key, value in elsewhere.flat(elsewhere.recipe_of(run.directory))
        ]
        for start in range(0, len(options), MOST_PARAMS):
            self.client.log_batch(self.id, params=options[start : start + MOST_PARAMS])
        for file in (elsewhere.RECIPE, elsewhere.PICTURE):
            if (run.directory / file).is_file():
                self.client.log_artifact(self.id, str(run.directory / file))

    @observes
    def recorded(self, run: Run, record: Mapping[str, Any]) -> None:
        if self.client is None:
            return
        step, now = record["step"], int(time.time() * 1000)
        for name, value in elsewhere.numbers(record).items():
            # Nothing can be taken back there: what was written before a crash and is measured again stays as it was.
            if step > self.written.get(name, -1):
                self.pending.append(self.mlflow.entities.Metric(name, value, now, step))
        if time.monotonic() >= self._not_before:
            self._send(run)

    def _send(self, run: Run, otherwise: str = "kept to try again") -> None:
        """Write what waits; tell what becomes of what cannot be written."""
        try:
            while self.pending:
                self.client.log_batch(self.id, metrics=self.pending[:MOST_METRICS])
                del self.pending[:MOST_METRICS]
        except Exception as error:  # the training matters more
            self._not_before = time.monotonic() + PATIENCE
            run.say(
                f"mlflow: {len(self.pending)} numbers could not be written and are {otherwise}: "
                f"{elsewhere.first_line(error)}"
            )

    @observes
    def checkpoint_saved(self, run: Run) -> None:
        if self.pending and time.monotonic() >= self._not_before:
            self._send(run)

    @observes
    def run_ended(self, run: Run, status: str) -> None:
        if self.client is None:
            return
        self._send(run, "lost")
        try:
            self.client.set_tag(self.id, "status", status)
            self.client.set_terminated(self.id, STATUS.get(status, "KILLED"))
        except Exception as error:  # the run itself is safe
            run.say(f"mlflow: the end could not be written: {elsewhere.first_line(error)}")
        self.client = None

    def state_dict(self) -> dict[str, Any]:
        """The id, so that a resumed run goes on in the same one."""
        return {"id": self.id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.id = state["id"]


def _short(value: str) -> str:
    return value if len(value) <= LONGEST_VALUE else f"{value[: LONGEST_VALUE - 3]}..."

"""Records in Weights & Biases."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sslkit.errors import UserError
from sslkit.events import Run, observes

from . import elsewhere

if TYPE_CHECKING:
    from . import WandB


class WandBObserver:
    """One run of wandb for one run directory, however many processes train it.

    Raises:
        UserError: wandb is not installed, or has no API key and would ask for one.
    """

    def __init__(self, options: WandB) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # reports of wandb's own crashes, read at its import
        self.wandb = elsewhere.needed("wandb")
        self.options = options
        self.mode = options.mode or os.environ.get("WANDB_MODE") or "online"
        self.id: str | None = None
        self.writer: Any = None
        if self.mode == "online":
            self._check_key()

    def _check_key(self) -> None:
        try:
            if self.wandb.login(prompt=False, verify=False):
                return
        except self.wandb.errors.Error as error:
            raise UserError(f"observer wandb: {elsewhere.first_line(error)}") from None
        raise UserError(
            "observer wandb has no API key: run `wandb login`, or set WANDB_API_KEY, or mode = 'offline' in the recipe"
        )

    @observes(tryfirst=True)  # another observer may record something as the run starts
    def run_started(self, run: Run) -> None:
        begins = self.id is None
        self.id = self.id or uuid.uuid4().hex[:8]
        online = self.mode == "online"
        if online:  # before anything does
            to = f"{self.options.entity or 'your account'}, project {self.options.project}"
            run.say(f"wandb: figures, recipe, views.png and what wandb tells of the machine go to {to}")
        try:
            self.writer = self.wandb.init(
                project=self.options.project,
                entity=self.options.entity,
                name=self.options.name or run.directory.resolve().name,
                id=self.id,
                resume="allow" if online else None,
                dir=str(run.directory),
                config=elsewhere.recipe_of(run.directory),
                mode=self.mode,
                allow_val_change=True,
                reinit="create_new",
                save_code=False,
                settings=self.wandb.Settings(console="off", silent=True),
            )
        except self.wandb.errors.Error as error:
            raise UserError(
                f"observer wandb cannot begin: {elsewhere.first_line(error)} (mode = 'offline' needs no server)"
            ) from None
        if online:
            run.say(f"wandb: {self.writer.url}")
        elif self.mode == "offline":
            run.say(f"wandb: to upload, wandb sync {run.directory / 'wandb'}/offline-run-*")
        picture = run.directory / elsewhere.PICTURE
        if begins and picture.is_file():
            self.writer.log({"views": self.wandb.Image(str(picture))}, step=run.step)

    @observes
    def recorded(self, run: Run, record: Mapping[str, Any]) -> None:
        # Steps only go forward there: what was uploaded before a crash and is measured again stays as it was.
        if self.writer is not None and record["step"] >= self.writer.starting_step:
            self.writer.log(elsewhere.numbers(record), step=record["step"])

    @observes
    def run_ended(self, run: Run, status: str) -> None:
        if self.writer is not None:
            self.writer.summary["status"] = status
            self.writer.finish(exit_code=int(status == "failed"))
            self.writer = None

    def state_dict(self) -> dict[str, Any]:
        """The id, so that a resumed run goes on in the same one."""
        return {"id": self.id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.id = state["id"]

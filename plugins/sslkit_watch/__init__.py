"""Observers: what is measured while a run goes."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic_core import PydanticCustomError

from sslkit.api import Observer, RunInfo


class KNN(Observer):
    """Weighted k-nearest-neighbour accuracy on clean images, from step 0 on.

    The random network's figure at step 0 is the floor that every later one is to be read against. Backbone features
    in eval mode, cosine similarity, votes weighted by exp(cosine / temperature) (Wu et al. 2018, arXiv 1805.01978).
    The bank is drawn from the training images and the queries from the test images, both the same for every seed and
    step. Needs labels and test images; says so once and does nothing where there are none.
    """

    measures = ("knn_top1",)

    every_epochs: PositiveInt = 1
    """Epochs between measurements; the end of the run is always measured."""
    k: PositiveInt = 200
    """Neighbours that vote."""
    temperature: PositiveFloat = 0.1
    """Lower values let the nearest neighbours outweigh the others more."""
    bank: NonNegativeInt = 3_000
    """Training images to search in; 0 takes all."""
    queries: NonNegativeInt = 1_000
    """Test images to classify; 0 takes all."""

    def build(self, run: RunInfo) -> object:
        from .knn import KNNObserver

        return KNNObserver(self)


class Health(Observer):
    """Signs of collapse, of drift and of a task too easy, measured on what the training made anyway.

    With every record, of the step just taken: `std_sqrt_d`, `alignment` and `uniformity` of the online projections,
    `view_difference` of the views, `target_drift`, `target_norm_ratio`, `target_step` and `tau_measured` of the
    target. At the end of each epoch, of the newest training views: `effective_rank`, `rankme` and `alpha_req` of the
    backbone features, `projection_rank` of the projections. At the end of the run: `lidar` of newly drawn views.
    Formulas and sources: the reference page on metrics.
    """

    ring: Annotated[int, Field(ge=64)] = 4096
    """How many of the newest training features the ranks are measured on; at least 4 times their dimension is sound."""
    lidar_images: NonNegativeInt = 1000
    """Training images for LiDAR, at most all; more than the projections have dimensions. 0 switches it off."""
    lidar_views: Annotated[int, Field(ge=2)] = 10
    """Views of each of these images. The paper (Thilak et al. 2024, arXiv 2312.04000) takes 50, or 10 for some methods;
    on the quickstart 50 lowered LiDAR by 3% (28.5 to 27.6, 27.0 to 26.1) and took five times as long."""

    def build(self, run: RunInfo) -> object:
        from .health import HealthObserver

        return HealthObserver(self)


class Probe(Observer):
    """A linear classifier of the backbone's features, trained beside the run and never felt by it.

    Softmax regression on the online features of the first view, standardised as BatchNorm without scale and shift
    does, one step of SGD with momentum for each step of the run; weights start at zero, so nothing is random.
    Features are detached and the gradient is worked out by hand: none exists that could reach the backbone. At step 0
    and after each epoch, `probe_top1` is its accuracy on clean test images, of the online branch in eval mode; the
    same images as kNN's queries. `probe_train_top1` is that on training views before it learned from them, since the
    previous record. Needs labels; says so once and does nothing where there are none.
    """

    lr: PositiveFloat = 0.01
    """Learning rate; constant. On the quickstart (seeds 1 and 4, after 20 epochs) .01 gave .963 and .961, .03 .968 and
    .961, .1 .956 and .953, .001 .946 and .948; on the strongly correlated features of a random ResNet-18 .1 and more
    were the worst."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    queries: NonNegativeInt = 1_000
    """Test images to classify; 0 takes all. As many as kNN's, or fewer, cost no forward pass."""

    def build(self, run: RunInfo) -> object:
        from .probe import ProbeObserver

        return ProbeObserver(self)


class Report(Observer):
    """Writes `report.html`, one page about the run, when the run ends; and `snapshot.json`, which the page shows.

    The snapshot is taken of a run that is done or was stopped by `--steps`: spectrum of the features, their place in
    the plane, nearest neighbours. A run that is interrupted ends at once, with a page that has no snapshot. Whatever
    goes wrong here is said in one line, and the run counts as if nothing had.
    """

    snapshot: bool = True
    """False leaves the features alone: the page then has curves and findings only."""

    def build(self, run: RunInfo) -> object:
        from .report import ReportObserver

        return ReportObserver(self.snapshot)


class TensorBoard(Observer):
    """Writes every record to TensorBoard files in the run directory (`tensorboard --logdir runs`).

    With them, where the run directory has them: the recipe as text, and the picture of the views.
    """

    def build(self, run: RunInfo) -> object:
        from .tensorboard import TensorBoardObserver

        return TensorBoardObserver()


class WandB(Observer):
    """Writes every record to Weights & Biases, with the recipe and the picture of the views.

    Off unless a recipe names it. Needs `pip install 'sslkit[wandb]'`, and an API key unless `mode` is `offline`. It is
    never asked for: `wandb login` or `WANDB_API_KEY` gives it. A run that goes on does so in the same run of wandb.
    """

    project: str = "sslkit"
    """The project that runs go to."""
    entity: str | None = None
    """User or team; without it, the account's own."""
    name: str | None = None
    """Name of the run; without it, that of the run directory."""
    mode: Literal["online", "offline"] | None = None
    """`offline` writes to `wandb/` in the run directory, for `wandb sync`; without it, `$WANDB_MODE`, else online."""

    def build(self, run: RunInfo) -> object:
        from .weights_and_biases import WandBObserver

        return WandBObserver(self)


def _without_password(uri: str) -> str:
    try:
        secret = urlsplit(uri).password is not None
    except ValueError:
        secret = "@" in uri
    if secret:
        raise PydanticCustomError(
            "password",
            "should hold no password, which would go into the run's files; give it as MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or the whole as MLFLOW_TRACKING_URI",
        )
    return uri


class MLflow(Observer):
    """Writes every record to MLflow, with the recipe as parameters and the picture of the views.

    Off unless a recipe names it. Needs `pip install 'sslkit[mlflow]'`. Values of options beyond 6,000 letters, which
    MLflow refuses, are cut; the whole recipe is there as a file. A run that goes on does so in the same run of MLflow.
    """

    tracking_uri: Annotated[str, AfterValidator(_without_password)] | None = None
    """Server or data base, such as `http://host:5000` or `sqlite:///mlflow.db`; without it, `$MLFLOW_TRACKING_URI`,
    else what MLflow chooses, `mlflow.db` in the working directory. It goes into the lock file, so a password in it is
    refused."""
    experiment: str = "sslkit"
    """The experiment that runs go to; made if it is not there."""
    name: str | None = None
    """Name of the run; without it, that of the run directory."""

    def build(self, run: RunInfo) -> object:
        from .mlflow_tracking import MLflowObserver

        return MLflowObserver(self)

"""Our linear and kNN figures beside scikit-learn's and lightly's on the same features, with the seconds of each.

    sslkit evaluate RUN
    python benchmarks/evaluation.py RUN

RUN has features of the evaluation in its folder `evaluation/`, and its data are where its recipe says.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from lightly.utils.benchmarking.knn import knn_predict as lightlys
from sklearn.linear_model import LogisticRegression as Theirs

from sslkit.evaluation import told
from sslkit.evaluation.extracting import features_of
from sslkit.evaluation.linear import LogisticRegression, Standardised
from sslkit.evaluation.material import networks, open_material
from sslkit.evaluation.scoring import _by_lbfgs
from sslkit.features import knn_predict
from sslkit.opened_run import open_run


def timed(what: str, work: Callable[[], tuple[torch.Tensor, str]], wanted: torch.Tensor) -> torch.Tensor:
    """Do the work, and print its accuracy and seconds."""
    begun = time.perf_counter()
    predicted, more = work()
    seconds = time.perf_counter() - begun
    print(f"{what:44} {float((predicted == wanted).float().mean()):.4f} {seconds:8.1f} s  {more}", flush=True)
    return predicted


def main(run: str) -> None:
    """Print a line for each."""
    opened = open_run(run)
    told.prepare(opened.run)
    material = open_material(opened, (), 0, "cpu", True, print)
    network = networks(material, "backbone", floor=False)[0]
    rows, queries = features_of(material, network, material.train), features_of(material, network, material.test)
    labels, wanted, classes = material.train.labels, material.test.labels, material.classes
    print(f"{tuple(rows.shape)} features, {torch.get_num_threads()} threads")

    ours = timed("kNN, sslkit", lambda: (knn_predict(rows, labels, queries, classes), ""), wanted)
    bank = F.normalize(rows, dim=1).T.contiguous()
    parts = F.normalize(queries, dim=1).split(256)

    def lightly() -> tuple[torch.Tensor, str]:
        return torch.cat([lightlys(part, bank, labels, classes)[:, 0] for part in parts]), ""

    print(f"predictions that differ: {int((timed('kNN, lightly', lightly, wanted) != ours).sum())} of {len(ours)}")

    standardised = Standardised(rows)
    rows, queries = standardised(rows), standardised(queries)
    chosen: dict[str, float] = {}

    def swept() -> tuple[torch.Tensor, str]:
        classifier, choice = _by_lbfgs(rows, labels, classes, 0)
        chosen.update(choice)
        return classifier.predict(queries), f"C = {choice['C']:g}"

    timed("linear, sslkit, seven C and the last fit", swept, wanted)

    def once() -> tuple[torch.Tensor, str]:
        fitted = LogisticRegression(rows, labels, classes).fit(chosen["C"])
        return fitted.linear.predict(queries), f"{fitted.iterations} iterations"

    timed("linear, sslkit, that C alone", once, wanted)
    for tolerance in (1e-4, 1e-6):

        def theirs(tolerance: float = tolerance) -> tuple[torch.Tensor, str]:
            fitted = Theirs(C=chosen["C"], max_iter=2000, tol=tolerance).fit(rows.numpy(), labels.numpy())
            return torch.from_numpy(fitted.predict(queries.numpy())), f"{fitted.n_iter_[0]} iterations"

        timed(f"linear, scikit-learn, that C alone, tol {tolerance:g}", theirs, wanted)


if __name__ == "__main__":
    main(sys.argv[1])
